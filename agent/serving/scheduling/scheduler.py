"""Which prediction runs next, and on which thread. It holds the one lock; it runs, sends and waits for nothing itself.

The rules:
- A version whose runs are bounded by nothing but threads is not asked about here while a thread is free: its lane stays empty.
- `admit` lets a job run at once in the thread that brings it, together with what is gathered for the same run, or makes it
  wait.
- What waits is run by threads of the loop, as many as are free, best first: by priority, then by arrival, over all models. A
  caller that waits in a thread of its own is granted its run there, and takes no thread of the loop.
- A job that waits ends at its deadline, or when its caller goes. Only what waits counts for the limits of queues.
- A lane is closed while its model comes back into memory or is replaced: jobs wait in it as ever, and none runs, until it opens
  again. A retired one accepts no more jobs: what waits in it is removed with `evacuate`, to be admitted elsewhere or refused.
- `next_s` is when the polling thread has to ask again; `wake` gets it out of its poll when that becomes earlier.
- What waits needs three things: time (its due), room (an instance) and a thread. Whoever brings the last of them decides: the
  polling thread for time, `finished` for room, `next_for_thread` for a thread. So each minds what it brings alone, whatever
  else is missing, and time is compared with the one reading of the clock that the decision before it was made with.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from agent.serving.answers import Refusal
from agent.serving.scheduling.lanes import GONE, INLINE_RUN_S, NEVER, RUNNING, WAITING, Job, Lane

RETRY = ((b"retry-after", b"1"),)
DEFAULT_LIMIT = 1024
AWAY_S = 30.0  # a model of a gigabyte is read from a slow card in that time
SPARE_DEADLINES = 64  # entries of jobs that wait no more; beyond it the heap is made anew

Clock = Callable[[], float]


class LaneRetired(Exception):
    """The version is gone for good; the model may have another one."""


class Scheduler:
    """`threads` is how many of the loop's may be at long work at once, `limit` how many jobs may wait in all lanes together."""

    def __init__(
        self, threads: int, *, limit: int = DEFAULT_LIMIT, away_s: float = AWAY_S, clock: Clock = time.perf_counter
    ) -> None:
        self.waiting = 0
        self._away_s = away_s  # how long a job without a timeout waits in a closed lane
        self.wake: Callable[[], None] = lambda: None
        self._clock = clock
        self._limit = limit
        self._lock = threading.Lock()
        self.free = threads  # of the loop, that have nothing to do
        self._others: deque[Any] = deque()
        self._moved_s = clock()  # when a thread last took or ended long work
        self._lanes: dict[Lane, None] = {}  # those in which jobs wait
        self._remembering: dict[Lane, None] = {}  # those that may hold sequences
        self._bounded: dict[int, Job] = {}  # by number, those that wait and have a deadline
        self.deadlines: list[tuple[float, int]] = []  # a heap; numbers of who waits no more lie in it for a while
        self._next_s = NEVER
        self.admitted = 0  # jobs, ever

    # -- by who brings a job ---------------------------------------------------------------------------------------------------

    def admit(self, job: Job, *, may_run: bool, polls: bool = False, goes_on: bool = False) -> list[Job]:
        """The jobs to run now in this thread, which then calls `finished`; empty when they wait. The job itself may be among
        them, or wait behind them. `polls`: this is the polling thread, which asks again by itself. `goes_on`: this thread asks
        for more when it is through.

        Raises: Refusal (400 unknown sequence, 503 the queue is full), LaneRetired.
        """
        with self._lock:
            now, lane = self._clock(), job.lane
            if lane.retired:
                raise LaneRetired
            if lane.closed:
                job.limit(now + self._away_s)
            self.admitted += 1
            job.number, job.queued_s = self.admitted, now
            turn = job.demand is None or self._join(job, now)
            if turn:
                lane.put(job, now)
            work = lane.ready(now) if turn and may_run else []
            if job not in work and (lane.waiting >= lane.rules.max_queue_size or self.waiting >= self._limit):
                lane.remove(job)
                if job.sequence is not None:
                    self._release(job, now, ran=False)
                raise Refusal(503, "Exceeds maximum queue size", headers=RETRY)
            self._count(job)
            waits = job not in work
            if waits:
                job.place = WAITING
                job.caller.parked(job)
                if job.deadline_s != NEVER:
                    self._bounded[job.number] = job
                    heapq.heappush(self.deadlines, (job.deadline_s, job.number))
            if work:
                self._begin(work, now)
            if waits and not polls:
                # What no thread is free for, and is too long for the one that polls, is run by whoever comes free, of which
                # this is one.
                covered = goes_on and not self.free and job.due_s <= now and lane.cost_s > INLINE_RUN_S
                self._tell(job.deadline_s if covered or not turn else min(job.due_s, job.deadline_s))
            return work

    def forget(self, lane: Lane, number: int | str) -> None:
        """A sequence that this version has begins anew on another one."""
        with self._lock:
            if lane.sequences is not None:
                lane.sequences.forget(number)

    def cancel(self, job: Job) -> bool:
        """Its caller has gone. False when it does not wait (any more)."""
        with self._lock:
            if job.place is not WAITING:
                return False
            self._drop(job, self._clock())
            return True

    def while_it_waits(self, job: Job, act: Callable[[], None]) -> None:
        """`act` if the job waits, and before any thread takes it."""
        with self._lock:
            if job.place is WAITING:
                act()

    # -- by who takes models out of memory and brings them back
    # ------------------------------------------------------------------

    def close_if_idle(self, lane: Lane, leave: Callable[[], bool]) -> bool:
        """Whether nobody waits in the lane, no sequence is under way, and `leave`, which closes it, says that nobody runs."""
        with self._lock:
            if lane.sequences is not None:
                lane.sequences.expire(self._clock())
                if len(lane.sequences):
                    return False
            return not lane.waiting and leave()

    def remembers(self, lane: Lane) -> bool:
        """Whether sequences of it are under way, so that it may not close."""
        if lane.sequences is None:
            return False
        with self._lock:
            lane.sequences.expire(self._clock())
            return bool(len(lane.sequences))

    def is_drained(self, lane: Lane, inside: Callable[[], int]) -> bool:
        """Whether those `inside` a closed lane's version all wait, and none runs."""
        with self._lock:
            return inside() <= lane.waiting

    def interrupt(self, lane: Lane) -> None:
        """Its model goes, and with it what sequences remember."""
        with self._lock:
            if lane.sequences is not None:
                lane.sequences.interrupt()

    def open(self, lane: Lane) -> None:
        """The model is there (again)."""
        with self._lock:
            lane.open()
            if lane.waiting:
                self._tell(self._clock())

    def evacuate(self, lane: Lane, *, retire: bool) -> list[Job]:
        """Takes out all that waits in a closed lane, in order of arrival. It belongs to the caller of this."""
        found = []
        with self._lock:
            lane.retired = lane.retired or retire
            now = self._clock()
            while (job := lane.first()) is not None:
                self._drop(job, now)
                found.append(job)
            for job in lane.sequences.queued() if lane.sequences is not None else ():  # behind one that runs
                self._drop(job, now)
                found.append(job)
        return sorted(found, key=lambda job: job.number)

    # -- by who runs jobs ------------------------------------------------------------------------------------------------------

    def finished(self, work: list[Job], *, goes_on: bool = False) -> None:
        """The run of these jobs has ended. Callers with threads are granted what can run now. `goes_on`: this thread asks for
        more.
        """
        with self._lock:
            now, lane = self._clock(), work[0].lane
            lane.running -= 1
            for job in work:
                job.place = GONE
                if job.sequence is not None:
                    self._release(job, now)
            if lane.with_threads:
                self._grant(lane, now)
            if (self.free or not goes_on) and lane.ready(now):
                self._tell(now)

    def next_for_thread(self) -> list[Job] | Any | None:
        """What a thread of the loop does next: jobs, or other work. None: nothing, and it is free from now on."""
        with self._lock:
            now = self._moved_s = self._clock()
            if self._others:
                return self._others.popleft()
            work = self._best(now)
            if not work:
                self.free += 1
                return None
            self._begin(work, now)
            return work

    # -- by the polling thread -------------------------------------------------------------------------------------------------

    def begin(self, other: object = None) -> bool:
        """Whether a thread was free and is now taken. Else `other`, if there is one, waits for the next that comes free: it is
        work other than a prediction, and goes before all jobs.
        """
        with self._lock:
            if self.free:
                self.free -= 1
                self._moved_s = self._clock()
                return True
            if other is not None:
                self._others.append(other)
            return False

    @property
    def crowded(self) -> bool:
        """Whether others wait, so that a thread should not go on with what only it knows of."""
        return bool(self.waiting or self._others)

    def next_for_poller(self) -> tuple[list[Job], bool]:
        """Jobs that the polling thread should do now; and whether they are long work, for which a thread was free and is now
        taken, or so cheap that it should do them without giving up the poll.
        """
        with self._lock:
            now = self._clock()
            for lane in list(self._lanes):
                self._grant(lane, now)
            work = self._best(now, NEVER if self.free else INLINE_RUN_S)
            if not work:
                self._next_s = self._when(now)
                return [], False
            self._begin(work, NEVER)
            if work[0].lane.cost_s <= INLINE_RUN_S:
                return work, False
            self.free -= 1
            self._moved_s = now
            return work, True

    def poll_s(self, longest_s: float) -> float:
        """How long the polling thread may poll, when it found nothing to do."""
        return max(0.0, min(longest_s, self._next_s - self._clock()))

    def polled(self) -> None:
        """It polls no more: whoever brings a job wakes it again."""
        self._next_s = NEVER

    def grant_ready(self) -> None:
        """Grants what has become ready by the passing of time to callers with threads; for where nobody polls."""
        with self._lock:
            now = self._clock()
            for lane in list(self._lanes):
                self._grant(lane, now)

    def patience_s(self, job: Job) -> float:
        """How long until time alone may change something for this job; for a caller that waits in a thread of its own."""
        now, due_s = self._clock(), job.lane.due_s
        return min(due_s if due_s > now else NEVER, job.deadline_s) - now

    def expired(self) -> list[Job]:
        """Takes out what has waited until its deadline."""
        if not self.deadlines or self.deadlines[0][0] > self._clock():
            return []
        found = []
        with self._lock:
            now = self._clock()
            while self.deadlines and self.deadlines[0][0] <= now:
                job = self._bounded.get(heapq.heappop(self.deadlines)[1])
                if job is not None and job.deadline_s <= now:
                    self._drop(job, now)
                    found.append(job)
        return found

    def sweep(self) -> None:
        """Ends sequences that were idle for too long; to be called now and then."""
        with self._lock:
            now = self._clock()
            for lane in list(self._remembering):
                assert lane.sequences is not None
                lane.sequences.expire(now)
                if not len(lane.sequences):
                    del self._remembering[lane]

    def stuck(self, patience_s: float) -> bool:
        """Whether something waits and no thread has come free for so long."""
        with self._lock:
            waits = self._others or self.waiting
            return bool(waits) and not self.free and self._clock() - self._moved_s > patience_s

    # -- with the lock held ----------------------------------------------------------------------------------------------------

    def _join(self, job: Job, now: float) -> bool:
        """Whether its sequence's turn is this job's."""
        assert job.demand is not None
        assert job.lane.sequences is not None
        turn = job.lane.sequences.join(job, job.demand, now)
        self._remembering[job.lane] = None
        return turn

    def _count(self, job: Job) -> None:
        lane = job.lane
        self.waiting += 1
        lane.waiting += 1
        lane.with_threads += job.caller.has_thread
        self._lanes[lane] = None

    def _uncount(self, job: Job) -> None:
        lane = job.lane
        self.waiting -= 1
        lane.waiting -= 1
        lane.with_threads -= job.caller.has_thread
        if not lane.waiting:
            del self._lanes[lane]
        if self._bounded:
            self._unbound(job)

    def _unbound(self, job: Job) -> None:
        self._bounded.pop(job.number, None)
        if len(self.deadlines) > SPARE_DEADLINES + 2 * self.waiting:
            self.deadlines = [entry for entry in self.deadlines if entry[1] in self._bounded]
            heapq.heapify(self.deadlines)

    def _begin(self, work: list[Job], now: float) -> None:
        """`now` is NEVER for the polling thread, which asks for what is left by itself."""
        lane = work[0].lane
        lane.begin(work)
        for job in work:
            self._uncount(job)
            parked = job.place is WAITING
            job.place = RUNNING
            if parked:
                job.caller.unparked(job)
        if now < lane.due_s < NEVER:  # of what is left; whoever polls may know only of an earlier one, and that has passed
            self._tell(lane.due_s)

    def _drop(self, job: Job, now: float) -> None:
        """Out of the queue without a run."""
        self._uncount(job)
        job.place = GONE
        job.lane.remove(job)
        job.caller.unparked(job)
        if job.sequence is not None:
            self._release(job, now, ran=False)
        if (
            job.key is not None and self.free and job.lane.ready(now)
        ):  # without it the others may have a size that waits for nobody
            self._tell(now)

    def _release(self, job: Job, now: float, *, ran: bool = True) -> None:
        """Gives the turn in its sequence on."""
        assert job.sequence is not None
        assert job.lane.sequences is not None
        following = job.lane.sequences.release(job, now, ran=ran)
        if following is not None:
            job.lane.put(following, now)
            self._tell(now)

    def _best(self, now: float, most_s: float = NEVER) -> list[Job]:
        """The best of what is ready, over all lanes whose runs take no more than `most_s`."""
        best: list[Job] = []
        for lane in self._lanes:
            if lane.cost_s > most_s:
                continue
            work = lane.ready(now)
            if work and (not best or work[0] < best[0]):
                best = work
        return best

    def _grant(self, lane: Lane, now: float) -> None:
        """Runs that callers can do in threads of their own: those that are next, and others while no thread of the loop is
        free.
        """
        while lane.with_threads and (work := lane.ready(now)):
            if not any(job.caller.has_thread for job in work):
                work = [] if self.free else lane.ready(now, only_with_thread=True)
            if not work:
                return
            self._begin(work, now)
            next(job.caller for job in work if job.caller.has_thread).granted(work)

    def _when(self, now: float) -> float:
        """When time alone changes what can be done, of what could not be done at `now`, the reading that was decided with. What
        only waits for a thread, or for a run to end, is decided by whoever brings that.
        """
        dues = [lane.due_s for lane in self._lanes]
        soonest = min((due for due in dues if due > now), default=NEVER)
        return min(soonest, self.deadlines[0][0] if self.deadlines else NEVER)

    def _tell(self, at_s: float) -> None:
        if at_s < self._next_s:
            self.wake()
