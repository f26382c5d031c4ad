"""A prediction on its way through the queue."""

from __future__ import annotations

from collections.abc import Hashable
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from agent.serving.inference import SequenceDemand

if TYPE_CHECKING:
    from agent.serving.scheduling.lanes import Lane
    from agent.serving.scheduling.sequences import Sequence

NEVER = float("inf")


class Place(Enum):
    """Where a job is. It goes from left to right only; GONE is also reached from WAITING, by its deadline or its caller."""

    NEW = "new"
    WAITING = "waiting"
    TAKEN = "taken"
    GONE = "gone"


NEW, WAITING, TAKEN, GONE = Place  # looking a member up at its class takes longer than all else that is done with it


class Caller(Protocol):
    """Whom a job is for. The scheduler calls `parked`, `taken` and `granted` while it holds its lock: they do little, and ask it
    nothing.
    """

    @property
    def has_thread(self) -> bool:
        """Whether it waits in a thread of its own, which can do the work."""

    def parked(self, job: Job) -> None:
        """The job waits: from now on any thread may take it."""

    def taken(self, job: Job) -> None:
        """A thread does it now."""

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
        self.is_limited = False  # whether the deadline is only for the time that the lane is held
        self.demand: SequenceDemand | None = None
        self.sequence: Sequence | None = None
        self.key: Hashable = None  # jobs of equal keys may run together; None: alone
        self.rows = 1
        self.place = NEW

    def limit(self, deadline_s: float) -> None:
        """Of a job that would wait for ever: how long for a model that comes back."""
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
