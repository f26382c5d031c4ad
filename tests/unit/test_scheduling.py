"""The order of what waits, without threads, sockets or models: a clock that is told the time."""

import weakref

import pytest

from agent.contract.manifest import Serving
from agent.serving.answers import Refusal
from agent.serving.scheduling.demand import SequenceDemand
from agent.serving.scheduling.lanes import Job, Lane
from agent.serving.scheduling.scheduler import Scheduler
from agent.serving.scheduling.sequences import Sequences
from agent.serving.scheduling.threads import busy_threads


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Connection:
    """A caller without a thread."""

    has_thread = False

    def __init__(self):
        self.is_parked = False

    def parked(self, job):
        self.is_parked = True

    def unparked(self, job):
        assert self.is_parked
        self.is_parked = False


class Waiter(Connection):
    has_thread = True
    work = ()

    def granted(self, work):
        self.work = work


class Bench:
    """A scheduler with all its threads free."""

    def __init__(self, threads=2, **options):
        self.clock = Clock()
        self.scheduler = Scheduler(threads, clock=self.clock, **options)
        self.woken = 0
        self.scheduler.wake = self._wake

    def _wake(self):
        self.woken += 1

    def job(self, lane, name=None, *, priority=0, timeout_s=None, key=None, rows=1, sequence=None, caller=None):
        job = Job(lane, caller or Connection(), name, self.clock.now)
        job.wants(priority, timeout_s, sequence)
        job.key, job.rows = key, rows
        return job

    def park(self, lane, name=None, **options):
        job = self.job(lane, name, **options)
        assert self.scheduler.admit(job, may_run=False) == []
        assert job.caller.is_parked
        return job

    def names(self, work):
        return [job.task for job in work]

    def run_all(self, threads=1):
        """The order in which threads that come free take what waits, one job after the other."""
        for _ in range(threads):
            self.scheduler.begin()
        order = []
        while work := self.scheduler.next_for_thread():
            order.append(self.names(work))
            self.scheduler.finished(work)
        return order


def refused(call):
    with pytest.raises(Refusal) as caught:
        call()
    return caught.value


def lane(sequences=None, **rules):
    made = Lane(Serving(**rules), sequences)
    made.cost_s = 0.05
    return made


def test_what_is_done_while_a_job_waits_is_done_before_any_thread_takes_it_or_not_at_all():
    bench = Bench()
    job = bench.park(Lane(Serving()))
    done = []
    bench.scheduler.while_it_waits(job, lambda: done.append(job.caller.is_parked))
    assert bench.scheduler.begin()
    assert bench.scheduler.next_for_thread() == [job]
    bench.scheduler.while_it_waits(job, lambda: done.append("taken"))
    assert done == [True]


def test_priority_then_arrival_over_all_models():
    bench, a, b = Bench(), lane(), lane(default_priority=2)
    for where, name, priority in ((a, "a5", 0), (a, "a7", 7), (b, "b2", 0), (a, "a1", 1), (a, "a5 too", 5), (b, "b10", 99)):
        bench.park(where, name, priority=priority)
    assert bench.run_all() == [["a1"], ["b2"], ["a5"], ["a5 too"], ["a7"], ["b10"]]


def test_limits_of_a_model_and_of_all():
    bench, a, b = Bench(limit=4), lane(max_queue_size=3), lane()
    for _ in range(3):
        bench.park(a)
    error = refused(lambda: bench.park(a))
    assert (error.status, str(error), error.headers) == (503, "Exceeds maximum queue size", ((b"retry-after", b"1"),))
    last = bench.park(b)
    assert refused(lambda: bench.park(b)).status == 503
    assert bench.scheduler.cancel(last)
    assert not bench.scheduler.cancel(last)
    bench.park(b)
    assert bench.scheduler.waiting == 4


def test_a_run_at_once_does_not_count_for_the_queue():
    bench, a = Bench(limit=1), lane(max_queue_size=1, instances=1)
    bench.scheduler.admit(first := bench.job(a), may_run=True)
    bench.park(a)
    assert refused(lambda: bench.scheduler.admit(bench.job(a), may_run=True)).status == 503
    bench.scheduler.finished([first])


