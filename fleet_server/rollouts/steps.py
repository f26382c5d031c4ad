"""One step of a rollout, written down with what it makes of the model and of the assignment. In the caller's transaction."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy.orm import Session

from fleet_server.errors import Conflict, NotFound
from fleet_server.rollouts import machine, rows, rules
from fleet_server.rollouts.machine import Event, IllegalTransition, State
from fleet_server.storage import changes
from fleet_server.storage.models import Device, ModelRow, RolloutRow, Setting, SkippedDevice


def apply(session: Session, team: Iterable[RolloutRow], event: Event, now: float, *, reason: str = "") -> None:
    """Lets the event happen to each member.  Raises: Conflict when one of them is in a state in which it cannot."""
    for row in team:
        _apply(session, row, event, now, reason)


def _apply(session: Session, row: RolloutRow, event: Event, now: float, reason: str) -> None:
    try:
        plan = machine.step(rows.plan_of(row), event)
    except IllegalTransition as error:
        raise Conflict(f"rollout {row.id} ({row.model}:{row.release}): {error}", code="illegal_transition") from error
    row.state, row.wave, row.updated = plan.state.value, plan.wave, now
    row.reason = reason or row.reason
    if event in machine.BEGINS_WAVE:  # it tells nobody yet: that is what `grow` does, and what is signed then
        row.reach, row.grows, row.passed = 0, None, None
    if plan.state is State.COMPLETED and row.mode == "install":
        rules.settle(session, row)
    if plan.state in machine.TERMINAL:
        next_version(session)


def grow(session: Session, team: Iterable[RolloutRow], reach: int, grows: float | None) -> None:
    """The wave of each member tells its devices up to this slot from now on, and no more of them before `grows`."""
    for row in team:
        row.reach, row.grows = reach, grows
    next_version(session)


def skip(session: Session, team: Iterable[RolloutRow], device: str, by: str | None, now: float) -> None:
    """Takes the device out of the rollout's count, or lets it count again where `by` is None.  Raises: NotFound, Conflict."""
    row = session.get(Device, device)
    if row is None:
        raise NotFound(f"there is no device {device!r}; `edge-fleet rollout devices` shows those that a rollout reaches")
    for rollout in team:
        if State(rollout.state) in machine.TERMINAL:
            raise Conflict(f"rollout {rollout.id} is {rollout.state}; nobody is waited for any more", code="illegal_transition")
        skipped = session.get(SkippedDevice, (rollout.id, device))
        if (skipped is not None) is (by is not None):
            raise Conflict(
                f"{device} {'is skipped already' if by else 'is not skipped'} in rollout {rollout.id}", code="no_change"
            )
        if skipped is not None:
            session.delete(skipped)
        elif by is not None:
            session.add(SkippedDevice(rollout=rollout.id, device=device, at=now, by=by))
    row.change = changes.take(session)


def next_version(session: Session, *, at_least: int = 2) -> None:
    """Makes a newer assignment necessary. It is signed after the transaction."""
    setting = session.get(Setting, rows.VERSION_SETTING)
    if setting is None:
        session.add(Setting(name=rows.VERSION_SETTING, value=str(at_least)))
    else:
        setting.value = str(max(int(setting.value) + 1, at_least))
    session.flush()


def model_row(session: Session, model: str) -> ModelRow:
    """What the fleet runs of the model; a new row for one that was never rolled out."""
    row = session.get(ModelRow, model)
    if row is None:
        row = ModelRow(model=model, release=None, previous=None)
        session.add(row)
    return row
