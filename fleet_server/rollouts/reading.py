"""What the rows of rollouts mean: for devices, for the next decision, and in words. Nothing here changes a row."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.contract.assignment import Rollout, parse_window
from agent.contract.codec import convert
from agent.contract.names import ReleaseRef
from fleet_server.errors import Conflict, NotFound
from fleet_server.releases import catalogue
from fleet_server.rollouts import classes, teams
from fleet_server.rollouts.machine import Plan, State, Wave
from fleet_server.storage.models import ModelRow, RolloutRow, Setting, VerdictRow

VERSION_SETTING = "assignment_version"


def plan_of(row: RolloutRow) -> Plan:
    waves = tuple(convert(wave, Wave) for wave in row.waves)
    return Plan(State(row.state), waves, row.wave, row.hold)


def as_devices_read_it(row: RolloutRow) -> Rollout:
    """The rollout as devices read it: the current wave and all before it."""
    reached = plan_of(row).waves[: row.wave + 1]
    groups = dict.fromkeys(group for wave in reached for group in wave.groups)
    permille = max(wave.permille for wave in reached)
    return Rollout(
        id=row.id, release=row.release, previous=row.previous, groups=tuple(groups), permille=permille,
        mode="shadow" if row.mode == "shadow" else "install", window=parse_window(row.window) if row.window else None,
        together=row.together,
    )  # fmt: skip


def named(rows: list[RolloutRow]) -> str:
    return " with ".join(f"{row.model}:{row.release}" for row in rows)


def previous(rows: list[RolloutRow]) -> str:
    if rows[0].mode == "shadow":
        return "what serves, which was not touched"
    return ", ".join(f"{row.model}:{row.previous}" if row.previous else "no release" for row in rows)


def reach(wave: Wave) -> str:
    if wave.everyone:
        return "every device"
    parts = [f"group {group}" for group in wave.groups]
    if wave.permille:
        parts.append(f"{wave.permille / 10:g} % of the devices")
    return ", ".join(parts)


def find(session: Session, rollout_id: str) -> RolloutRow:
    row = session.get(RolloutRow, rollout_id)
    if row is None:
        raise NotFound(f"there is no rollout {rollout_id!r}; `edge-fleet rollout list` shows them")
    return row


def before(session: Session, model: str, release: int) -> int | None:
    """What every device ran before `release` came to all of them; None when that was nothing or may not be run.

    Never what was left by going back to `release`: a second roll back would lead to the bad one again.
    """
    row = came_to_all(session, model, release)
    previous = row.previous if row is not None else None
    if previous is None or previous >= release or catalogue.find(session, ReleaseRef(model, previous)).withdrawn:
        return None
    return previous


def came_to_all(session: Session, model: str, release: int) -> RolloutRow | None:
    """The last rollout that brought the release to every device, with every gate passed."""
    query = select(RolloutRow).where(
        RolloutRow.model == model, RolloutRow.release == release, RolloutRow.state == State.COMPLETED.value,
        RolloutRow.mode == "install",
    )  # fmt: skip
    return session.scalar(query.order_by(RolloutRow.number.desc()).limit(1))


def refuse_forward(session: Session, row: ModelRow, to: int | None) -> None:
    """Raises: Conflict when `to` is newer than what everybody runs and never passed every gate."""
    if to is None or (row.release is not None and to <= row.release):
        return
    catalogue.find(session, ReleaseRef(row.model, to))
    if came_to_all(session, row.model, to) is None:
        raise Conflict(
            f"{row.model}:{to} is no earlier release; bring it out with `edge-fleet rollout start {row.model}:{to}`",
            code="not_earlier",
        )


def assignment_version(session: Session) -> int:
    setting = session.get(Setting, VERSION_SETTING)
    return int(setting.value) if setting is not None else 1


def verdict_view(row: VerdictRow) -> dict[str, Any]:
    return {
        "wave": row.wave, "at": row.at, "verdict": row.verdict, "why": row.why, "counts": row.counts, "evidence": row.evidence,
    }  # fmt: skip


def view(session: Session, row: RolloutRow) -> dict[str, Any]:
    last = session.scalar(select(VerdictRow).where(VerdictRow.rollout == row.id).order_by(VerdictRow.seq.desc()).limit(1))
    stopped = [one for one in classes.known(session, row.model, row.release).values() if one.rollout == row.id]
    together = [one for one in teams.of(session, row) if one.id != row.id]
    return {
        "id": row.id, "model": row.model, "release": row.release, "previous": row.previous, "mode": row.mode, "state": row.state,
        "wave": row.wave, "waves": row.waves, "hold": row.hold, "max_failures": row.max_failures, "created": row.created,
        "created_by": row.created_by, "updated": row.updated, "reason": row.reason,
        "verdict": verdict_view(last) if last is not None else None, "window": row.window,
        "together": [{"id": one.id, "model": one.model, "release": one.release} for one in together],
        "stopped": [classes.view(one) for one in stopped],
    }  # fmt: skip
