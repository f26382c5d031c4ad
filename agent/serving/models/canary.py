"""A share of a model's requests answered by a candidate before it is active.

The rules:
- The share is exact over time and spread evenly: the n-th request is diverted when n times the golden ratio, without its whole
  part, is below it. No rhythm of callers meets the same version again and again.
- A request that names a version, by number or label, is never diverted.
- A sequence stays on the version where it began: the choice is made at its start and kept to its end. One that began before, or
  whose start was not seen, stays with the active version.
- When the candidate cannot be entered the active version answers.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any, Generic, Protocol, TypeVar

from agent.serving.scheduling.demand import SequenceDemand

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio
WHOLE = 1 << 64
MAX_SEQUENCES = 4096
"""Sequences on the candidate that are remembered; the oldest is forgotten first, and goes on with the active version."""


class Numbered(Protocol):
    @property
    def number(self) -> int: ...


V = TypeVar("V", bound=Numbered)


class Canary(Generic[V]):
    """Belongs to the version that is active while it lasts. Any thread may call `choose`."""

    def __init__(self, active: V, candidate: V, share: float) -> None:
        self.active = active
        self.candidate = candidate
        self._numbers = itertools.count(1)
        self._sequences: dict[int | str, None] = {}
        self._lock = threading.Lock()  # of the sequences
        self.change(share)

    def change(self, share: float) -> None:
        self.share = share
        self._below = int(share * WHOLE)

    def choose(self, sequence: SequenceDemand | None = None) -> V:
        """Which version answers the next request."""
        if sequence is None or sequence.start:
            diverted = next(self._numbers) * GOLDEN % WHOLE < self._below
        else:
            diverted = sequence.id in self._sequences
        if sequence is not None and (sequence.start or sequence.end):
            self._remember(sequence, diverted=diverted)
        return self.candidate if diverted else self.active

    def _remember(self, sequence: SequenceDemand, *, diverted: bool) -> None:
        with self._lock:
            self._sequences.pop(sequence.id, None)
            if diverted and not sequence.end:
                self._sequences[sequence.id] = None
                if len(self._sequences) > MAX_SEQUENCES:
                    del self._sequences[next(iter(self._sequences))]

    def document(self) -> dict[str, Any]:
        return {"version": self.candidate.number, "share": self.share}
