"""Times in which no rollout goes further: freezes of the fleet. Pure.

mon-fri 08:00-18:00 Europe/Berlin                    every week; UTC where no zone is named
2026-12-23T18:00+01:00/2027-01-02T08:00+01:00        once
"""

from __future__ import annotations

import datetime as dt
import zoneinfo
from collections.abc import Iterable

import msgspec

from agent.contract.assignment import Window, parse_window

MOST_ENDS = 1000
"""How many freezes that follow each other are looked through: more than a year of days. A fleet that is always frozen is so until the last."""


class Freeze(msgspec.Struct, frozen=True):
    """Either `window`, in the time of `zone`, or from `start` until before `end`, in seconds since the epoch."""

    window: Window | None = None
    zone: str = "UTC"
    start: float = 0.0
    end: float = 0.0

    def until(self, now: float) -> float | None:
        """When it ends, while it lasts; None while it does not."""
        if self.window is None:
            return self.end if self.start <= now < self.end else None
        zone = zoneinfo.ZoneInfo(self.zone)
        today = dt.datetime.fromtimestamp(now, zone).date()
        for day in (today, today - dt.timedelta(days=1)):
            if day.weekday() in self.window.days:
                start, end = _on(day, self.window.start_minute, zone), _on(day, _end_minute(self.window), zone)
                if start <= now < end:
                    return end
        return None


def _end_minute(window: Window) -> int:
    return window.end_minute + (1440 if window.end_minute <= window.start_minute else 0)


def _on(day: dt.date, minute: int, zone: dt.tzinfo) -> float:
    return (dt.datetime.combine(day, dt.time(), tzinfo=zone) + dt.timedelta(minutes=minute)).timestamp()


def parse(text: str) -> Freeze:
    """The freeze that `text` describes.

    Raises: ValueError with the expected spelling.
    """
    first, slash, second = text.strip().partition("/")
    if slash and "T" in first:
        start, end = moment(first), moment(second)
        if end <= start:
            raise ValueError(f"freeze {text!r} ends before it begins")
        return Freeze(start=start, end=end)
    words = text.split()
    zone = words.pop() if words and not words[-1][-1].isdigit() else "UTC"
    try:
        zoneinfo.ZoneInfo(zone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(
            f"freeze {text!r}: {zone!r} is no time zone that this machine knows; for example Europe/Berlin"
        ) from None
    try:
        return Freeze(window=parse_window(" ".join(words)), zone=zone)
    except ValueError:
        raise ValueError(
            f"freeze {text!r} is neither DAYS HH:MM-HH:MM ZONE, for example 'mon-fri 08:00-18:00 Europe/Berlin', nor two moments with "
            f"a stroke between them, for example '2026-12-23T18:00+01:00/2027-01-02T08:00+01:00'"
        ) from None


def moment(text: str) -> float:
    """Seconds since the epoch of an ISO 8601 moment with its zone.

    Raises: ValueError with the expected spelling.
    """
    try:
        found = dt.datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    except ValueError:
        raise ValueError(f"{text!r} is no moment such as 2026-12-23T18:00+01:00") from None
    if found.tzinfo is None:
        raise ValueError(f"{text!r} does not say its time zone; for example 2026-12-23T18:00+01:00, or 2026-12-23T17:00Z")
    return found.timestamp()


def said(at: float) -> str:
    """A moment in words, in UTC."""
    return dt.datetime.fromtimestamp(at, dt.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def frozen_until(freezes: Iterable[Freeze], now: float) -> float | None:
    """When the fleet is no longer frozen; None when it is not. Freezes that follow each other without a break count as one."""
    every, until = list(freezes), None
    for _ in range(MOST_ENDS):
        ends = [end for one in every if (end := one.until(now if until is None else until)) is not None]
        if not ends:
            break
        until = max(ends)
    return until
