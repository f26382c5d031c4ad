"""Judges running rollouts on what devices have said by now, and does what the verdicts ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet_server.config import RolloutSettings
from fleet_server.devices.inventory import Inventory
from fleet_server.rollouts import exclusions, facts, gates, machine, rows, steps, teams, wording
from fleet_server.rollouts.assignment import FleetAssignment
from fleet_server.rollouts.decisions import Decision, Decisions
from fleet_server.rollouts.gates import Fact, Ruling, Verdict
from fleet_server.rollouts.machine import Event, State
from fleet_server.storage.database import Database
from fleet_server.storage.models import ModelRow, RolloutRow, VerdictRow

WHAT_RUNS_JUDGED_S = 60.0
"""Between two readings of the refusals of what every device runs already: devices report as often, and nobody waits for it."""


class Judge:
    """The gates of every rollout. Safe between threads."""

    def __init__(
        self, database: Database, inventory: Inventory, assignment: FleetAssignment, decisions: Decisions, settings: RolloutSettings,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._database, self._inventory, self._assignment = database, inventory, assignment
        self._decisions, self._settings, self._clock = decisions, settings, clock
        self._what_runs_judged = 0.0

    def evaluate(self, models: Iterable[str] | None = None) -> None:
        """Judges the running rollouts of `models`, or all of them, and acts on it. All of them is what the timer asks for: then
        a decision whose signing failed (a full disk) is signed, too.
        """
        query = select(RolloutRow.id).where(RolloutRow.state.in_(rows.ACTIVE))
        if models is not None:
            query = query.where(RolloutRow.model.in_(list(models)))
        with self._decisions.lock:
            with self._database.reading() as session:
                found = list(session.scalars(query))
            for rollout_id in found:
                self.evaluate_one(rollout_id)
            if models is None:
                self._judge_what_runs()
                self._assignment.publish()

    def evaluate_one(self, rollout_id: str) -> None:
        """Judges one rollout, and again as long as gates pass: a wave whose devices all serve the release already takes no
        time.
        """
        while self._decided(rollout_id):
            pass

    def _decided(self, rollout_id: str) -> bool:
        """Whether something was decided, so that the rollout must be judged anew."""
        with self._decisions.one() as decision:
            session = decision.session
            team = teams.of(session, rows.find(session, rollout_id))
            if State(team[0].state) in machine.TERMINAL:
                return False
            found = [(row, facts.of_wave(session, row, self._inventory, self._clock())) for row in team]
            verdict = teams.verdict([(row, self._verdict(session, row, said)) for row, said in found])
            # What is bad for too many ends for everybody; only where the rollout may go on a class is excluded.
            if verdict.ruling is Ruling.FAIL or not self._exclude(decision, found):
                for row in team:
                    decision.verdict_changed |= self._keep(session, row, verdict)
                self._follow(decision, team, verdict)
            return bool(decision.events)

    def _judge_what_runs(self) -> None:
        """Devices that were away refuse what every device runs after its rollout is over: their class may be excluded then,
        too.
        """
        if self._clock() - self._what_runs_judged < WHAT_RUNS_JUDGED_S:
            return
        self._what_runs_judged = self._clock()
        with self._decisions.one() as decision:
            session = decision.session
            for model in session.scalars(select(ModelRow).where(ModelRow.release.is_not(None))):
                row = rows.came_to_all(session, model.model, model.release or 0)
                if row is not None:
                    self._exclude(decision, [(one, facts.refusals(session, one)) for one in teams.of(session, row)])

    def _exclude(self, decision: Decision, said: list[tuple[RolloutRow, list[Fact]]]) -> bool:
        """Excludes the hardware classes of which enough devices refuse a release of the team; whether there was one."""
        session, least = decision.session, self._settings.exclude_after
        excluded = False
        for row, found in said:
            refused = [fact for fact in found if exclusions.quarantined(fact)]
            if not least or len(refused) < least or row.state == State.CREATED.value:
                continue
            kinds = exclusions.classes_of(session, [fact.device for fact in refused])
            decided = exclusions.known(session, row.model, row.release)
            serving = exclusions.serving(session, row.model, row.release)
            for kind, devices in exclusions.to_exclude(refused, kinds, serving, least, self._settings.exclude_share).items():
                if kind in decided:
                    continue
                because = (
                    f"{len(devices)} devices quarantined {row.model}:{row.release}, the first of them for {devices[0].reason}"
                )
                for member, _ in said:  # none of a team switches where one of it may not
                    if kind not in exclusions.known(session, member.model, member.release):
                        exclusions.exclude(session, member, kind, devices, self._clock(), because)
                message = f"{row.id}: {kind} is excluded from {row.model}:{row.release}: {because}"
                _note(decision, row, "class_excluded", message, reason="class_excluded")
                excluded = True
        if excluded:
            steps.next_version(session)
        return excluded

    def _verdict(self, session: Session, row: RolloutRow, said: list[Fact]) -> Verdict:
        if not said and any(one.ended is None for one in exclusions.known(session, row.model, row.release).values()):
            return Verdict(Ruling.FAIL, "every kind of hardware in the wave is excluded from it", gates.Counts())
        return gates.judge(
            said, max_failures=row.max_failures, min_devices=self._settings.min_devices, shadow=row.mode == "shadow"
        )

    def _keep(self, session: Session, row: RolloutRow, verdict: Verdict) -> bool:
        """Stores the verdict unless it says what the last one of this wave said. Whether it did."""
        last = session.scalar(select(VerdictRow).where(VerdictRow.rollout == row.id).order_by(VerdictRow.seq.desc()).limit(1))
        counts = msgspec.to_builtins(verdict.counts)
        if last is not None and (last.wave, last.verdict, last.counts) == (row.wave, verdict.ruling.value, counts):
            return False
        session.add(
            VerdictRow(
                rollout=row.id, wave=row.wave, at=self._clock(), verdict=verdict.ruling.value, why=verdict.why, counts=counts,
                evidence=msgspec.to_builtins(verdict.evidence),
            )
        )  # fmt: skip
        return True

    def _follow(self, decision: Decision, team: list[RolloutRow], verdict: Verdict) -> None:
        """Does what the verdict asks for."""
        session, row, named = decision.session, team[0], wording.named(team)
        if row.state == State.CREATED.value:
            return
        if verdict.ruling is Ruling.FAIL:
            steps.apply(session, team, Event.GATE_FAILED, self._clock(), reason=verdict.why)
            message = f"{row.id} ({named}) was aborted: {verdict.why}; back to {wording.previous(team)}"
            _note(decision, row, "rollout_aborted", message, reason="gate_failed")
            return
        event = machine.on_pass(rows.plan_of(row)) if verdict.ruling is Ruling.PASS else None
        if event is None:
            return
        steps.apply(session, team, event, self._clock())
        if event is Event.LAST_WAVE_PASSED and row.mode == "shadow":
            said = f"{named} kept its rules beside what serves ({verdict.why}); nothing was installed"
            _note(decision, row, "rollout_completed", f"{row.id}: {said}")
        elif event is Event.LAST_WAVE_PASSED:
            _note(decision, row, "rollout_completed", f"{row.id}: every device is assigned {named} ({verdict.why})")
        elif event is Event.WAIT:
            message = f"{row.id} ({named}): wave {row.wave + 1} passed; waits for confirmation (promote)"
            _note(decision, row, "rollout_waiting", message)
        else:
            wave = wording.reach(rows.plan_of(row).waves[row.wave])
            _note(decision, row, "rollout_wave", f"{row.id} ({named}): wave {row.wave} passed; goes on to {wave}")


def _note(decision: Decision, row: RolloutRow, name: str, message: str, *, reason: str | None = None) -> None:
    decision.note(name, message, model=row.model, release=row.release, reason=reason)
