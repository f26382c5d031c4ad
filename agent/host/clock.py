"""The time, and how far it can be believed on boards that wake up in 1970."""

from __future__ import annotations

import datetime as dt
import time
from pathlib import Path

from agent.contract.codec import ContractError, decode, encode
from agent.host import files

STEP_BACK_S = 600.0
"""A clock may be set back this far without losing trust: time synchronisation corrects drift in both directions."""

WRITE_EVERY_S = 3600.0
"""How often the known time is written: it only has to tell a wrong year from a right one, and flash wears."""


class SystemClock:
    """The machine's own clocks."""

    def wall(self) -> float:
        """Seconds since the epoch, UTC."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds that never go back, from an arbitrary start."""
        return time.monotonic()


class LastKnownGood:
    """The latest time this device once had good reason to believe, kept on disk. `floor` is what is known without any memory,
    such as the day its certificate was issued.
    """

    def __init__(self, path: Path, floor: float = 0.0) -> None:
        self._path = path
        self._written = _read(path)
        self.time = max(floor, self._written)

    def believable(self, now: float) -> bool:
        """Whether `now` (seconds since the epoch) is not before what is already known to be past."""
        return now >= self.time - STEP_BACK_S

    def advance(self, now: float) -> None:
        """Remembers `now`, which was just proved by something signed and not yet expired.  Raises: OSError."""
        self.time = max(self.time, now)
        if self.time - self._written >= WRITE_EVERY_S:
            files.write(self._path, encode({"time": self.time}))
            self._written = self.time


def text(moment: float) -> str:
    """`2026-11-20 18:43:07 UTC`, for messages."""
    try:
        when = dt.datetime.fromtimestamp(moment, dt.timezone.utc)
    except (OverflowError, ValueError, OSError):
        return f"{moment:.0f} s since 1970"
    return when.strftime("%Y-%m-%d %H:%M:%S UTC")


def _read(path: Path) -> float:
    """The stored time; 0 when there is none or it is damaged, since it is only ever a lower bound."""
    try:
        return float(decode(path.read_bytes(), dict[str, float], limit_bytes=1024).get("time", 0.0))
    except (FileNotFoundError, ContractError):
        return 0.0
