"""Lanes whose model is away: jobs wait in them, and nothing of them runs."""

import pytest

from agent.contract.manifest import Serving
from agent.serving.scheduling.demand import SequenceDemand
from agent.serving.scheduling.lanes import NEVER, Lane, Place
from agent.serving.scheduling.scheduler import LaneRetired
from agent.serving.scheduling.sequences import Sequences
from tests.unit.test_scheduling import Bench


@pytest.fixture
def bench():
    return Bench(away_s=30.0)


def closed(**rules):
    lane = Lane(Serving(**rules))
    lane.close()
    return lane


def test_what_is_held_waits_and_runs_when_it_is_back(bench):
    lane = closed()
    assert lane.gated
    first, second = bench.park(lane, "first"), bench.park(lane, "second")
    assert bench.scheduler.next_for_poller() == ([], False)
    woken = bench.woken
    bench.scheduler.open(lane)
    assert bench.woken > woken
    assert not lane.gated
    assert bench.scheduler.next_for_poller()[0] == [first]
    assert bench.scheduler.next_for_poller()[0] == [second]


def test_who_has_no_timeout_waits_for_a_bounded_time_and_only_while_it_is_held(bench):
    lane = closed()
    job, patient = bench.park(lane, "job"), bench.park(lane, "patient", timeout_s=100.0)
    assert (job.deadline_s, patient.deadline_s) == (130.0, 200.0)
    bench.clock.now = 131.0
    assert bench.scheduler.expired() == [job]
    late = bench.park(lane, "late")
    bench.scheduler.open(lane)
    assert late.deadline_s == NEVER
    bench.clock.now = 1000.0
    assert bench.scheduler.expired() == [patient]


def test_who_waits_behind_another_of_its_sequence_has_no_limit_either_once_it_is_back(bench):
    lane = Lane(Serving(), Sequences("m", 1, limit=4, idle_s=60.0))
    lane.close()
    jobs = [bench.park(lane, n, sequence=SequenceDemand(7, start=n == 0)) for n in range(3)]
    assert [job.deadline_s for job in jobs] == [130.0] * 3
    bench.scheduler.open(lane)
    assert [job.deadline_s for job in jobs] == [NEVER] * 3
    assert bench.scheduler.next_for_poller()[0] == jobs[:1]
    bench.clock.now = 1000.0
    assert bench.scheduler.expired() == []
    bench.scheduler.finished(jobs[:1])
    assert bench.scheduler.next_for_poller()[0] == jobs[1:2]


def test_what_waits_is_taken_out_in_order_of_arrival(bench):
    lane = closed()
    jobs = [bench.park(lane, n, priority=5 - n) for n in range(4)]
    assert bench.scheduler.evacuate(lane, retire=True) == jobs
    assert bench.scheduler.waiting == lane.waiting == 0
    with pytest.raises(LaneRetired):
        bench.scheduler.admit(bench.job(lane), may_run=True)
    other = Lane(Serving())
    jobs[2].move(other)
    assert bench.scheduler.admit(jobs[2], may_run=True) == [jobs[2]]
    assert jobs[2].place is Place.RUNNING


def test_sequences_are_taken_out_whole(bench):
    lane = Lane(Serving(), Sequences("m", 1, limit=4, idle_s=60.0))
    lane.close()
    jobs = [bench.park(lane, n, sequence=SequenceDemand(7, start=n == 0)) for n in range(3)]
    assert bench.scheduler.evacuate(lane, retire=False) == jobs
    assert lane.waiting == 0
    assert len(lane.sequences) == 0


def test_who_waits_behind_a_run_is_taken_out_too(bench):
    """The turn would come in a lane that runs nothing any more."""
    lane = Lane(Serving(), Sequences("m", 1, limit=4, idle_s=60.0))
    running = bench.scheduler.admit(bench.job(lane, sequence=SequenceDemand(7, start=True)), may_run=True)
    behind = [bench.park(lane, n, sequence=SequenceDemand(7)) for n in range(3)]
    lane.close()
    assert bench.scheduler.evacuate(lane, retire=True) == behind
    bench.scheduler.finished(running)
    assert lane.waiting == bench.scheduler.waiting == 0


def test_only_who_is_alone_may_rest(bench):
    lane = Lane(Serving(), Sequences("m", 1, limit=4, idle_s=60.0))
    (job,) = bench.scheduler.admit(bench.job(lane, sequence=SequenceDemand(7, start=True)), may_run=True)
    job.sequence.started = True
    bench.scheduler.finished([job])
    assert not bench.scheduler.close_if_idle(lane, lambda: True), "a sequence is under way"
    assert bench.scheduler.remembers(lane)
    bench.clock.now += 61.0
    assert not bench.scheduler.remembers(lane)
    assert not bench.scheduler.close_if_idle(lane, lambda: False), "somebody is inside"
    assert bench.scheduler.close_if_idle(lane, lambda: True)


def test_drained_is_who_waits_and_nobody_else(bench):
    lane = Lane(Serving(instances=1))
    running = bench.scheduler.admit(bench.job(lane), may_run=True)
    bench.park(lane)
    lane.close()
    assert not bench.scheduler.is_drained(lane, lambda: 2)
    bench.scheduler.finished(running)
    assert bench.scheduler.is_drained(lane, lambda: 1)