def test_deadlines_end_what_waits_and_nothing_else():
    bench, a = Bench(), lane(default_timeout_us=2_000_000)
    early, default, late = bench.park(a, timeout_s=1.0), bench.park(a), bench.park(a, timeout_s=9.0)
    bench.scheduler.begin()
    bench.scheduler.begin()
    assert bench.scheduler.next_for_poller() == ([], False)
    assert bench.scheduler.poll_s(60.0) == pytest.approx(1.0)
    assert bench.scheduler.expired() == []
    bench.clock.now += 2.0
    assert bench.scheduler.expired() == [early, default]
    assert bench.scheduler.next_for_thread() == [late]
    bench.clock.now += 60
    assert bench.scheduler.expired() == []
    assert bench.scheduler.waiting == 0


def test_deadlines_of_what_waits_no_more_are_not_kept():
    bench, a = Bench(), lane()
    for _ in range(1000):
        bench.scheduler.cancel(bench.park(a, timeout_s=1e9))
    assert len(bench.scheduler.deadlines) < 100


def test_a_deadline_that_is_far_away_keeps_nothing_of_a_job_that_is_done():
    """Its arrays, and the body that they lie in, would be kept for as long."""
    bench, a, done = Bench(), lane(), []
    for _ in range(20):
        job = bench.park(a, Connection(), timeout_s=1e6)
        done.append(weakref.ref(job.task))
        assert bench.run_all() == [[job.task]]
        del job
    assert [ref() for ref in done] == [None] * 20
    assert bench.scheduler.expired() == []


@pytest.mark.parametrize("rows", [(0, 0), (0, 1), (1, 0)])
def test_requests_without_rows_wait_and_run_as_others(rows):
    """They have no key, as those whose rows are not known yet."""
    bench, a = Bench(), lane(max_batch_size=8, instances=1)
    for name, count in enumerate(rows):
        bench.park(a, name, rows=count)
    assert bench.run_all() == [[0], [1]]
    gone = [bench.park(a, name, rows=count) for name, count in enumerate(rows)]
    assert [bench.scheduler.cancel(job) for job in gone] == [True, True]


def test_instances_bound_one_model_and_leave_threads_to_others():
    bench, a, b = Bench(threads=3), lane(instances=1), lane()
    for name in ("a1", "a2"):
        bench.park(a, name)
    bench.park(b, "b1", priority=9)
    first, is_long = bench.scheduler.next_for_poller()
    assert (bench.names(first), is_long) == (["a1"], True)
    second, _ = bench.scheduler.next_for_poller()
    assert bench.names(second) == ["b1"]
    assert bench.scheduler.next_for_poller() == ([], False)
    bench.scheduler.finished(first)
    assert bench.names(bench.scheduler.next_for_thread()) == ["a2"]


def test_chores_go_first_and_take_threads():
    bench, a = Bench(threads=1), lane()
    assert bench.scheduler.begin("chore")
    assert not bench.scheduler.begin("another")
    bench.park(a, "job")
    assert bench.scheduler.next_for_poller() == ([], False)
    assert bench.scheduler.stuck(0.0) is False, "no time has passed"
    bench.clock.now += 1
    assert bench.scheduler.stuck(0.5)
    assert bench.scheduler.next_for_thread() == "another"
    assert not bench.scheduler.stuck(0.5)
    assert bench.names(bench.scheduler.next_for_thread()) == ["job"]
    assert bench.scheduler.next_for_thread() is None
    assert bench.scheduler.begin()


def test_cheap_work_is_done_by_who_polls_although_no_thread_is_free():
    bench, tiny = Bench(threads=1), lane(instances=1)
    bench.scheduler.begin()
    bench.park(tiny, "tiny")
    assert bench.scheduler.next_for_poller() == ([], False)
    tiny.cost_s = 20e-6
    work, is_long = bench.scheduler.next_for_poller()
    assert (bench.names(work), is_long) == (["tiny"], False)


def test_who_polls_is_woken_when_it_would_look_too_late():
    bench, a = Bench(threads=1), lane()
    bench.scheduler.begin()
    bench.park(a)
    assert bench.woken == 1
    bench.scheduler.next_for_poller()
    before = bench.woken
    bench.park(a, timeout_s=5.0)
    assert bench.woken == before + 1, "for its deadline"
    assert bench.scheduler.next_for_poller() == ([], False)
    bench.park(a, timeout_s=9.0)
    assert bench.woken == before + 2, "that it might run at once"
    before = bench.woken
    assert bench.scheduler.admit(bench.job(a), may_run=False, goes_on=True) == []
    assert bench.woken == before, "who brings it asks for more when it is through"
    a.cost_s = 20e-6
    assert bench.scheduler.admit(bench.job(a), may_run=False, goes_on=True) == []
    assert bench.woken == before + 1, "who polls does at once what is cheap"
    bench, a = Bench(threads=2), lane()
    bench.scheduler.begin()
    assert bench.scheduler.admit(bench.job(a), may_run=False, goes_on=True) == []
    assert bench.woken == 1, "a thread is free"
    assert busy_threads(1) == 1
    assert busy_threads(4) == 3


