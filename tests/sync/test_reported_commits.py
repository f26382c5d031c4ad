"""A release stays once the fleet has heard of it: what cuts a device off goes back, and an outage of the network takes no good model away."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.contract.acceptance import WatchRules
from agent.contract.names import ReleaseRef
from agent.contract.reasons import Reason
from agent.contract.reports import Outcome, Phase
from agent.store import Choice, Selection
from agent.sync.fleet import reports
from agent.sync.fleet.deliveries import REMEMBERED, Deliveries
from agent.sync.serving import ModelStatus
from tests.sync.bench import MODEL, Bench
from tests.sync.conftest import FakeClock

P = Phase
WATCH = WatchRules(duration_s=10.0, max_duration_s=60.0, report_within_s=60.0)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Release 1 is committed on a device whose reports arrive; release 2 is published."""
    bench = Bench(tmp_path)
    bench.link_up = True
    bench.install(1)
    bench.release(2, watch=WATCH)
    return bench


def begin_watch(bench: Bench) -> None:
    bench.want(2)
    bench.step()
    bench.until(P.WATCHING)


def lines(bench: Bench) -> list[tuple[str, str]]:
    return [(entry.gate, entry.verdict) for entry in bench.records.journal.entries(MODEL) if entry.release == 2]


def test_a_release_is_committed_by_the_report_that_its_watch_ended_well(bench: Bench):
    begin_watch(bench)
    bench.link_up = False
    for _ in range(40):
        bench.step()
    assert bench.phase is P.WATCHING
    said = reports.model_state(bench.updater, ModelStatus(), (), None)
    assert said.passed
    assert (said.phase, said.target) == (P.WATCHING, 2)

    bench.deliver()
    bench.step()

    assert bench.phase is P.STEADY
    assert bench.answer.outcome is Outcome.COMMITTED
    assert lines(bench) == [
        ("assignment", "wanted"), ("fetch", "passed"), ("trial", "passed"), ("activation", "passed"), ("watch", "passed"),
        ("watch", "committed"),
    ]  # fmt: skip


def test_a_report_of_before_the_end_of_the_watch_does_not_count(bench: Bench):
    begin_watch(bench)
    began = bench.clock.monotonic()
    bench.link_up = False
    for _ in range(40):
        bench.step()
    bench.deliveries.put(7, began)
    bench.deliveries.delivered(7)
    bench.step()

    assert bench.phase is P.WATCHING


def test_a_release_that_cuts_the_device_off_goes_back(bench: Bench):
    begin_watch(bench)
    bench.link_up = False

    assert bench.until(P.WAITING, steps=2000) == [P.WATCHING, P.ROLLING_BACK, P.WAITING]
    assert bench.serving == 1
    assert bench.store.selection(MODEL) == Selection(model=MODEL, active=Choice(version=1, variant="cpu"))
    assert (bench.answer.outcome, bench.answer.reason) == (Outcome.ROLLED_BACK, Reason.CANNOT_REPORT.value)
    assert bench.records.quarantine.entries(MODEL) == ()


def test_it_is_tried_again_ever_more_seldom(bench: Bench):
    """Each time the device is cut off while it serves, and heard again as soon as it is gone."""
    begin_watch(bench)
    waits = []
    for _ in range(3):
        bench.link_up = False
        bench.until(P.WAITING, steps=2000)
        bench.link_up = True
        began = bench.clock.wall()
        bench.step()
        assert bench.serving == 1
        bench.until(P.WATCHING, steps=2000)
        waits.append(round((bench.clock.wall() - began) / 100))
        assert bench.answer.outcome is Outcome.ROLLED_BACK

    assert waits == [3, 6, 12]
    assert bench.tried == ["crane:1", "crane:2"], "what was tried and is here is not tried again"


def test_an_outage_of_the_network_does_not_take_a_good_model_away_for_long(bench: Bench):
    """The network stays away after it went back: then it is not the release, and it serves again without a word of the fleet."""
    begin_watch(bench)
    bench.link_up = False
    bench.until(P.WAITING, steps=2000)
    gone = bench.clock.wall()
    bench.manifest_problem = AssertionError("nothing may be asked of the network")  # type: ignore[assignment]
    bench.until(P.STEADY, steps=2000)

    assert bench.serving == 2
    assert bench.answer.outcome is Outcome.COMMITTED
    assert bench.clock.wall() - gone < 400


