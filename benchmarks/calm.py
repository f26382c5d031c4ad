"""Measuring on a machine that has others beside it: what was seen while the host took the processors away is measured again.

A virtual machine's kernel knows how long its processors were ready and did not run, because their host gave the time to somebody else
(`steal` in /proc/stat). Such a window tells nothing about the programs in it: its 99th percentile is the host's. Which windows are
dropped is decided by that number alone, never by what was measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

LIMIT = 0.01  # of all processors' time
TRIES = 5  # of one measurement
PATIENCE_S = 300.0  # for measuring again, in one run of a benchmark
STAT = Path("/proc/stat")
COUNTED, STEAL = slice(1, 9), 7  # the numbers of its first line, and of these; the guests' times that follow are part of them


class Watch:
    """From its making on."""

    def __init__(self) -> None:
        self._began = _ticks()

    def stolen(self) -> float:
        """The part of all processors' time that the host took since then."""
        (stolen, every), (stolen_before, every_before) = _ticks(), self._began
        return (stolen - stolen_before) / max(1, every - every_before)


class Calm:
    """Called with a measurement, gives what that gave when the host left the machine alone."""

    def __init__(
        self, patience_s: float = PATIENCE_S, stolen: Callable[[], Callable[[], float]] = lambda: Watch().stolen
    ) -> None:
        self._patience_s = patience_s
        self._watch = stolen
        self.measurements = self.repeated = self.disturbed = 0

    def __call__(self, measure: Callable[[], T]) -> T:
        """Of up to TRIES attempts the first that was not disturbed, else the one that was disturbed least."""
        self.measurements += 1
        found, least = self._once(measure)
        for _ in range(TRIES - 1):
            if least <= LIMIT or self._patience_s <= 0:
                break
            began = time.monotonic()
            again, stolen = self._once(measure)
            self._patience_s -= time.monotonic() - began
            self.repeated += 1
            if stolen < least:
                found, least = again, stolen
        self.disturbed += least > LIMIT
        return found

    def _once(self, measure: Callable[[], T]) -> tuple[T, float]:
        stolen = self._watch()
        found = measure()
        return found, stolen()

    def __str__(self) -> str:
        return (
            f"{self.measurements} measurements, repeated {self.repeated} times because the host took more than {LIMIT:.0%} of the "
            f"processors' time; {self.disturbed} remain that it disturbed"
        )


def _ticks() -> tuple[int, int]:
    """(stolen, all) of all processors together. Both 0 where the kernel does not tell."""
    try:
        counted = [int(word) for word in STAT.read_text().split("\n", 1)[0].split()[COUNTED]]
        return counted[STEAL], sum(counted)
    except (OSError, IndexError, ValueError):
        return 0, 0
