"""What the rows of rollouts and models mean for the next decision. Nothing here changes a row."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.contract.assignment import EVERYONE, Reach, Rollout, parse_window
from agent.contract.codec import convert
from agent.contract.names import ReleaseRef
from fleet_server.errors import NotFound
from fleet_server.releases import catalogue
from fleet_server.rollouts import machine
from fleet_server.rollouts.gates import Rules
from fleet_server.rollouts.machine import Plan, State, Wave
from fleet_server.storage.models import RolloutRow, Setting

VERSION_SETTING = "assignment_version"
"""The row of `settings` with the version of the assignment that the database makes necessary."""

ACTIVE = [state.value for state in machine.ACTIVE]
BEGUN = [state.value for state in machine.BEGUN]


def plan_of(row: RolloutRow) -> Plan:
    """Where the rollout stands in its waves."""
    waves = tuple(convert(wave, Wave) for wave in row.waves)
    return Plan(State(row.state), waves, row.wave, row.confirm)


def as_assigned(row: RolloutRow) -> Rollout:
    """The rollout as devices read it: all waves before the current one, and this one as far as it has come."""
    return _assigned(row, reach_of(row))


def goal_of(row: RolloutRow) -> Rollout:
    """The rollout as devices read it when its wave has told all of its devices."""
    return _assigned(row, EVERYONE)


def reach_of(row: RolloutRow) -> int:
    """The slot up to which the wave tells its devices by now; EVERYONE: all of them."""
    return EVERYONE if row.reach is None else row.reach


def _assigned(row: RolloutRow, reach: int) -> Rollout:
    *before, wave = plan_of(row).waves[: row.wave + 1]
    groups = dict.fromkeys(group for earlier in before for group in earlier.groups)
    new = [group for group in wave.groups if group not in groups] if reach else []
    return Rollout(
        id=row.id, release=row.release, previous=row.previous, groups=(*groups, *new),
        permille=max(min(wave.permille, reach), *(earlier.permille for earlier in before), 0),
        group_permille={} if reach >= EVERYONE else dict.fromkeys(new, reach), mode="shadow" if row.mode == "shadow" else "install", window=parse_window(row.window) if row.window else None,
        team=row.team, attempt=row.attempt, kept=tuple(convert(one, Reach) for one in row.kept or ()),
    )  # fmt: skip


def rules_of(row: RolloutRow) -> Rules:
    """What the waves of the rollout must keep to pass. One that was begun when only a number of failures ended it keeps to that."""
    said = row.rules or {"max_failures": row.max_failures, "shadow": row.mode == "shadow"}
    return convert({"failure_share": None, "growth": False} | said, Rules)


def find(session: Session, rollout_id: str) -> RolloutRow:
    """Raises: NotFound."""
    row = session.get(RolloutRow, rollout_id)
    if row is None:
        raise NotFound(f"there is no rollout {rollout_id!r}; `edge-fleet rollout list` shows them")
    return row


def active_of(session: Session, model: str, scope: str = "") -> RolloutRow | None:
    """The rollout of the model that is under way for exactly this scope (as it is stored); there is one at most."""
    query = select(RolloutRow).where(RolloutRow.model == model, RolloutRow.state.in_(ACTIVE), RolloutRow.scope == scope)
    return session.scalar(query)


def before(session: Session, model: str, release: int, scope: str = "") -> int | None:
    """What every device of the scope ran before `release` came to all of them; None when that was nothing or may not be run.

    Never a release that was left by a rollback to `release`: a second rollback would lead to the bad one again.
    """
    row = came_to_all(session, model, release, scope)
    previous = row.previous if row is not None else None
    if previous is None or previous >= release:
        return None
    found = catalogue.find(session, ReleaseRef(model, previous))
    return None if found.withdrawn or found.deleted else previous


def came_to_all(session: Session, model: str, release: int, scope: str = "") -> RolloutRow | None:
    """The last rollout that brought the release to every device of the scope: every gate passed, or an operator completed it."""
    query = select(RolloutRow).where(
        RolloutRow.model == model, RolloutRow.release == release, RolloutRow.state == State.COMPLETED.value,
        RolloutRow.mode == "install", RolloutRow.scope == scope,
    )  # fmt: skip
    return session.scalar(query.order_by(RolloutRow.number.desc()).limit(1))


def assignment_version(session: Session) -> int:
    """The version of the assignment that the database makes necessary. 1 is the empty one that `edge-fleet init` signs."""
    setting = session.get(Setting, VERSION_SETTING)
    return int(setting.value) if setting is not None else 1
