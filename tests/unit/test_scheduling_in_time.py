"""No job waits past its due time while a thread, and room for a run, are free; and whatever has a deadline ends by it.

The threads of a loop are played with a clock that moves on at each look at it, as a real one does: one polls, some run what they
are given for as long as it takes, callers with threads of their own wait beside them.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from hypothesis import example, given, settings
from hypothesis import strategies as st

from agent.contract.manifest import Serving
from agent.serving.answers import Refusal
from agent.serving.scheduling.lanes import INLINE_RUN_S, NEVER, WAITING, Job, Lane
from agent.serving.scheduling.scheduler import Scheduler
from agent.serving.scheduling.threads import busy_threads

LONGEST_POLL_S = 5.0  # as the loop's
STEP_S = 3e-6  # how far the clock moves between two looks at it
LATE_S = 1e-3  # in how much of it everybody has looked
ALIVE_S = 0.1  # as the dataplane's callers in threads of their own


class Clock:
    def __init__(self):
        self.now = 50.0

    def __call__(self):
        self.now += STEP_S
        return self.now


@dataclass
class Kind:
    """A lane, and how long a run of it takes."""

    instances: int
    size: int
    delay_s: float
    run_s: float
    preferred: tuple[int, ...] = ()

    def lane(self):
        made = Lane(
            Serving(
                instances=self.instances,
                max_batch_size=self.size,
                max_delay_us=int(self.delay_s * 1e6) if self.size > 1 else 0,
                preferred_batch_sizes=tuple(p for p in self.preferred if p <= self.size) if self.size > 1 else (),
            )
        )
        made.cost_s = self.run_s
        return made


@dataclass
class Arrival:
    """`after_s` the one before; `way`: by whoever polls, by a thread that was free, by one at work, or by a caller with its own."""

    after_s: float
    lane: int
    way: str
    rows: int = 1
    key: int = 0
    priority: int = 0
    timeout_s: float | None = None
    leaves_s: float | None = None


class Caller:
    def __init__(self, *, has_thread=False):
        self.has_thread = has_thread
        self.work = None

    def parked(self, _job): ...

    def unparked(self, _job): ...

    def granted(self, work):
        self.work = work


@dataclass
class Play:
    """The loop, as `transport.loop` and `dataplane` do it, one event after the other."""

    threads: int
    kinds: list[Kind]
    clock: Clock = field(default_factory=Clock)
    events: list = field(default_factory=list)  # a heap of (time, number, what to do)
    jobs: list[Job] = field(default_factory=list)
    number: int = 0
    free: int = 0
    woken: bool = False
    poll_ends: float = NEVER
    late: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.free = busy_threads(self.threads)
        self.scheduler = Scheduler(self.free, clock=self.clock)
        self.scheduler.wake = self.wake
        self.lanes = [kind.lane() for kind in self.kinds]

    def wake(self):
        self.woken = True

    def at(self, when, act):
        self.number += 1
        heapq.heappush(self.events, (when, self.number, act))

    def run(self, arrivals):
        when = self.clock.now
        for arrival in arrivals:
            when += arrival.after_s
            self.at(when, lambda arrival=arrival: self.arrive(arrival))
        self.lead()
        while self.events or self.woken or self.poll_ends < NEVER:
            if self.woken:
                self.lead()
                self.judge(self.clock.now)
                continue
            soonest = self.events[0][0] if self.events else NEVER
            if min(soonest, self.poll_ends) == NEVER or (not self.events and not self.scheduler.waiting):
                break
            self.judge(min(soonest, self.poll_ends))
            if self.poll_ends <= soonest:
                self.clock.now = max(self.clock.now, self.poll_ends)
                self.lead()
            else:
                _, _, act = heapq.heappop(self.events)
                self.clock.now = max(self.clock.now, soonest)
                act()
        assert self.scheduler.waiting == 0
        assert not self.late

    def judge(self, until_s):
        """Nobody does anything before `until_s`: who should have been looked at before that?"""
        for job in self.jobs:
            if job.place is not WAITING or self.woken:
                continue
            if job.deadline_s + LATE_S < until_s:
                self.late.append(f"a job still waits {until_s - job.deadline_s:.4f} s after its deadline")
            thread = self.free or job.caller.has_thread
            if thread and job.lane.room and max(job.due_s, self.clock.now) + LATE_S < until_s and job is job.lane.first():
                self.late.append(f"a job waits until {until_s - job.due_s:.4f} s after its due time")
        assert not self.late

    # -- who polls -------------------------------------------------------------------------------------------------------------

    def lead(self):
        """Polls until nothing is to be done; then sleeps until `poll_ends`."""
        scheduler = self.scheduler
        scheduler.polled()
        while True:
            self.woken = False
            if not scheduler.waiting:
                self.poll_ends = self.clock.now + LONGEST_POLL_S
                return
            scheduler.expired()
            work, is_long = scheduler.next_for_poller()
            if is_long:
                self.free -= 1
                self.begin(work)
            elif work:
                self.clock.now += INLINE_RUN_S / 2
                scheduler.finished(work)
            else:
                self.poll_ends = self.clock.now + scheduler.poll_s(LONGEST_POLL_S)
                if self.poll_ends > self.clock.now + STEP_S:
                    return
            scheduler.polled()

    # -- threads at long work ----------------------------------------------------------------------------------------------------

    def begin(self, work):
        kind = self.kinds[self.lanes.index(work[0].lane)]
        self.at(self.clock.now + kind.run_s, lambda: self.end(work))

    def end(self, work):
        self.scheduler.finished(work, goes_on=True)
        self.go_on([])

    def go_on(self, work):
        """What a thread does with what it was given, and with nothing."""
        work = work or self.scheduler.next_for_thread()
        if work is None:
            self.free += 1
        else:
            self.begin(work)

    # -- who brings a job --------------------------------------------------------------------------------------------------------

    def arrive(self, arrival):
        lane = self.lanes[arrival.lane]
        job = Job(lane, Caller(has_thread=arrival.way == "own"), None, self.clock.now)
        job.wants(arrival.priority, arrival.timeout_s, None)
        if lane.batches:
            job.rows = min(arrival.rows, lane.rules.max_batch_size)
            job.key = arrival.key
        self.jobs.append(job)
        at_work = arrival.way == "busy" and self.free < busy_threads(self.threads)
        begun = arrival.way == "free" and self.scheduler.begin()
        self.free -= begun
        try:
            if begun:
                self.go_on(self.scheduler.admit(job, may_run=True))
            elif arrival.way == "own":
                self.wait(job, self.scheduler.admit(job, may_run=True))
            else:
                self.scheduler.admit(job, may_run=False, polls=not at_work, goes_on=at_work)
        except Refusal:
            if begun:
                self.go_on([])
            return
        if not begun and arrival.way != "own" and not at_work:
            self.lead()
        if arrival.leaves_s is not None:
            self.at(self.clock.now + arrival.leaves_s, lambda: self.scheduler.cancel(job))

    def wait(self, job, work):
        """In a thread of its own, until its job is done or gone."""
        if work:
            kind = self.kinds[self.lanes.index(work[0].lane)]
            self.at(self.clock.now + kind.run_s, lambda: self.ended_alone(job, work))
        elif job.place is WAITING or job.caller.work:
            patience_s = min(ALIVE_S, max(1e-4, self.scheduler.patience_s(job)))
            self.at(self.clock.now + patience_s, lambda: self.looked(job))

    def ended_alone(self, job, work):
        self.scheduler.finished(work)
        if job not in work:
            self.wait(job, [])

    def looked(self, job):
        if not job.caller.work:
            self.scheduler.expired()
            self.scheduler.grant_ready()
        work, job.caller.work = job.caller.work, None
        self.wait(job, work or [])


times = st.sampled_from([0.0, 20e-6, 1e-3, 2e-3, 10e-3, 0.05, 0.5])
kinds = st.builds(
    Kind,
    instances=st.integers(0, 2),
    size=st.sampled_from([1, 2, 4, 8]),
    delay_s=st.sampled_from([0.0, 1e-3, 20e-3, 1.0]),
    run_s=st.sampled_from([20e-6, 1e-3, 5e-3, 0.5]),
    preferred=st.sampled_from([(), (2,), (3, 4)]),
)
arrivals = st.builds(
    Arrival,
    after_s=times,
    lane=st.integers(0, 1),
    way=st.sampled_from(["polls", "free", "busy", "own"]),
    rows=st.integers(1, 4),
    key=st.integers(0, 1),
    priority=st.integers(0, 2),
    timeout_s=st.sampled_from([None, None, 5e-3, 0.2, 3.0]),
    leaves_s=st.sampled_from([None, None, None, 0.0, 2e-3, 0.3]),
)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.lists(kinds, min_size=2, max_size=2), st.lists(arrivals, min_size=1, max_size=20))
@example(  # the only instance is at work when the second one comes, and comes free before that one is due
    2,
    [Kind(1, 8, 1.0, 0.5), Kind(0, 1, 0.0, 0.05)],
    [Arrival(0.0, 0, "polls"), Arrival(1.01, 0, "polls")],
)
@example(  # a batch is taken from before another shape that is due later, of which nobody knew
    3,
    [Kind(0, 4, 20e-3, 0.5), Kind(0, 1, 0.0, 0.05)],
    [Arrival(0.0, 0, "own", 3), Arrival(1e-3, 0, "own", 2), Arrival(1e-3, 0, "busy", 1, 1)],
)
def test_no_job_waits_past_its_due_time_while_a_thread_is_free(threads, kinds, arrivals):
    Play(threads, kinds).run(arrivals)


def test_a_deadline_of_what_waits_behind_a_full_batch_is_kept():
    play = Play(3, [Kind(1, 4, 1.0, 0.5), Kind(0, 1, 0.0, 0.05)])
    play.run([Arrival(0.0, 0, "polls", 3), Arrival(1e-3, 0, "free", 2, timeout_s=0.01)])


def test_what_falls_due_between_two_looks_at_the_clock_is_not_forgotten():
    """For each of a thousand times at which a poll may end, a microsecond apart around the due time."""
    for step in range(1000):
        play = Play(2, [Kind(0, 8, 1e-3, 1e-3), Kind(0, 1, 0.0, 0.05)])
        play.at(play.clock.now + 0.5e-3 + step * 1e-6, play.wake)
        play.run([Arrival(0.0, 0, "polls")])
