"""The watch as a table: what was seen, and what must follow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.acceptance import WatchRules
from agent.contract.reasons import Reason
from agent.lives import Life, ended_with_its_boot
from agent.sync.gates.watch import (
    SERVE_GONE_S,
    Commit,
    Keep,
    RollBack,
    Sample,
    Stats,
    Watched,
    judge,
    observe,
    p95_ms,
    percentile,
)

RULES = WatchRules(duration_s=100.0, max_duration_s=1000.0, min_requests=10, min_requests_to_judge=20)
BOUNDS = (1.0, 10.0, 100.0)


def stats(ok: int, *, invalid: int = 0, run: int = 0, counts: tuple[int, ...] = ()) -> Stats:
    return Stats(ok=ok, invalid=invalid, run=run, bounds_ms=BOUNDS, counts=counts or (ok, 0, 0, 0))


def watched(now: Stats, baseline: Stats | None = None, **changes) -> Watched:
    return Watched(
        **{
            "baseline": baseline,
            "instance": "a",
            "agent_version": "1",
            "boot": "b",
            "elapsed_s": 50.0,
            "current": now,
            **changes,
        }
    )


QUIET = stats(0)
ROWS = [
    ("nothing yet", watched(QUIET), Keep),
    ("time is up, too few requests", watched(stats(9), elapsed_s=150.0), Keep),
    ("time is up, enough requests", watched(stats(10), elapsed_s=150.0), Commit),
    ("silence for the longest time", watched(QUIET, elapsed_s=1000.0), Commit),
    ("failures, too few to judge", watched(stats(9, run=10), stats(1000)), Keep),
    ("failures, enough to judge", watched(stats(10, run=10), stats(1000)), Reason.ERROR_RATIO),
    ("failures, too few to judge, time is up", watched(stats(0, run=19), stats(1000), elapsed_s=150.0), Keep),
    ("failures, too few to judge, no time is left", watched(stats(0, run=5), stats(1000), elapsed_s=1000.0), Reason.ERROR_RATIO),
    ("a failure or two in a quiet hour", watched(stats(8, run=2), stats(1000), elapsed_s=1000.0), Commit),
    ("as many failures as before", watched(stats(90, run=10), stats(900, run=100)), Keep),
    ("a little more than before, allowed", watched(stats(989, run=11), stats(1000)), Keep),
    ("just above what is allowed", watched(stats(97, run=3), stats(1000)), Reason.ERROR_RATIO),
    ("refuses its callers", watched(stats(50, invalid=50), stats(1000)), Reason.ERROR_RATIO),
    ("callers were as wrong before", watched(stats(50, invalid=50), stats(500, invalid=500)), Keep),
    ("wrong callers of a first release", watched(stats(50, invalid=50)), Keep),
    ("a first release that fails", watched(stats(50, run=50)), Reason.ERROR_RATIO),
    ("slow", watched(stats(100, counts=(0, 0, 100, 0)), stats(100)), Reason.LATENCY_RATIO),
    ("slow, but so was the one before", watched(stats(100, counts=(0, 0, 100, 0)), stats(100, counts=(0, 0, 100, 0))), Keep),
    ("slow, too few to judge", watched(stats(19, counts=(0, 0, 19, 0)), stats(100)), Keep),
    ("a crash", watched(stats(100), stats(100), crashes=1), Reason.SERVE_CRASHED),
    ("a crash when time is up", watched(stats(100), stats(100), crashes=1, elapsed_s=5000.0), Reason.SERVE_CRASHED),
    ("another release serves", watched(QUIET, elsewhere_s=SERVE_GONE_S), Reason.ACTIVATION_FAILED),
]  # fmt: skip


@pytest.mark.parametrize(("name", "seen", "expected"), ROWS, ids=[row[0] for row in ROWS])
def test_verdict(name, seen, expected):
    verdict = judge(seen, RULES, serving_it=True)

    if isinstance(expected, Reason):
        assert isinstance(verdict, RollBack)
        assert verdict.reason is expected
        assert verdict.message
    else:
        assert isinstance(verdict, expected)


def test_it_never_commits_while_serve_does_not_answer():
    assert isinstance(judge(watched(stats(100), elapsed_s=5000.0), RULES, serving_it=False), Keep)


def test_evidence_has_the_numbers():
    verdict = judge(watched(stats(97, run=3), stats(1000)), RULES, serving_it=True)

    assert isinstance(verdict, RollBack)
    assert verdict.evidence["failed"] == 3
    assert verdict.evidence["baseline_requests"] == 1000
    assert "3.0% of the requests failed, at most 2.0% allowed" in verdict.message


def sample(instance: str = "a", now: Stats = QUIET, *, version: str = "1", active: int = 2) -> Sample:
    return Sample(instance, version, active, now)


def see(seen: Watched, *samples: Sample | None, seconds: float = 1.0, boot: str = "b", lives: str = "") -> Watched:
    for one in samples:
        seen = observe(seen, 2, one, seconds, boot, told(lives))
    return seen


def told(lives: str) -> tuple[Life, ...]:
    """`a. b c` in boot "b", `c:` in boot "c" behind it: a full stop is an orderly end."""
    boots = [(boot, word) for boot, words in zip("bc", lives.split("|"), strict=False) for word in words.split()]
    return tuple(Life(instance=word.rstrip("."), boot=boot, ended=word.endswith(".")) for boot, word in boots)


def test_a_new_instance_is_a_crash_and_its_counts_go_on():
    seen = see(watched(QUIET), sample(now=stats(30)), sample("b", stats(12)))

    assert seen.crashes == 1
    assert seen.total.ok == 42
    assert seen.total.counts == (42, 0, 0, 0)


def test_a_short_absence_is_nothing_and_a_long_one_a_crash_counted_once():
    short = see(watched(QUIET), *[None] * 20, sample())
    long = see(watched(QUIET), *[None] * 200, sample("b"), sample("b"))

    assert short.crashes == 0
    assert long.crashes == 1


def test_a_reboot_and_an_upgrade_explain_a_new_instance():
    rebooted = see(watched(stats(5)), None, sample("b", stats(3)), boot="c")
    upgraded = see(watched(QUIET), sample("b", version="2"))

    assert (rebooted.crashes, rebooted.total.ok) == (0, 8)
    assert upgraded.crashes == 0
    assert see(upgraded, sample("c", version="2")).crashes == 1


LIVES = [
    # what serve noted, whether it was seen to be gone for long, the version that answers as "c", crashes
    ("a restart", "a. c", False, "1", 0),
    ("two restarts between two looks", "a. b. c", False, "1", 0),
    ("a crash", "a c", False, "1", 1),
    ("a crash after a restart", "a. b c", False, "1", 1),
    ("a loop of crashes between two looks", "a b c", False, "1", 2),
    ("what came before the watch", "z y a. c", False, "1", 0),
    ("a crash that was counted while it was away", "a c", True, "1", 0),
    ("one more than was counted while it was away", "a b c", True, "1", 1),
    ("an upgrade that ends it as it likes", "a c", False, "2", 0),
    ("an upgrade that crashes", "a. b c", False, "2", 1),
    ("a power cut", "a | c", False, "1", 0),
    ("a reboot on purpose", "a. | c", False, "1", 0),
    ("a crash after a reboot", "a. | b c", False, "1", 1),
    ("a crash before a reboot", "a b. | c", False, "1", 1),
    ("nothing was noted", "", False, "1", 1),
    ("one that cannot note anything", "a. b", False, "1", 1),
    ("one of which nothing is remembered", "b. c", False, "1", 1),
]


@pytest.mark.parametrize(("name", "lives", "gone", "version", "crashes"), LIVES, ids=[row[0] for row in LIVES])
def test_which_lives_crashed(name, lives, gone, version, crashes):
    before = watched(stats(30), gone=gone)
    boot = "c" if "|" in lives else "b"
    seen = see(before, None, sample("c", stats(12), version=version), boot=boot, lives=lives)

    assert seen.crashes == crashes
    assert seen.total.ok == 42, "what was answered before goes on to count"


def test_stopped_in_order_it_is_not_watched_and_no_time_passes():
    seen = see(watched(QUIET), *[None] * 500, lives="a.")
    assert (seen.crashes, seen.away_s, seen.elapsed_s) == (0, 0.0, 50.0)

    assert see(seen, sample("c"), lives="a. c").crashes == 0
    assert see(seen, *[None] * 500, lives="a. c").crashes == 1, "the next one began and never answered"


@pytest.mark.parametrize(
    ("lives", "in_order"), [("a.", True), ("a", False), ("a. b", False), ("a b.", True), ("a. | c", True), ("a b | c.", False)]
)
def test_whether_a_machine_went_down_in_order(lives, in_order):
    assert ended_with_its_boot(told(lives), "a") is in_order


def test_somebody_else_being_active_is_counted_while_it_lasts():
    seen = see(watched(QUIET), sample(active=1), sample(active=1))

    assert seen.elsewhere_s == 2.0
    assert see(seen, sample()).elsewhere_s == 0.0


@pytest.mark.alone  # each example has a deadline
@given(st.lists(st.integers(0, 50), min_size=4, max_size=4), st.floats(0.01, 1.0))
def test_a_percentile_lies_inside_the_bounds(counts, share):
    value = percentile(BOUNDS, counts, share)

    assert (value is None) == (sum(counts) == 0)
    assert value is None or 0.0 <= value <= BOUNDS[-1]


def test_p95():
    assert p95_ms(stats(100, counts=(100, 0, 0, 0))) == pytest.approx(0.95)
    assert p95_ms(stats(100, counts=(90, 10, 0, 0))) == pytest.approx(5.5)
    assert p95_ms(stats(100, counts=(0, 0, 0, 100))) == BOUNDS[-1]
    assert p95_ms(Stats()) is None
