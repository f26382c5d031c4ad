"""Rollouts in words, for events and messages."""

from __future__ import annotations

from fleet_server.rollouts.machine import Wave
from fleet_server.storage.models import RolloutRow


def named(rows: list[RolloutRow]) -> str:
    """The releases of a team: `arm:2 with eye:5`."""
    return " with ".join(f"{row.model}:{row.release}" for row in rows)


def previous(rows: list[RolloutRow]) -> str:
    """What devices run when the rollout is undone."""
    if rows[0].mode == "shadow":
        return "what serves, which was not touched"
    return ", ".join(f"{row.model}:{row.previous}" if row.previous else "no release" for row in rows)


def reach(wave: Wave) -> str:
    """Which devices a wave reaches."""
    if wave.everyone:
        return "every device"
    parts = [f"group {group}" for group in wave.groups]
    if wave.count:
        parts.append("one device" if wave.count == 1 else f"{wave.count} devices")
    elif wave.permille and not wave.groups:
        parts.append(f"{wave.permille / 10:g} % of the devices")
    elif wave.permille:
        parts.append(f"{wave.permille / 10:g} % of the others")
    return ", ".join(parts)
