"""Who may have blobs, in which order they are asked, and who is left alone for a while. Nobody here is trusted: bytes are
believed when their hash is right.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import msgspec

from agent.contract.reasons import Reason
from agent.sync.ports import Clock
from agent.sync.problems import Problem

REST_FIRST_S = 5.0
REST_LONGEST_S = 600.0
"""How long a source that failed is left alone, doubling. A stick that was pulled out or a neighbour that is switched off costs
a timeout each time."""

TRIES_ON_WRONG_BYTES = 2
"""A proxy or a bad memory cell can damage bytes once; the same wrong bytes twice are what the source has."""

Reader = Callable[[int, int], AbstractContextManager[tuple[int, Iterator[bytes]]]]
"""(start, end) → where the bytes begin (`start`, or 0 from a source that has no ranges) and the bytes.  Raises: NotHere,
Problem."""


class Source(Protocol):
    """Somewhere untrusted that may have blobs."""

    name: str
    """What it is called in messages."""
    metered: bool
    """Whether its bytes come over a network: then they count against the bandwidth limit, the hours and the least
    throughput."""
    place: int
    """Lower ones are asked first; among equals whoever was of use last."""
    final: bool
    """Whether it is the fleet's own: what it has wrong twice is wrong."""

    def open(self, sha256: str) -> AbstractContextManager[Reader]:
        """Gives a reader for stretches of one blob, one after the other.  Raises: NotHere, Problem."""


class NotHere(Problem):
    """The source works and does not have this blob."""

    def __init__(self, message: str) -> None:
        super().__init__(Reason.DOWNLOAD_FAILED, message)


class WrongBytes(Problem):
    """The source sent bytes that are not the blob's."""

    def __init__(self, message: str) -> None:
        super().__init__(Reason.HASH_MISMATCH, message)


class _Health(msgspec.Struct):
    failures: int = 0
    rest_until: float = float("-inf")
    used: int = 0


class Sources:
    """All sources of this device, and how they did lately. Thread-safe. Remembered in memory only: a restart is a good time to
    ask everybody again.
    """

    def __init__(self, sources: Sequence[Source], clock: Clock) -> None:
        self._sources = list(sources)
        self._clock = clock
        self._lock = threading.Lock()
        self._health: dict[str, _Health] = {}
        self._uses = 0

    def add(self, source: Source) -> None:
        """Adds a source, such as a bundle that is being imported. It replaces one of the same name."""
        with self._lock:
            self._sources = [one for one in self._sources if one.name != source.name] + [source]

    def remove(self, name: str) -> None:
        with self._lock:
            self._sources = [one for one in self._sources if one.name != name]

    def order(self) -> list[Source]:
        """Whom to ask, in this order. Who failed lately is left out, unless nobody else of the fleet's own is left."""
        now = self._clock.monotonic()
        with self._lock:
            ranked = sorted(self._sources, key=lambda one: (one.place, -self._of(one).used))
            awake = [one for one in ranked if self._of(one).rest_until <= now]
            if any(one.final for one in awake):
                return awake
            return awake + [one for one in ranked if one.final]

    def worked(self, source: Source) -> None:
        with self._lock:
            health = self._of(source)
            self._uses += 1
            health.failures, health.rest_until, health.used = 0, float("-inf"), self._uses

    def failed(self, source: Source) -> None:
        with self._lock:
            health = self._of(source)
            health.rest_until = self._clock.monotonic() + min(REST_LONGEST_S, REST_FIRST_S * 2.0 ** min(health.failures, 16))
            health.failures += 1

    def _of(self, source: Source) -> _Health:
        return self._health.setdefault(source.name, _Health())


def verdict(problems: Sequence[tuple[Source, Problem]], what: str) -> Problem:
    """What it means that everybody failed. Wrong bytes only when the fleet's own source insists on them: from anybody else they
    say nothing about the release.
    """
    if len(problems) == 1 and (problems[0][0].final or problems[0][1].reason is not Reason.HASH_MISMATCH):
        return problems[0][1]
    finals = [problem for source, problem in problems if source.final] or [problem for _, problem in problems]
    wrong = [problem for problem in finals if problem.reason is Reason.HASH_MISMATCH]
    tried = [problem for problem in finals if not isinstance(problem, NotHere)]
    first = (wrong or tried or finals)[0]
    told = "; ".join(f"{source.name}: {problem.message}" for source, problem in problems)
    reason = first.reason
    if reason is Reason.HASH_MISMATCH and not any(source.final for source, _ in problems):
        reason = Reason.DOWNLOAD_FAILED
    wait_s = max(problem.wait_s for _, problem in problems)
    return Problem(reason, f"no source has {what} as it should be: {told}", first.evidence, wait_s=wait_s)
