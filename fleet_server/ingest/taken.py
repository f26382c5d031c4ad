"""How much each device was sent lately, so that the one that asks for much and reads nothing can be found."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable

LATELY_S = 60.0
MUCH_BYTES = 32 * 1024 * 1024


class Taken:
    """One thread counts, another may ask."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._now: collections.Counter[str] = collections.Counter()
        self._before: collections.Counter[str] = collections.Counter()

    def count(self, device: str, size_bytes: int) -> None:
        if self._clock() - self._since > LATELY_S:
            self._before, self._now, self._since = self._now, collections.Counter(), self._clock()
        self._now[device] += size_bytes

    def most(self) -> str | None:
        """The device that was sent the most, if that was much; it is not named again before it was sent as much anew."""
        if self._clock() - self._since > 2 * LATELY_S:
            return None
        together = self._now.copy() + self._before.copy()
        device, size_bytes = next(iter(together.most_common(1)), ("", 0))
        if size_bytes < MUCH_BYTES:
            return None
        self._now.pop(device, None)
        self._before.pop(device, None)
        return device
