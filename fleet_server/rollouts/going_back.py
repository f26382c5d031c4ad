"""Which release devices go back to: what ran before, and never a newer one unless somebody says so."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.contract.names import ReleaseRef
from fleet_server.errors import Conflict, Invalid
from fleet_server.releases import catalogue
from fleet_server.rollouts import rows
from fleet_server.rollouts.machine import State
from fleet_server.storage.models import ModelRow, RolloutRow, RuleRow


def target(session: Session, row: ModelRow | RuleRow, active: RolloutRow | None, to: int | None, *, forward: bool) -> int:
    """The release that the devices of a rule (or every device) go back to: `to`, or what ran before. `active`: the rollout that ends by it.
    `forward`: it may be newer than what runs.

    Raises: Conflict when there is none, when it is newer, or when devices may not run it; Invalid.
    """
    if forward and to is None:
        raise Invalid("going forward needs the release to go to: --to VERSION --forward")
    found = to if to is not None else (row.release if active else row.previous)
    if to is not None:
        _refuse_unproven(session, row, to)
    if found is None:
        raise Conflict(f"there is no earlier release of {row.model!r} to go back to; name one with --to", code="no_previous")
    if row.release is not None and found > row.release and not forward:
        raise Conflict(_forward(row, found, named=to is not None), code="forward")
    if found == row.release and active is None:
        raise Conflict(f"every device is assigned {row.model}:{found} already", code="already_assigned")
    release = catalogue.find(session, ReleaseRef(row.model, found))
    if release.withdrawn:
        raise Conflict(f"release {row.model}:{found} was withdrawn; name another with --to", code="withdrawn")
    catalogue.refuse_deleted(session, ReleaseRef(row.model, found))
    return found


def _forward(row: ModelRow | RuleRow, found: int, *, named: bool) -> str:
    newer = f"{row.model}:{found} is newer than {row.model}:{row.release}, which every device is assigned"
    said, older = (newer, "") if named else (f"what ran before, {newer}", "; an older one is named with --to")
    return f"{said}: to go forward to it say `edge-fleet rollback {row.model} --to {found} --forward`{older}"


def _scope(row: ModelRow | RuleRow) -> str:
    return row.scope if isinstance(row, RuleRow) else ""


def _refuse_unproven(session: Session, row: ModelRow | RuleRow, to: int) -> None:
    """Raises: NotFound; Conflict when `to` is newer than what everybody runs and never passed every gate."""
    if row.release is not None and to <= row.release:
        return
    catalogue.find(session, ReleaseRef(row.model, to))
    if rows.came_to_all(session, row.model, to, _scope(row)) is None:
        raise Conflict(
            f"{row.model}:{to} is no earlier release; bring it out with `edge-fleet rollout start {row.model}:{to}`",
            code="not_earlier",
        )


def leave_withdrawn(session: Session, ref: ReleaseRef) -> None:
    """Takes the withdrawn release out of what devices run, or ran before, everywhere. Devices that ran it go to what ran before when that is
    older, else to the newest older release that all of them had. Else they run none, or follow the next rule where they had one of their
    own.
    """
    model = session.get(ModelRow, ref.model)
    found: list[ModelRow | RuleRow] = [*session.scalars(select(RuleRow).where(RuleRow.model == ref.model))]
    for row in [*found, *([model] if model is not None else [])]:
        if row.previous == ref.version:
            row.previous = None
        if row.release == ref.version:
            older = row.previous if row.previous is not None and row.previous < ref.version else None
            row.release = older if older is not None else _newest_older(session, ref, _scope(row))
            row.previous = rows.before(session, ref.model, row.release, _scope(row)) if row.release is not None else None
        if isinstance(row, RuleRow) and row.release is None:
            session.delete(row)


def _newest_older(session: Session, ref: ReleaseRef, scope: str) -> int | None:
    query = select(RolloutRow.release).where(
        RolloutRow.model == ref.model, RolloutRow.release < ref.version, RolloutRow.state == State.COMPLETED.value,
        RolloutRow.mode == "install", RolloutRow.scope == scope,
    )  # fmt: skip
    for number in session.scalars(query.distinct().order_by(RolloutRow.release.desc())):
        found = catalogue.find(session, ReleaseRef(ref.model, number))
        if not (found.withdrawn or found.deleted):
            return int(number)
    return None
