"""Rollouts in words, for events and messages."""

from __future__ import annotations

from agent.contract.scopes import EVERYBODY, Scope, text_of
from fleet_server.rollouts import rules
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


def everywhere(rows: list[RolloutRow]) -> str:
    """What follows when a rollout is complete."""
    if rows[0].mode == "shadow":
        return "nothing was installed"
    scope = rules.scope_of(rows[0])
    return f"every device{' in ' + text_of(scope) if scope else ''} is assigned {named(rows)}"


def reach(wave: Wave, scope: Scope = EVERYBODY) -> str:
    """Which devices of the scope a wave reaches."""
    within = f" in {text_of(scope)}" if scope else ""
    return f"{_reach(wave)}{within}"


def _reach(wave: Wave) -> str:
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
