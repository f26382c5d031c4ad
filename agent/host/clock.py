"""The time, and how far it can be believed on boards that wake up in 1970."""

from __future__ import annotations

import datetime as dt
import time
from pathlib import Path
from typing import Protocol

from agent.common import files
from agent.contract.codec import ContractError, decode, encode

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


class Machine(Protocol):
    """The machine's own clocks, or a test's."""

    def wall(self) -> float: ...
    def monotonic(self) -> float: ...


class LastKnownGood:
    """The latest time this device once had good reason to believe, kept on disk. `floor` is what is known without any memory,
    such as the day its certificate was issued.
    """

    def __init__(self, path: Path, floor: float = 0.0) -> None:
        self._path = path
        self._floor = floor
        self._written = _read(path)
        self.time = max(floor, self._written)

    def believable(self, now: float) -> bool:
        """Whether `now` (seconds since the epoch) is not before what is already known to be past."""
        return now >= self.time - STEP_BACK_S

    def advance(self, now: float) -> None:
        """Remembers `now`, which something signed proved to be past.  Raises: OSError."""
        self.time = max(self.time, now)
        if self.time - self._written >= WRITE_EVERY_S:
            self._write()

    def forget(self) -> None:
        """Back to what is known without any memory: whoever signed the rest is not believed any more.  Raises: OSError."""
        self.time = self._floor
        if self._written != self.time:
            self._write()

    def _write(self) -> None:
        files.make_directory(self._path.parent, mode=0o700)
        files.write(self._path, encode({"time": self.time}), mode=0o600)
        self._written = self.time


class SignedClock:
    """The machine's clock, but never before a time that something signed proved to be past. From such a time on it runs by the
    monotonic clock, so a board that wakes up in 1970 has the day of its last contact, and the right one after the next.
    It never believes the machine's clock less than that: a clock that is ahead cannot be told from time that has passed.
    """

    def __init__(self, machine: Machine, known: LastKnownGood) -> None:
        self._machine = machine
        self._known = known
        self._since = machine.monotonic()

    def wall(self) -> float:
        """Seconds since the epoch, UTC."""
        return max(self._machine.wall(), self._proved())

    def monotonic(self) -> float:
        return self._machine.monotonic()

    @property
    def known(self) -> float:
        """The latest time that something signed has proved to be past."""
        return self._known.time

    def unset(self) -> bool:
        """Whether the machine's own clock is behind what is proved: nothing may be judged by it."""
        return self._machine.wall() < self._proved() - STEP_BACK_S

    def learn(self, moment: float) -> None:
        """Something signed says that `moment` is past.  Raises: OSError."""
        if moment > self._proved():
            self._since = self._machine.monotonic()
            self._known.advance(moment)

    def forget(self) -> None:
        """What was learnt came from keys that are not trusted any more.  Raises: OSError."""
        self._since = self._machine.monotonic()
        self._known.forget()

    def _proved(self) -> float:
        return self._known.time + self._machine.monotonic() - self._since


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
