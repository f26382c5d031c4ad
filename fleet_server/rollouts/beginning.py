"""From a rollout that is written down to one that devices are told of: when it may begin, and with which waves."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from sqlalchemy.orm import Session

from agent.contract.assignment import EVERYONE
from fleet_server.errors import Invalid
from fleet_server.freezes import frozen_until, parse, said
from fleet_server.rollouts import planning, rows, rules, steps, wording
from fleet_server.rollouts.decisions import Decision
from fleet_server.rollouts.machine import Event, State, Wave
from fleet_server.sections import RolloutSettings
from fleet_server.storage.models import RolloutRow


class Calendar:
    """When rollouts may go further. `approval`: whether another person must approve each of them."""

    def __init__(self, settings: RolloutSettings) -> None:
        self._freezes = [parse(text) for text in settings.freeze]
        self.approval = settings.approval

    def frozen_until(self, now: float) -> float | None:
        """When the fleet is no longer frozen; None when it is not."""
        return frozen_until(self._freezes, now)

    def waits(self, row: RolloutRow, now: float) -> str | None:
        """What keeps a rollout from beginning, or from telling more devices, in words; None when nothing of time or people does."""
        state = State(row.state)
        if state is State.PROPOSED:
            return f"another person than {row.created_by} must approve it: edge-fleet rollout approve {row.id}"
        if state is State.SCHEDULED and row.starts is not None and now < row.starts:
            return f"begins at {said(row.starts)}"
        if state is State.RUNNING and now < bakes_until(row):
            return f"the wave passed and bakes until {said(bakes_until(row))}"
        goes_on = state is State.RUNNING and (rows.reach_of(row) < EVERYONE or row.passed is not None)
        if (state is State.SCHEDULED or goes_on) and (until := self.frozen_until(now)) is not None:
            return f"the fleet is frozen until {said(until)} (rollouts.freeze in fleet.yaml)"
        return None


def bakes_until(row: RolloutRow) -> float:
    """When the bake time of a wave that passed is over; 0 of one that did not."""
    return row.passed + rows.rules_of(row).bake_s if row.passed is not None else 0.0


def first_event(calendar: Calendar, starts: float | None, now: float) -> Event:
    """What happens to a rollout as soon as it is written down."""
    if calendar.approval:
        return Event.PROPOSE
    later = (starts is not None and now < starts) or calendar.frozen_until(now) is not None
    return Event.SCHEDULE if later else Event.START


def is_due(calendar: Calendar, row: RolloutRow, now: float) -> bool:
    """Whether a rollout that is scheduled begins now."""
    return State(row.state) is State.SCHEDULED and now >= (row.starts or 0.0) and calendar.frozen_until(now) is None


def begin(decision: Decision, team: Sequence[RolloutRow], now: float) -> None:
    """A team that was scheduled begins, with waves for the devices that there are now. One whose group has lost its last device meanwhile
    ends instead.
    """
    session, row = decision.session, team[0]
    try:
        resolve(session, team, rows.plan_of(row).waves)
    except Invalid as error:
        steps.apply(session, team, Event.ABORT, now, reason=str(error))
        message = f"{row.id} ({wording.named(list(team))}) did not begin: {error}"
        decision.note("rollout_aborted", message, model=row.model, release=row.release, reason="nobody")
        return
    steps.apply(session, team, Event.START, now)
    note_started(decision, list(team))


def resolve(session: Session, team: Sequence[RolloutRow], waves: Sequence[Wave]) -> None:
    """Writes down which slots these waves take.  Raises: Invalid."""
    reached = msgspec.to_builtins(planning.resolve(session, team[0], waves))
    for row in team:
        row.waves = reached


def note_started(decision: Decision, team: list[RolloutRow]) -> None:
    row = team[0]
    goes = "runs beside what serves on" if row.mode == "shadow" else "goes to"
    message = f"{row.id}: {wording.named(team)} {goes} {wording.reach(rows.plan_of(row).waves[0], rules.scope_of(row))}"
    decision.note("rollout_started", message, model=row.model, release=row.release)