def test_its_first_answer_does_not_stand_against_it_when_the_network_was_away(bench: Bench):
    begin_watch(bench)
    bench.link_up = False
    bench.until(P.WAITING, steps=2000)
    bench.until(P.WATCHING, steps=2000)

    assert (bench.answer.outcome, bench.answer.reason) == (Outcome.FAILED, Reason.CANNOT_REPORT.value)


def test_a_device_that_could_not_report_before_commits_alone(bench: Bench):
    bench.link_up = False
    bench.clock.pass_(1000)
    begin_watch(bench)

    assert bench.until(P.STEADY) == [P.WATCHING, P.STEADY]
    assert bench.serving == 2


def test_a_release_may_allow_it(bench: Bench):
    bench.release(3, watch=WATCH, offline_commit=True)
    bench.want(3)
    bench.step()
    bench.until(P.WATCHING)
    bench.link_up = False
    bench.until(P.STEADY)

    assert bench.serving == 3


def test_a_release_may_forbid_it_everywhere(bench: Bench):
    bench.link_up = False
    bench.clock.pass_(1000)
    bench.release(3, watch=WATCH, offline_commit=False)
    bench.want(3)
    bench.step()
    bench.until(P.WATCHING)
    bench.until(P.WAITING, steps=2000)

    assert bench.serving == 1


def test_what_is_held_by_hand_needs_nobody(bench: Bench):
    begin_watch(bench)
    bench.records.holds.hold(MODEL, 2)
    bench.link_up = False
    bench.until(P.STEADY)

    assert bench.serving == 2


def test_with_nothing_to_go_back_to_it_serves_on(tmp_path: Path):
    bench = Bench(tmp_path)
    bench.link_up = True
    bench.release(1, watch=WATCH)
    bench.want(1)
    bench.step()
    bench.until(P.WATCHING)
    bench.link_up = False
    bench.until(P.STEADY, steps=2000)

    assert bench.serving == 1


def test_a_new_process_asks_again(bench: Bench):
    begin_watch(bench)
    bench.link_up = False
    for _ in range(40):
        bench.step()
    bench.deliver()
    bench.again()
    told = bench.reports
    bench.step()
    assert bench.phase is P.WATCHING, "a report that was delivered to the process before is not known to this one"
    assert bench.reports > told

    bench.clock.pass_(0.1)
    bench.deliver()
    bench.step()
    assert bench.phase is P.STEADY


def test_it_still_goes_back_for_what_the_watch_sees_meanwhile(bench: Bench):
    from tests.sync.bench import numbers

    bench.serve.numbers[1] = numbers(1000)
    begin_watch(bench)
    bench.link_up = False
    for _ in range(40):
        bench.step()
    bench.serve.numbers[2] = numbers(50, run=50)
    bench.until(P.QUARANTINED)

    assert bench.answer.reason == Reason.ERROR_RATIO.value


def test_deliveries_know_the_newest_and_are_bounded(clock: FakeClock):
    deliveries = Deliveries(clock)
    assert not deliveries.lately(1e9)
    for item in range(100):
        deliveries.put(item, float(item))
    deliveries.delivered(1)
    assert not deliveries.since(0.0), "what was forgotten says nothing"
    deliveries.delivered(99)
    deliveries.delivered(100 - REMEMBERED)

    assert deliveries.since(98.0)
    assert not deliveries.since(99.0)
    clock.pass_(10)
    assert deliveries.lately(10.0)
    assert not deliveries.lately(9.0)


def test_what_went_back_unreported_and_was_damaged_meanwhile_is_fetched_again(bench: Bench):
    begin_watch(bench)
    bench.link_up = False
    bench.until(P.WAITING)
    bench.link_up = True
    manifest = bench.store.manifest(ReleaseRef(MODEL, 2))
    file = bench.store.file(manifest, manifest.variant("cpu").file)
    file.unlink()

    bench.until(P.FETCHING)
    bench.until(P.STEADY)

    assert file.exists()
    assert bench.answer.outcome is Outcome.COMMITTED
