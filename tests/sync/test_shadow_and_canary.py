"""Releases that run beside the one that serves before they may: on copies of requests, and on a share of them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec
import pytest

from agent.contract.acceptance import CanaryRules, Close, ShadowRules, WatchRules
from agent.contract.assignment import Rollout
from agent.contract.reasons import Reason
from agent.contract.reports import Outcome, Phase
from agent.sync.fleet.stages import stage_of
from agent.sync.gates import canary, shadow, watch
from agent.sync.gates.canary import Canaried
from agent.sync.gates.shadow import ShadowCounts, Shadowed
from agent.sync.gates.watch import Commit, Keep, RollBack, Watched
from agent.sync.serving import OutputNumbers, PairedTimes, ServeAway, ServeRefused
from agent.sync.updating import update
from tests.sync.bench import MODEL, Bench, numbers

P = Phase
WATCH = WatchRules(duration_s=5.0, max_duration_s=60.0, min_requests_to_judge=10)
SHADOW = ShadowRules(
    required=True, min_samples=20, min_agreement=0.9, max_top1_flips=0.05, duration_s=10.0, max_duration_s=120.0
)
CANARY = CanaryRules(share=0.1, duration_s=10.0, max_duration_s=120.0, min_requests=20)
BOUNDS = (0.5, 1.0, 2.0, 4.0)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def offered(bench: Bench, *, mode: str = "install", **acceptance) -> Bench:
    """Release 1 serves; release 2 is wanted and asks for something."""
    bench.install(1)
    bench.release(2, watch=WATCH, **acceptance)
    bench.serve.calls.clear()
    rollout = Rollout(id="look", release=2, previous=1, permille=1000, mode=mode)
    bench.want(1, rollout=rollout)
    bench.step()
    return bench


def compared(bench: Bench, samples: int, **changes) -> None:
    """What `serve` says of the shadow from now on."""
    said = {"samples": samples, "agreed": samples, "rows": samples, "flips": 0, "errors": {}, **changes}
    bench.serve.compared = msgspec.structs.replace(bench.serve.compared, **said)


def shadowing(bench: Bench, samples: int = 0, **changes) -> Bench:
    bench.until(P.SHADOWING)
    bench.step()
    assert bench.serve.shadows == {MODEL: 2}
    compared(bench, samples, **changes)
    return bench


# -- on copies ------------------------------------------------------------------------------------------------------------------


def test_a_release_that_keeps_its_rules_goes_on_by_itself(bench):
    shadowing(offered(bench, shadow=SHADOW), 40, outputs={"y": OutputNumbers(0.25)})
    seen = bench.until(P.STEADY)

    assert seen == [P.SHADOWING, P.ACTIVATING, P.WATCHING, P.STEADY]
    assert bench.serving == 2
    assert bench.serve.shadows == {}
    assert [e for e in bench.records.journal.entries(MODEL) if e.gate == "shadow"][-1].evidence["samples"] == 40


def test_a_report_has_its_numbers_while_it_runs_and_its_answer_afterwards(bench):
    shadowing(offered(bench, shadow=msgspec.structs.replace(SHADOW, required=False), mode="shadow"), 40, agreed=38)
    bench.step()
    stage = stage_of(bench.updater.state)
    assert (stage.name, stage.release, stage.verdict) == ("shadow", 2, "running")
    assert (stage.evidence["samples"], stage.evidence["agreement"]) == (40, 0.95)
    for _ in range(40):
        bench.step()

    assert (bench.phase, bench.serving) == (P.SHADOWING, 1), "the rollout has not said install"
    assert (bench.answer.outcome, bench.answer.rollout) == (Outcome.SHADOWED, "look")
    assert bench.answer.evidence["agreement"] == 0.95
    assert stage_of(bench.updater.state).verdict == "passed"
    assert 2 not in bench.serve.loaded[MODEL], "its memory went back"
    bench.want(1, rollout=Rollout(id="look", release=2, previous=1, permille=1000))
    bench.until(P.STEADY)
    assert bench.serving == 2
    assert stage_of(bench.updater.state) is None


BROKEN = [
    ("answers", {"agreed": 30}, Reason.SHADOW_DISAGREES, "75.0% of 40 answers agree, at least 90.0% demanded"),
    ("flips", {"flips": 4}, Reason.SHADOW_DISAGREES, "10.0% of 40 rows have another best class"),
    ("errors", {"errors": {"run": 1, "invalid": 3}}, Reason.SHADOW_ERRORS, "9.1% of 44 copied requests"),
    (
        "time",
        {"latency": PairedTimes(pairs=40, live_ms=80.0, run_ms=1600.0, bounds=(1.0, 8.0, 64.0), counts=(0, 0, 40, 0))},
        Reason.SHADOW_TOO_SLOW,
        "times as long on the same inputs",
    ),
    (
        "given up",
        {"samples": 0, "state": "ended", "failed": True, "ended": "it failed 20 times"},
        Reason.SHADOW_ERRORS,
        "20 times",
    ),
    (
        "hung",
        {"samples": 0, "state": "ended", "failed": True, "ended": "a run has not ended"},
        Reason.SHADOW_TOO_SLOW,
        "not ended",
    ),
]


@pytest.mark.parametrize(("changes", "reason", "words"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
@pytest.mark.parametrize("mode", ["install", "shadow"])
def test_one_that_breaks_a_rule_is_refused(changes, reason, words, mode, bench):
    shadowing(offered(bench, shadow=SHADOW, mode=mode), **{"samples": 40, **changes})
    bench.until(P.QUARANTINED)
    bench.step()

    assert (bench.answer.outcome, bench.answer.reason) == (Outcome.REFUSED, reason.value)
    assert words in bench.answer.message
    assert bench.serving == 1
    assert set(bench.serve.loaded[MODEL]) == {1}
    assert bench.records.quarantine.names_version(MODEL, 2)


def test_a_release_that_sets_no_rule_may_differ_as_it_likes(bench):
    shadowing(offered(bench, mode="shadow"), 60, agreed=0, flips=60)
    for _ in range(300):
        bench.step()

    assert bench.phase is P.SHADOWING
    assert bench.answer.outcome is Outcome.SHADOWED


def test_a_crash_of_serve_counts_against_it(bench):
    shadowing(offered(bench, shadow=SHADOW), 5)
    bench.step()
    bench.serve.start()
    bench.until(P.QUARANTINED)

    assert bench.answer.reason == "serve_crashed"
    assert bench.serving == 1


def test_less_often_than_allowed_it_begins_anew_and_its_numbers_add_up(bench):
    shadowing(offered(bench, shadow=msgspec.structs.replace(SHADOW, max_crashes=1)), 15)
    bench.step()
    bench.serve.start()
    bench.step()
    assert bench.serve.shadows == {MODEL: 2}
    compared(bench, 15)
    bench.until(P.ACTIVATING)

    assert bench.answer.evidence["samples"] == 30
    assert bench.answer.evidence["crashes"] == 1


@pytest.mark.parametrize("how", ["shadow", "canary"])
def test_orderly_restarts_beside_the_active_release_are_nobodys_fault(how, bench):
    if how == "shadow":
        shadowing(offered(bench, shadow=SHADOW), 15)
    else:
        canarying(offered(bench, canary=CANARY))
    for number in range(update.MAX_INTERRUPTIONS + 2):
        bench.step()
        bench.serve.end()
        if number % 2:
            bench.boot += "'"
        bench.serve.away = False
        bench.serve.start()
        bench.again()
        bench.step()
    if how == "shadow":
        compared(bench, 30)
    bench.serve.numbers = {1: numbers(200), 2: numbers(20)}
    bench.until(P.STEADY)

    assert (bench.serving, bench.answer.outcome) == (2, Outcome.COMMITTED)


@pytest.mark.parametrize("reboot", [False, True], ids=["sync restarts", "the machine restarts"])
def test_restarts_go_on_where_they_were(reboot, bench):
    shadowing(offered(bench, shadow=SHADOW), 15)
    for _ in range(25):
        bench.step()
    if reboot:
        bench.boot = "boot-2"
        bench.serve.start()
    bench.again()
    bench.step()
    if reboot:
        compared(bench, 15)
    else:
        compared(bench, 30)
    bench.until(P.ACTIVATING)

    assert bench.answer.evidence["samples"] == 30
    assert bench.answer.evidence["crashes"] == 0


def test_a_machine_that_restarts_again_and_again_puts_it_down_to_the_release(bench):
    shadowing(offered(bench, shadow=SHADOW))
    for number in range(update.MAX_INTERRUPTIONS + 1):
        bench.boot = f"boot-{number + 2}"
        bench.serve.start()
        bench.again()
        bench.step()
        bench.step()

    assert bench.phase is P.QUARANTINED
    assert bench.answer.reason == "interrupted_too_often"


def test_where_memory_does_not_allow_both_it_is_skipped(bench):
    offered(bench, shadow=SHADOW).serve.fault = no_memory_for(2)
    seen = bench.until(P.ACTIVATING)

    assert P.SHADOWING in seen
    assert any(e.gate == "shadow" and "no room" in e.message for e in bench.records.journal.entries(MODEL))


def test_or_waited_for(bench):
    offered(bench, shadow=msgspec.structs.replace(SHADOW, without_memory="wait")).serve.fault = no_memory_for(2)
    bench.until(P.SHADOWING)
    for _ in range(50):
        bench.step()
    assert bench.phase is P.SHADOWING
    assert "waits for memory" in bench.updater.problem
    bench.serve.fault = lambda *_: None
    shadowing(bench, 40)
    bench.until(P.STEADY)
    assert bench.serving == 2


def no_memory_for(version: int):
    def fault(action: str, number: int | None) -> None:
        if (action, number) == ("load", version):
            raise ServeRefused(507, "no_memory", "no room for it")

    return fault


def test_a_model_whose_requests_mean_nothing_alone_is_skipped(bench):
    def stateful(action: str, _version: int | None) -> None:
        if action == "shadow":
            raise ServeRefused(409, "stateful", "it has state")

    offered(bench, shadow=SHADOW).serve.fault = stateful
    bench.until(P.STEADY)
    assert bench.serving == 2


def test_a_first_release_has_nothing_to_be_beside(bench):
    bench.release(1, shadow=SHADOW, canary=CANARY)
    bench.want(1)
    bench.step()
    assert bench.until(P.STEADY) == [P.FETCHING, P.TRIALING, P.ACTIVATING, P.WATCHING, P.STEADY]


def test_something_else_is_wanted_meanwhile(bench):
    shadowing(offered(bench, shadow=SHADOW), 5)
    bench.want(1)
    bench.until(P.STEADY)

    assert set(bench.serve.loaded[MODEL]) == {1}
    assert bench.updater.state.shadowed is None


def test_serve_away_for_a_while_is_waited_for(bench):
    shadowing(offered(bench, shadow=SHADOW), 40)
    bench.serve.away = True
    for _ in range(5):
        bench.step()
    assert bench.phase is P.SHADOWING
    bench.serve.away = False
    bench.until(P.STEADY)
    assert bench.serving == 2


# -- judged on numbers alone ----------------------------------------------------------------------------------------------------


def shadowed(elapsed_s: float, samples: int, **changes) -> Shadowed:
    watched = Watched(baseline=None, instance="i", agent_version="1", boot="b", elapsed_s=elapsed_s)
    counts = {"samples": samples, "agreed": samples, **changes}
    return Shadowed(watched=watched, current=ShadowCounts(**counts))


JUDGED = [
    ("too early", shadowed(5, 19), Keep),
    ("enough, and too early", shadowed(5, 40), Keep),
    ("in time", shadowed(10, 20), Commit),
    ("too few", shadowed(60, 19), Keep),
    ("too few, and it is over", shadowed(120, 3), Commit),
    ("nothing came", shadowed(120, 0), Commit),
    ("few, and most disagree", shadowed(120, 3, agreed=1), RollBack),
    ("few, and most failed", shadowed(120, 1, errors=2), RollBack),
    ("few, and one disagrees", shadowed(120, 3, agreed=2), Commit),
    ("a tiny model that is slower", shadowed(10, 20, pairs=20, run_ms=2.0, bounds=BOUNDS, counts=(0, 0, 0, 0, 20)), Commit),
]


@pytest.mark.parametrize(("state", "verdict"), [j[1:] for j in JUDGED], ids=[j[0] for j in JUDGED])
def test_when_a_shadow_is_over(state, verdict):
    assert isinstance(shadow.judge(state, SHADOW, None), verdict)


def test_counts_of_several_lives_add_up():
    one = ShadowCounts(samples=2, agreed=1, max_difference=3.0, pairs=2, bounds=BOUNDS, counts=(0, 1, 1, 0, 0))
    assert one.plus(ShadowCounts()) == one == ShadowCounts().plus(one)
    both = one.plus(one)
    assert (both.samples, both.agreed, both.max_difference, both.counts) == (4, 2, 3.0, (0, 2, 2, 0, 0))


# -- on a share -----------------------------------------------------------------------------------------------------------------


def canarying(bench: Bench) -> Bench:
    bench.until(P.CANARYING)
    bench.step()
    assert bench.serve.canaries[MODEL].share == 0.1
    return bench


def test_a_release_answers_its_share_first(bench):
    canarying(offered(bench, canary=CANARY))
    bench.serve.numbers = {1: numbers(900), 2: numbers(100)}
    stage = stage_of(bench.updater.state)
    assert (stage.name, stage.verdict) == ("canary", "running")
    seen = bench.until(P.STEADY)

    assert seen == [P.CANARYING, P.ACTIVATING, P.WATCHING, P.STEADY]
    assert bench.serving == 2
    assert bench.serve.canaries == {}
    assert [e for e in bench.records.journal.entries(MODEL) if e.gate == "canary"][-1].verdict == "passed"


BAD = [
    ("failing", numbers(50, run=50), Reason.ERROR_RATIO),
    ("refusing", numbers(50, invalid=50), Reason.ERROR_RATIO),
    ("slow", numbers(100, slow=100), Reason.LATENCY_RATIO),
]


@pytest.mark.parametrize(("candidate", "reason"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_one_that_does_worse_than_the_other_goes_at_once(candidate, reason, bench):
    canarying(offered(bench, canary=CANARY))
    bench.serve.numbers = {1: numbers(900), 2: candidate}
    bench.step()
    assert (bench.phase, bench.serve.canaries) == (P.ROLLING_BACK, {})
    bench.until(P.QUARANTINED)

    assert (bench.answer.outcome, bench.answer.reason) == (Outcome.ROLLED_BACK, reason.value)
    assert (bench.serving, set(bench.serve.loaded[MODEL])) == (1, {1})
    assert bench.records.quarantine.names_version(MODEL, 2)


def test_one_that_does_worse_while_the_disk_is_full_goes_too_and_is_remembered_for_that(bench, monkeypatch):
    canarying(offered(bench, canary=CANARY))
    bench.serve.numbers[2] = numbers(10, run=40)
    bench.serve.calls.clear()

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("agent.common.files.replacing", full)
        for _ in range(5):
            bench.step()
        assert bench.phase is P.CANARYING
        assert bench.serve.canaries == {}
        assert ("load", 2) not in bench.serve.calls, "nobody asks it again"
    bench.until(P.QUARANTINED)

    assert bench.answer.reason == Reason.ERROR_RATIO.value
    assert bench.records.quarantine.entries(MODEL)[-1].answer.reason == Reason.ERROR_RATIO.value


def test_what_fails_on_both_is_not_its_fault(bench):
    offered(bench, canary=CANARY)
    bench.serve.numbers = {1: numbers(1000)}
    canarying(bench)
    bench.serve.numbers = {1: numbers(1450, invalid=450), 2: numbers(50, invalid=50)}
    bench.until(P.ACTIVATING)


def test_the_baseline_is_that_of_the_same_time(bench):
    """What the active version answered badly last week is no excuse."""
    offered(bench, canary=CANARY)
    bench.serve.numbers = {1: numbers(500, invalid=500)}
    canarying(bench)
    bench.serve.numbers = {1: numbers(1400, invalid=500), 2: numbers(50, invalid=50)}
    bench.until(P.QUARANTINED)
    assert bench.answer.reason == "error_ratio"


def test_a_crash_of_serve_ends_a_canary(bench):
    canarying(offered(bench, canary=CANARY))
    bench.serve.start()
    bench.serve.canaries.clear()
    bench.until(P.QUARANTINED)
    assert (bench.answer.outcome, bench.answer.reason) == (Outcome.ROLLED_BACK, "serve_crashed")


@pytest.mark.parametrize("reboot", [False, True], ids=["sync restarts", "the machine restarts"])
def test_a_canary_goes_on_after_a_restart(reboot, bench):
    canarying(offered(bench, canary=CANARY))
    bench.serve.numbers = {1: numbers(90), 2: numbers(10)}
    for _ in range(3):
        bench.step()
    if reboot:
        bench.boot = "boot-2"
        bench.serve.start()
        bench.serve.canaries.clear()
        bench.serve.numbers = {1: numbers(5), 2: numbers(0)}
    bench.again()
    bench.step()
    assert bench.serve.canaries[MODEL].version == 2
    bench.serve.numbers = {1: numbers(200), 2: numbers(20)}
    bench.until(P.STEADY)
    assert bench.serving == 2


def test_a_canary_that_is_overtaken_goes_and_is_not_remembered(bench):
    canarying(offered(bench, canary=CANARY))
    bench.want(1)
    bench.until(P.STEADY)

    assert (bench.serving, set(bench.serve.loaded[MODEL]), bench.serve.canaries) == (1, {1}, {})
    assert not bench.records.quarantine.names_version(MODEL, 2)


def test_without_memory_for_both_it_is_activated_without_a_canary(bench):
    offered(bench, canary=CANARY).serve.fault = no_memory_for(2)
    bench.until(P.STEADY)
    assert bench.serving == 2
    assert ("swap", 2) in bench.serve.calls


def test_a_serve_that_refuses_for_good_ends_a_canary(bench):
    def refuses(action: str, version: int | None) -> None:
        if (action, version) == ("canary", 2):
            raise ServeRefused(409, "odd", "not here")

    offered(bench, canary=CANARY).serve.fault = refuses
    bench.until(P.QUARANTINED)

    assert (bench.answer.reason, bench.serving) == ("activation_failed", 1)


def test_silence_ends_a_canary_too(bench):
    canarying(offered(bench, canary=CANARY))
    bench.until(P.ACTIVATING)
    assert 100 < bench.clock.monotonic() - 1000 < 200


def test_serve_away_before_it_began_puts_it_off(bench):
    def away(action: str, _version: int | None) -> None:
        if action != "status" and bench.phase is P.CANARYING:
            raise ServeAway("restarting", sent=False)

    offered(bench, canary=CANARY).serve.fault = away
    bench.until(P.CANARYING)
    bench.until(P.WAITING)
    bench.serve.fault = lambda *_: None
    bench.until(P.STEADY)
    assert bench.serving == 2


def test_copies_first_then_a_share_then_all(bench):
    shadowing(offered(bench, shadow=SHADOW, canary=CANARY), 40)
    bench.serve.numbers = {1: numbers(900), 2: numbers(100)}
    assert bench.until(P.STEADY) == [P.SHADOWING, P.CANARYING, P.ACTIVATING, P.WATCHING, P.STEADY]


def test_back_to_what_was_committed_here_needs_neither(bench):
    bench.install(1, shadow=SHADOW, canary=CANARY)
    bench.install(2)
    bench.want(1)
    bench.step()
    assert bench.until(P.STEADY) == [P.FETCHING, P.ACTIVATING, P.WATCHING, P.STEADY]


def test_what_was_counted_since():
    earlier, now = numbers(100, invalid=3).for_watch(), numbers(150, invalid=4, run=2).for_watch()
    since = canary.less(now, earlier)
    assert (since.ok, since.invalid, since.run, sum(since.counts)) == (50, 1, 2, 50)
    assert canary.less(earlier, now) == earlier, "another life: it counts from 0"
    watched = Watched(baseline=None, instance="i", agent_version="1", boot="b")
    state = Canaried(watched=watched, begun=earlier, latest=earlier)
    state = canary.observe(state, 2, watch.Sample("i", "1", 2, None), now, 1.0, "b")
    state = canary.observe(state, 2, watch.Sample("j", "1", 2, None), numbers(7).for_watch(), 1.0, "b")
    state = canary.observe(state, 2, watch.Sample("j", "1", 2, None), numbers(10).for_watch(), 1.0, "b")
    assert (state.beside.ok, state.watched.crashes) == (53, 1)


# -- what may be asked for -------------------------------------------------------------------------------------------------------


WRONG = [
    (ShadowRules, {"share": 0.0}), (ShadowRules, {"share": 1.5}), (ShadowRules, {"max_rate": 0}), (ShadowRules, {"min_samples": 0}),
    (ShadowRules, {"duration_s": 10.0, "max_duration_s": 5.0}), (ShadowRules, {"min_agreement": 2.0}), (ShadowRules, {"max_crashes": -1}),
    (CanaryRules, {"share": 0.0}), (CanaryRules, {"duration_s": 0.0}), (CanaryRules, {"min_requests": -1}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fields"), WRONG, ids=str)
def test_rules_that_make_no_sense(kind, fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        kind(**fields)


def test_tolerances_reach_serve():
    rules = ShadowRules(tolerance={"y": Close(atol=0.5), "*": Close(rtol=0.1)})
    assert msgspec.json.decode(msgspec.json.encode(rules), type=ShadowRules) == rules
