"""ROLLING_BACK: what served before a team's releases serves again. Repeated until it is done; it cannot fail, only take
longer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from agent.contract.reasons import RETRYABLE, Reason
from agent.contract.reports import Answer, Outcome
from agent.sync.ports import Clock
from agent.sync.serving import ServeAway, ServeRefused, ServingPort
from agent.sync.updating import update
from agent.sync.updating.journal import Gate
from agent.sync.updating.model import AGAIN_S, AT_ONCE, ModelUpdate
from agent.sync.updating.quarantine import Quarantine
from agent.sync.updating.retention import Housekeeping
from agent.sync.updating.team import Team, Teams
from agent.sync.updating.update import Event, Failure, UpdateState

REFUSALS = 3
"""After this many refusals by `serve` a rollback ends all the same, so that a fixed release is not kept out."""

NOT_ITS_FAULT = RETRYABLE | {Reason.OPERATOR, Reason.WITHDRAWN}
"""A release that is rolled back for one of these is not refused later."""


class RollingBack:
    """Selects what served before, brings `serve` back to it, and remembers what proved bad."""

    def __init__(
        self,
        teams: Teams,
        quarantine: Quarantine,
        housekeeping: Housekeeping,
        serving: ServingPort,
        clock: Clock,
        jitter: Callable[[], float],
    ) -> None:
        self._teams = teams
        self._quarantine = quarantine
        self._housekeeping = housekeeping
        self._serving = serving
        self._clock = clock
        self._jitter = jitter

    def step(self, one: ModelUpdate) -> float:
        team = self._teams.led_by(one)
        if team is None:
            return AGAIN_S
        try:
            team.select(lambda member: member.selection_before)
        except OSError:
            self.protect_callers(team)
            raise
        try:
            if not team.alone:
                self._back_at_once(team)
            troubles = {member.model: self._back(member) for member in team.members}
        except ServeAway as away:
            one.problem = str(away)
            return AGAIN_S
        if None in troubles.values():
            return AGAIN_S
        self._end(team, {model: trouble or "" for model, trouble in troubles.items()})
        return AT_ONCE

    def protect_callers(self, team: Team) -> None:
        """Brings `serve` back although nothing can be written: what is selected on disk follows as soon as it can."""
        one = team.leader
        if not team.alone:
            one.asked(lambda: self._back_at_once(team))
        for member in team.members:
            before = member.state.before
            if before is not None:
                one.asked(lambda model=member.model, version=before.version: self._serving.rollback(model, version))  # type: ignore[misc]

    def _back_at_once(self, team: Team) -> None:
        """One switch for all. A `serve` that was started meanwhile loads what served before first. Where it has no room for
        that, each goes back by itself.  Raises: ServeAway.
        """
        befores = {one.model: one.state.before for one in team.members}
        with contextlib.suppress(ServeRefused):
            for model, before in befores.items():
                if before is not None:
                    self._serving.load(model, before.version, before.variant)
            self._serving.activate_team({model: before.version if before else None for model, before in befores.items()})

    def _back(self, one: ModelUpdate) -> str | None:
        """What went wrong, empty for nothing; None when it has to be tried again.  Raises: ServeAway."""
        before = one.state.before
        try:
            if before is not None:
                self._serving.rollback(one.model, before.version)
            else:
                self._serving.unload(one.model)
        except ServeRefused as refused:
            if before is not None:
                one.memory.rollback_refusals += 1
                if one.memory.rollback_refusals < REFUSALS:
                    return None
                return f"; and release {before.version} could not serve again: {refused}"
        return ""

    def _end(self, team: Team, troubles: Mapping[str, str]) -> None:
        was = {one.model: one.state for one in team.members}
        ends = {one.model: self._end_of(one, troubles[one.model]) for one in team.members}
        team.apply(lambda one: ends[one.model][0])
        for one in team.members:
            state, answer = was[one.model], ends[one.model][1]
            one.memory.rollback_refusals = 0
            before = f"release {state.before.version}" if state.before else "nothing"
            one.say("rolled-back", f"{before} serves again: {answer.message}", release=answer.release, reason=answer.reason)
            self._housekeeping.need_selected(one.model, one.state.target)

    def _end_of(self, one: ModelUpdate, trouble: str) -> tuple[UpdateState, Answer]:
        """The state after the rollback, and its answer. What proved bad is refused, durably, from here on."""
        state, now = one.state, self._clock.wall()
        failure = state.failure or Failure(reason=Reason.ACTIVATION_FAILED, message="interrupted")
        outcome = Outcome.ROLLED_BACK if state.activated else Outcome.REFUSED
        answer = one.answer(outcome, failure.reason, failure.message + trouble, failure.evidence)
        gate: Gate = "watch" if state.activated else "activation"
        one.note(gate, "rolled back", answer.message, reason=failure.reason, evidence=failure.evidence)
        if failure.reason is Reason.CANNOT_REPORT:
            return update.back_for_now(state, now, self._jitter(), answer), answer
        if failure.reason in NOT_ITS_FAULT:
            return update.rest(state, Event.BACK_ONLY, now, answer), answer
        self._quarantine.add(one.model, state.manifest or "", answer)
        return update.rest(state, Event.BACK, now, answer), answer
