"""Sequences of one version: requests that share state, one after another.

The rules:
- A start begins anew, whatever was there under its id. Any other request needs a sequence that was started here.
- Requests of one sequence have their turns in the order they came; `current` is the one that has it.
- An end frees the sequence once it was answered. A start that could not be answered, or a run that failed, ends it too.
- There are `limit` at most. When a new one finds no room, those idle for `idle_s` expire; if there are none it is refused.

Nothing here locks: the scheduler's lock is held by whoever calls, except for `state`, which belongs to who has the turn.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Generic, Protocol, TypeVar

from agent.serving.answers import Refusal
from agent.serving.scheduling.demand import SequenceDemand
from runtimes.contract import ModelSequence

RETRY = ((b"retry-after", b"1"),)


class Member(Protocol):
    """A request of a sequence, with what it demands; None for one that belongs to no sequence."""

    demand: SequenceDemand | None
    sequence: Sequence[Any] | None


M = TypeVar("M", bound=Member)


class Sequence(Generic[M]):
    __slots__ = ("current", "ending", "id", "queue", "started", "state", "used_s")

    def __init__(self, number: int | str, now_s: float) -> None:
        self.id = number
        self.current: M | None = None
        self.queue: deque[M] = deque()  # those whose turn comes later
        self.state: ModelSequence | None = None
        self.started = False  # a start was answered and nothing ended it since
        self.ending = False  # an end waits or runs: only a start may come behind it
        self.used_s = now_s

    def end(self) -> None:
        """Forgets everything. By who has the turn, or by anybody while nobody has it."""
        self.started = False
        state, self.state = self.state, None
        if state is not None:
            state.close()


class Sequences(Generic[M]):
    """`model` and `version` name them in messages."""

    def __init__(self, model: str, version: int, *, limit: int, idle_s: float) -> None:
        self._what = f"model '{model}' version {version}"
        self.limit = limit
        self.idle_s = idle_s
        self._found: dict[int | str, Sequence[M]] = {}

    def __len__(self) -> int:
        return len(self._found)

    def knows(self, number: int | str) -> bool:
        return number in self._found

    def join(self, job: M, demand: SequenceDemand, now_s: float) -> bool:
        """Whether the job has its turn at once; else `release` of an earlier one gives it.  Raises: Refusal (400, 503)."""
        sequence = self._found.get(demand.id)
        if sequence is not None and sequence.current is None and now_s - sequence.used_s > self.idle_s:
            self._remove(sequence)
            sequence = None
        if demand.start:
            sequence = sequence or self._new(demand.id, now_s)
            sequence.ending = False
        elif sequence is None or sequence.ending:
            raise self.unknown(demand.id)
        if demand.end:
            sequence.ending = True
        job.sequence = sequence
        if sequence.current is None:
            sequence.current = job
            return True
        sequence.queue.append(job)
        return False

    def release(self, job: M, now_s: float, *, ran: bool = True) -> M | None:
        """The job has run, or goes without a run. The one whose turn comes by that, if any."""
        sequence = job.sequence
        assert sequence is not None
        assert job.demand is not None
        if job.demand.start and not ran:
            sequence.started = False
        following = None
        if sequence.current is job:
            sequence.used_s = now_s
            following = sequence.current = sequence.queue.popleft() if sequence.queue else None
        else:
            sequence.queue.remove(job)
        rest = [sequence.current, *sequence.queue]
        sequence.ending = next((j.demand.end for j in reversed(rest) if j is not None and j.demand is not None), False)
        if sequence.current is None and not sequence.started:
            self._remove(sequence)
        return following

    def queued(self) -> list[M]:
        """The members whose turn comes later."""
        return [job for sequence in self._found.values() for job in sequence.queue]

    def unknown(self, number: int | str) -> Refusal:
        return Refusal(
            400,
            f"sequence {number!r} of {self._what} is not under way: it was never started, has ended, failed, or was idle for "
            f"more than {self.idle_s:g} s, or it began on a version that is gone. Its first request must set sequence_start",
        )

    def expire(self, now_s: float) -> None:
        """Ends those that have been idle for too long."""
        for sequence in [s for s in self._found.values() if s.current is None and now_s - s.used_s > self.idle_s]:
            self._remove(sequence)

    def forget(self, number: int | str) -> None:
        """Ends one that begins anew elsewhere; while a request of it is under way it stays until it is idle."""
        sequence = self._found.get(number)
        if sequence is not None and sequence.current is None:
            self._remove(sequence)

    def close(self) -> None:
        for sequence in list(self._found.values()):
            self._remove(sequence)

    def interrupt(self) -> None:
        """Ends all of them, while none runs; those in which requests wait can be started anew."""
        for sequence in list(self._found.values()):
            if sequence.current is None:
                self._remove(sequence)
            else:
                sequence.end()

    def _new(self, number: int | str, now_s: float) -> Sequence[M]:
        if len(self._found) >= self.limit:
            self.expire(now_s)
        if len(self._found) >= self.limit:
            raise Refusal(
                503,
                f"all {self.limit} sequences of {self._what} are in use (serve.max_sequences): end one, or try again later",
                headers=RETRY,
            )
        sequence = self._found[number] = Sequence(number, now_s)
        return sequence

    def _remove(self, sequence: Sequence[M]) -> None:
        if self._found.get(sequence.id) is sequence:
            del self._found[sequence.id]
        sequence.end()
