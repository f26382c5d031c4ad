"""Which models leave memory for others. Pure: numbers go in, a choice comes out.

The rules:
- What was not used for longest goes first, and no more goes than is needed; what is used later stays if something older
  suffices.
- What was loaded less than `min_residency_s` ago stays, so that two models which do not fit together cannot drive each other
  out in turns.
- What may not go at all (pinned, in use, part of an update) is not among the residents that are `free` to go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Resident:
    """A model in memory. `used_s` is when it last answered or was loaded; both times are of one clock."""

    key: int
    size_bytes: int
    used_s: float
    loaded_s: float
    free: bool = True


def choose(residents: Sequence[Resident], excess_bytes: int, now_s: float, min_residency_s: float) -> list[Resident] | None:
    """Those to unload so that `excess_bytes` come free; None when that cannot be had now."""
    if excess_bytes <= 0:
        return []
    chosen: list[Resident] = []
    missing = excess_bytes
    for resident in sorted(residents, key=lambda r: r.used_s):
        if missing <= 0:
            break
        if resident.free and resident.size_bytes and now_s - resident.loaded_s >= min_residency_s:
            chosen.append(resident)
            missing -= resident.size_bytes
    if missing > 0:
        return None
    for resident in reversed(chosen[:-1]):
        if missing + resident.size_bytes <= 0:
            chosen.remove(resident)
            missing += resident.size_bytes
    return chosen


def soonest_s(residents: Sequence[Resident], now_s: float, min_residency_s: float) -> float:
    """How long until more may be unloaded because of the time that passes; 0 when time changes nothing."""
    left = [r.loaded_s + min_residency_s - now_s for r in residents if r.free and r.size_bytes]
    return min((wait for wait in left if wait > 0), default=0.0)
