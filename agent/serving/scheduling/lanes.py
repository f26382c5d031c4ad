"""The lane of one version: the jobs that wait for it, how many of its runs go on, and what may run next.

Nothing here locks or looks at a clock. The rules:
- Jobs run by priority, then by arrival. `instances` bounds how many runs go on at once.
- A job with a key waits until `due_s` for others of its key: for the version's delay, and for no more than half of the time it
  has.
- A closed lane runs nothing: its model is not in memory and comes back, or is being replaced.
- A batch is the first job, and those of its key that come next in order, as many as fit. It is ready when it is full, has a
  preferred size, or one of its jobs is due.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable
from enum import Enum
from typing import Any, Protocol

from agent.contract.manifest import Serving
from agent.serving.scheduling.demand import SequenceDemand
from agent.serving.scheduling.sequences import Sequence, Sequences

NEVER = float("inf")
LONG_RUN_S = 5e-3  # during a longer run the processors are divided several times: it gives way to all that is shorter
INLINE_RUN_S = 100e-6  # a run up to this long costs the next caller less than a switch of threads


class Place(Enum):
    """Where a job is. It goes from left to right only; GONE is also reached from WAITING, by its deadline or its caller."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    GONE = "gone"


NEW, WAITING, RUNNING, GONE = Place  # looking a member up at its class takes longer than all else that is done with it


class Caller(Protocol):
    """Whom a job is for. The scheduler calls `parked`, `unparked` and `granted` while it holds its lock: they do little, and
    ask it nothing.
    """

    @property
    def has_thread(self) -> bool:
        """Whether it waits in a thread of its own, which can do the work."""

    def parked(self, job: Job) -> None:
        """The job waits: from now on any thread may begin it."""

    def unparked(self, job: Job) -> None:
        """The job waits no more: whoever takes it out of the queue goes on with it."""

    def granted(self, work: list[Job]) -> None:
        """It has a thread, and is to do this work, of which its own job is part."""

    def deliver(self, answer: Any) -> None:
        """Its job, which was parked, is done by another thread, which calls this without a lock."""


class Job:
    """`level` is its priority, 1 the highest; all times are perf_counters. What is to be computed is `task`, the dataplane's."""

    __slots__ = (
        "arrived_s", "caller", "deadline_s", "demand", "due_s", "is_limited", "key", "lane", "level", "number", "place", "queued_s",
        "rows", "sequence", "task",
    )  # fmt: skip

    def __init__(self, lane: Lane, caller: Caller, task: Any, arrived_s: float) -> None:
        self.caller = caller
        self.task = task
        self.arrived_s = arrived_s
        self.queued_s = arrived_s
        self.due_s = arrived_s  # when it stops waiting for others to run with
        self.number = 0
        self.move(lane)

    def move(self, lane: Lane) -> None:
        """Begins anew on another lane; what its caller demands is to be told again."""
        self.lane = lane
        self.level = lane.rules.default_priority
        self.deadline_s = NEVER if lane.timeout_s is None else lane.deadline_s(self.arrived_s, None)
        self.is_limited = False  # whether the deadline is only for the time that the lane is closed
        self.demand: SequenceDemand | None = None
        self.sequence: Sequence[Job] | None = None
        self.key: Hashable = None  # jobs of equal keys may run together; None: alone
        self.rows = 1
        self.place = NEW

    def limit(self, deadline_s: float) -> None:
        """Limits a job that would wait for ever to this time, while its model is away."""
        if self.deadline_s == NEVER:
            self.deadline_s, self.is_limited = deadline_s, True

    def unlimited(self) -> None:
        if self.is_limited:
            self.deadline_s, self.is_limited = NEVER, False

    def wants(self, priority: int, timeout_s: float | None, sequence: SequenceDemand | None) -> None:
        """What its caller demands, where the model's rules leave room for it."""
        lane = self.lane
        if priority:
            self.level = min(priority, lane.rules.priority_levels)
        self.deadline_s = lane.deadline_s(self.arrived_s, timeout_s)
        if lane.sequences is not None:
            self.demand = sequence

    def __lt__(self, other: Job) -> bool:
        """Whether it is to run before the other: by priority, then by arrival."""
        return (self.level, self.number) < (other.level, other.number)