# -- batches -------------------------------------------------------------------------------------------------------------------


def test_a_batch_is_what_fits_of_one_key_in_order():
    bench, a = Bench(), lane(max_batch_size=4)
    for name, key, rows in (("x1", "x", 1), ("y1", "y", 3), ("x2", "x", 2), ("x3", "x", 2), ("x4", "x", 1), ("y2", "y", 1)):
        bench.park(a, name, key=key, rows=rows)
    assert bench.run_all() == [["x1", "x2"], ["y1", "y2"], ["x3", "x4"]]


def test_without_a_delay_nobody_waits_for_others():
    bench, a = Bench(), lane(max_batch_size=4)
    job = bench.job(a, key="x")
    assert bench.scheduler.admit(job, may_run=True) == [job]


def test_a_batch_waits_for_its_delay_or_until_it_is_full():
    bench, a = Bench(), lane(max_batch_size=4, max_delay_us=1_000_000)
    bench.park(a, "1", key="x")
    bench.clock.now += 0.6
    bench.park(a, "2", key="x")
    assert bench.scheduler.next_for_poller() == ([], False)
    assert bench.scheduler.poll_s(60.0) == pytest.approx(0.4)
    bench.clock.now += 0.41
    work, _ = bench.scheduler.next_for_poller()
    assert bench.names(work) == ["1", "2"]
    bench.park(a, "3", key="x", rows=3)
    job = bench.job(a, "4", key="x")
    assert bench.names(bench.scheduler.admit(job, may_run=True)) == ["3", "4"], "who fills it runs it"


def test_a_preferred_size_does_not_wait():
    bench, a = Bench(), lane(max_batch_size=8, max_delay_us=1_000_000, preferred_batch_sizes=(2, 4))
    bench.park(a, "1", key="x")
    assert bench.scheduler.next_for_poller() == ([], False)
    bench.park(a, "2", key="x")
    assert bench.names(bench.scheduler.next_for_poller()[0]) == ["1", "2"]


def test_a_batch_does_not_wait_beyond_a_members_deadline():
    bench, a = Bench(), lane(max_batch_size=8, max_delay_us=10_000_000)
    bench.park(a, "1", key="x")
    bench.park(a, "2", key="x", timeout_s=1.05)
    bench.scheduler.next_for_poller()
    assert bench.scheduler.poll_s(60.0) == pytest.approx(0.5), "half of the time that its run leaves"
    bench.clock.now += 0.5
    assert bench.names(bench.scheduler.next_for_poller()[0]) == ["1", "2"]


def test_another_shape_does_not_wait_behind_a_batch_that_waits():
    bench, a = Bench(), lane(max_batch_size=2, max_delay_us=1_000_000)
    bench.park(a, "x1", key="x")
    bench.park(a, "y1", key="y")
    bench.park(a, "y2", key="y")
    assert bench.names(bench.scheduler.next_for_poller()[0]) == ["y1", "y2"]
    assert bench.scheduler.next_for_poller() == ([], False)


def test_callers_with_threads_are_granted_their_runs():
    bench, a = Bench(threads=0), lane(instances=1)
    first = bench.job(a, caller=Waiter())
    assert bench.scheduler.admit(first, may_run=True) == [first]
    connection = bench.park(a, "connection")
    waiter = bench.park(a, "waiter", caller=Waiter())
    bench.scheduler.finished([first])
    assert waiter.caller.work == [waiter], "no thread of the loop is free for the one before"
    bench.scheduler.finished([waiter])
    bench.scheduler.cancel(connection)


def test_a_callers_batch_becomes_due_where_nobody_polls():
    bench, a = Bench(), lane(max_batch_size=4, max_delay_us=1_000_000)
    waiters = [bench.park(a, n, key="x", caller=Waiter()) for n in range(2)]
    bench.scheduler.grant_ready()
    assert waiters[0].caller.work == ()
    assert bench.scheduler.patience_s(waiters[0]) == pytest.approx(1.0)
    bench.clock.now += 1.0
    bench.scheduler.grant_ready()
    assert waiters[0].caller.work == waiters


# -- sequences -----------------------------------------------------------------------------------------------------------------


class State:
    def __init__(self):
        self.closed = False

    def close(self):
        self.closed = True


def remembering(**options):
    return lane(Sequences("m", 3, **{"limit": 2, "idle_s": 10.0, **options}))