class Lane:
    """`cost_s` is what a run takes about, kept by whoever measures it."""

    def __init__(self, rules: Serving, sequences: Sequences[Job] | None = None) -> None:
        self.rules = rules
        self.sequences = sequences
        self.batches = rules.max_batch_size > 1
        self.delay_s = rules.max_delay_us / 1e6 if self.batches else 0.0
        self.timeout_s = rules.default_timeout_us / 1e6 or None
        self._bounded = bool(rules.instances or self.delay_s) or sequences is not None
        self.gated = self._bounded  # whether requests must ask the scheduler
        self.closed = False  # runs nothing for a while
        self.retired = False  # whose model is gone for good: what would wait here has to look for another
        self.cost_s = NEVER
        self.running = 0
        self.waiting = 0  # those in the queue, and those of sequences whose turn has not come
        self.with_threads = 0  # of them, those whose callers can do the work themselves
        self._queue: list[Job] = []
        self._rows: dict[Hashable, int] = {}  # of those in the queue that have a key
        self._due_s = NEVER

    def deadline_s(self, arrived_s: float, timeout_s: float | None) -> float:
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        return NEVER if timeout_s is None else arrived_s + timeout_s

    @property
    def room(self) -> bool:
        return not self.closed and (not self.rules.instances or self.running < self.rules.instances)

    def close(self) -> None:
        self.closed = self.gated = True

    def open(self) -> None:
        self.closed, self.gated = False, self._bounded
        behind = self.sequences.queued() if self.sequences is not None else ()
        for job in (*self._queue, *behind):
            job.unlimited()

    def first(self) -> Job | None:
        return self._queue[0] if self._queue else None

    @property
    def due_s(self) -> float:
        """When the first of its jobs waits for others no longer, with room for a run or without; NEVER while none is in the
        queue.
        """
        return self._due_s if self._queue else NEVER

    def put(self, job: Job, now_s: float) -> None:
        job.due_s = now_s
        queue = self._queue
        if job.key is not None and self.delay_s:
            spare_s = (job.deadline_s - self.cost_s - now_s) / 2  # the other half is for threads that come late
            job.due_s = now_s + max(0.0, min(self.delay_s, spare_s))
        if not queue or (queue[-1].level <= job.level and queue[-1].number < job.number):  # as nearly always
            queue.append(job)
        else:
            insort(queue, job)
        if job.key is not None:
            self._rows[job.key] = self._rows.get(job.key, 0) + job.rows
        self._due_s = min(self._due_s, job.due_s)

    def remove(self, job: Job) -> None:
        """Takes a job out of the queue. One of a sequence whose turn has not come is not in it."""
        if job in self._queue:
            self._queue.remove(job)
            if self.batches:
                self._forget([job])

    def ready(self, now_s: float, *, only_with_thread: bool = False) -> list[Job]:
        """What is to run next, empty while nothing is. `only_with_thread` looks at jobs whose callers can do it themselves."""
        if not self._queue or not self.room:
            return []
        if not self.batches and not only_with_thread:  # then nobody waits for others
            return [self._queue[0]]
        if now_s < self._due_s and not self._any_full():
            return []
        seen: set[Hashable] = set()
        for job in self._queue:
            if only_with_thread and not job.caller.has_thread:
                continue
            if job.key is None:
                return [job]
            if job.key in seen:
                continue
            seen.add(job.key)
            batch, full = self._batch(job)
            if full or any(other.due_s <= now_s for other in batch):
                return batch
        return []

    def begin(self, jobs: list[Job]) -> None:
        """Begins a run of them."""
        for job in jobs:
            self._queue.remove(job)
        if self.batches:
            self._forget(jobs)
        self.running += 1

    def _any_full(self) -> bool:
        preferred, most = self.rules.preferred_batch_sizes, self.rules.max_batch_size
        return any(rows >= most or rows in preferred for rows in self._rows.values())

    def _batch(self, first: Job) -> tuple[list[Job], bool]:
        """The jobs that run with `first`, and whether there is no reason to wait for more."""
        if not self.batches:
            return [first], True
        jobs: list[Job] = []
        rows, begun = 0, False
        for job in self._queue:
            begun = begun or job is first
            if not begun or job.key != first.key:
                continue
            if rows + job.rows > self.rules.max_batch_size:
                return jobs, True
            jobs.append(job)
            rows += job.rows
        return jobs, rows == self.rules.max_batch_size or rows in self.rules.preferred_batch_sizes

    def _forget(self, jobs: list[Job]) -> None:
        """What was gathered from them. Where nothing is gathered, whatever waits is due."""
        for job in jobs:
            if job.key is None:
                continue
            left = self._rows[job.key] - job.rows
            if left:
                self._rows[job.key] = left
            else:
                del self._rows[job.key]
        self._due_s = min([job.due_s for job in self._queue], default=NEVER)