def step(bench, where, name=None, number=1, *, start=False, end=False, **options):
    return bench.job(where, name, sequence=SequenceDemand(number, start, end), **options)


def ran(bench, job):
    """As the runner does."""
    sequence = job.sequence
    if job.demand.start:
        sequence.end()
        sequence.state = State()
    sequence.started = True
    if job.demand.end:
        sequence.end()
    bench.scheduler.finished([job])


def begin(bench, where, number=1):
    job = step(bench, where, number=number, start=True)
    assert bench.scheduler.admit(job, may_run=True) == [job]
    ran(bench, job)
    return job.sequence


def test_one_sequence_has_one_run_at_a_time_in_order_whatever_the_priorities():
    bench, a = Bench(threads=1), remembering()
    begin(bench, a)
    for name, priority in (("1", 9), ("2", 1), ("3", 5)):
        bench.scheduler.admit(step(bench, a, name, priority=priority), may_run=False)
    begin(bench, a, number=2)
    bench.scheduler.admit(step(bench, a, "other", number=2), may_run=False)
    assert bench.scheduler.begin()
    order = []
    while work := bench.scheduler.next_for_thread():
        order.append(work[0].task)
        ran(bench, work[0])
    assert order == ["other", "1", "2", "3"]


def test_only_what_was_started_goes_on():
    bench, a = Bench(), remembering()
    error = refused(lambda: bench.scheduler.admit(step(bench, a), may_run=True))
    assert error.status == 400
    assert "sequence 1 of model 'm' version 3 is not under way" in str(error)
    sequence = begin(bench, a)
    end = step(bench, a, end=True)
    assert bench.scheduler.admit(end, may_run=True)
    late = step(bench, a)
    assert refused(lambda: bench.scheduler.admit(late, may_run=True)).status == 400, "an end is under way"
    again = step(bench, a, start=True)
    assert bench.scheduler.admit(again, may_run=True) == []
    ran(bench, end)
    assert not sequence.started
    assert bench.scheduler.next_for_poller()[0] == [again]
    ran(bench, again)
    assert a.sequences.knows(1)


def test_a_start_that_never_ran_leaves_no_sequence():
    bench, a = Bench(threads=0), remembering()
    start = step(bench, a, start=True, timeout_s=1.0)
    bench.scheduler.admit(start, may_run=False)
    follower = step(bench, a)
    bench.scheduler.admit(follower, may_run=False)
    bench.clock.now += 2
    assert bench.scheduler.expired() == [start]
    assert bench.scheduler.cancel(follower)
    assert len(a.sequences) == 0
    assert bench.scheduler.waiting == 0


def test_an_end_that_never_ran_leaves_the_sequence():
    bench, a = Bench(threads=0), remembering()
    begin(bench, a)
    end = step(bench, a, end=True)
    bench.scheduler.admit(end, may_run=False)
    bench.scheduler.cancel(end)
    job = step(bench, a)
    assert bench.scheduler.admit(job, may_run=True) == [job]


def test_the_turn_goes_on_when_who_waits_in_the_middle_gives_up():
    bench, a = Bench(threads=1), remembering()
    begin(bench, a)
    first, second, third = (step(bench, a, n) for n in range(3))
    assert bench.scheduler.admit(first, may_run=True) == [first]
    for job in (second, third):
        bench.scheduler.admit(job, may_run=True)
    assert bench.scheduler.cancel(second)
    ran(bench, first)
    assert bench.scheduler.next_for_poller()[0] == [third]


def test_they_are_bounded_and_idle_ones_give_way():
    bench, a = Bench(), remembering()
    states = [begin(bench, a, number).state for number in (1, 2)]
    error = refused(lambda: begin(bench, a, 3))
    assert (error.status, error.headers) == (503, ((b"retry-after", b"1"),))
    bench.clock.now += 8
    job = step(bench, a, number=2)
    bench.scheduler.admit(job, may_run=True)
    ran(bench, job)
    bench.clock.now += 4
    begin(bench, a, 3)
    assert [s.closed for s in states] == [True, False]
    bench.clock.now += 20
    assert refused(lambda: bench.scheduler.admit(step(bench, a, number=2), may_run=True)).status == 400, "it has expired"
    bench.scheduler.sweep()
    assert len(a.sequences) == 0


def test_one_that_begins_elsewhere_is_forgotten():
    bench, a = Bench(), remembering()
    state = begin(bench, a).state
    bench.scheduler.forget(a, 1)
    assert state.closed
    assert not a.sequences.knows(1)
