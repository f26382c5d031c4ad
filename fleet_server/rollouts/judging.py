"""Judges running rollouts on what devices have said by now, and does what the verdicts ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet_server.devices.inventory import Inventory
from fleet_server.rollouts import exclusions, facts, gates, machine, rows, steps, teams, wording
from fleet_server.rollouts.assignment import FleetAssignment
from fleet_server.rollouts.decisions import Decision, Decisions
from fleet_server.rollouts.gates import Rules, Ruling, Verdict
from fleet_server.rollouts.ledger import Ledgers
from fleet_server.rollouts.machine import Event, State
from fleet_server.rollouts.tally import Tally
from fleet_server.sections import RolloutSettings
from fleet_server.storage.database import Database
from fleet_server.storage.models import ModelRow, RolloutRow, VerdictRow

WHAT_RUNS_JUDGED_S = 60.0
"""Between two readings of the refusals of what every device runs already: devices report as often, and nobody waits for it."""


STALLED = "bring the devices back, skip those that are known to be broken (`edge-fleet rollout skip`), or abort"


class Judge:
    """The gates of every rollout. Safe between threads."""

    def __init__(
        self, database: Database, inventory: Inventory, assignment: FleetAssignment, decisions: Decisions, settings: RolloutSettings,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._database, self._assignment = database, assignment
        self._decisions, self._settings, self._clock = decisions, settings, clock
        self._what_runs_judged = 0.0
        self.rules = Rules(
            min_devices=settings.min_devices, min_share=settings.min_share, missing_share=settings.missing_share,
            confidence=settings.confidence, time_limit_s=settings.time_limit_s,
        )  # fmt: skip
        """What a wave must keep where whoever starts its rollout says nothing else."""
        self.ledgers = Ledgers(inventory, clock)

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
        with self._decisions.lock:
            if self.ledgers.of(rollout_id) is None:
                self._prepare(rollout_id)
            try:
                while self._decided(rollout_id):
                    self._prepare(rollout_id)
            except BaseException:
                self.ledgers.forget_all()  # what they took for written down was not
                raise

    def _prepare(self, rollout_id: str) -> None:
        """Reads every device before the decision, where that must be, so that nobody who writes waits for it."""
        with self._database.reading() as session:
            row = rows.find(session, rollout_id)
            if State(row.state) not in machine.TERMINAL:
                for member in teams.of(session, row):
                    if not self.ledgers.are_current(facts.about(session, member)):
                        self.ledgers.tally(session, member)

    def _decided(self, rollout_id: str) -> bool:
        """Whether something was decided, so that the rollout must be judged anew."""
        with self._decisions.one() as decision:
            session = decision.session
            team = teams.of(session, rows.find(session, rollout_id))
            if State(team[0].state) in machine.TERMINAL:
                return False
            found = [(row, self.ledgers.tally(session, row)) for row in team]
            self.ledgers.write_told(session, [row.id for row in team])
            verdict = teams.verdict([(row, self.verdict(session, row, tally)) for row, tally in found])
            # What is bad for too many ends for everybody; only where the rollout may go on a class is excluded.
            if verdict.ruling is Ruling.FAIL or not self._exclude(decision, found):
                for row in team:
                    self._keep(decision, row, verdict)
                self._follow(decision, team, verdict)
            return bool(decision.events)

    def _judge_what_runs(self) -> None:
        """Devices that were away refuse what every device runs after its rollout is over: their class may be excluded then,
        too. Keeps no ledger of a rollout that is of no use any more.
        """
        if self._clock() - self._what_runs_judged < WHAT_RUNS_JUDGED_S:
            return
        self._what_runs_judged, least = self._clock(), self._settings.exclude_after
        with self._database.reading() as session:
            used, refused = set(session.scalars(select(RolloutRow.id).where(RolloutRow.state.in_(rows.ACTIVE)))), []
            for model in session.scalars(select(ModelRow).where(ModelRow.release.is_not(None))) if least else ():
                row = rows.came_to_all(session, model.model, model.release or 0)
                team = teams.of(session, row) if row is not None else []
                used |= {one.id for one in team}
                if any(self.ledgers.tally(session, one, over=True).refused(least) for one in team):
                    refused.append(team[0].id)
        for rollout_id in refused:
            with self._decisions.one() as decision:
                team = teams.of(decision.session, rows.find(decision.session, rollout_id))
                self._exclude(decision, [(one, self.ledgers.tally(decision.session, one, over=True)) for one in team])
        self.ledgers.keep(used)

    # -- verdicts ----------------------------------------------------------------------------------------------------------

    def _exclude(self, decision: Decision, said: list[tuple[RolloutRow, Tally]]) -> bool:
        """Excludes the hardware classes of which enough devices refuse a release of the team; whether there was one."""
        session, least = decision.session, self._settings.exclude_after
        excluded = False
        for row, tally in said:
            refused = tally.refused(least) if least and row.state != State.CREATED.value else {}
            if not refused:
                continue
            decided = exclusions.known(session, row.model, row.release)
            for kind, devices in exclusions.to_exclude(refused, tally.serving, least, self._settings.exclude_share).items():
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

    def verdict(self, session: Session, row: RolloutRow, tally: Tally) -> Verdict:
        """What the gate of the rollout's wave says of devices that stand like that."""
        counts = tally.counts
        if not counts.total and any(one.ended is None for one in exclusions.known(session, row.model, row.release).values()):
            return Verdict(Ruling.FAIL, "every kind of hardware in the wave is excluded from it", counts)
        return gates.judge(counts, tally.witnesses, rows.rules_of(row))

    def _keep(self, decision: Decision, row: RolloutRow, verdict: Verdict) -> None:
        """Stores the verdict, unless it is the last one. One whose ruling is that of the last one takes its place: a rollout has as
        many as its gates changed their minds, not as devices reported. A wave that comes to a halt is told to people.
        """
        session = decision.session
        last = session.scalar(select(VerdictRow).where(VerdictRow.rollout == row.id).order_by(VerdictRow.seq.desc()).limit(1))
        counts, evidence = msgspec.to_builtins(verdict.counts), msgspec.to_builtins(list(verdict.evidence))
        new = last is None or (last.wave, last.verdict) != (row.wave, verdict.ruling.value)
        if last is None or new:
            last = VerdictRow(rollout=row.id, wave=row.wave, verdict=verdict.ruling.value, counts={})
            session.add(last)
        elif (last.counts, last.evidence) == (counts, evidence):
            return
        last.at, last.why, last.counts, last.evidence = self._clock(), verdict.why, counts, evidence
        decision.verdict_changed = True
        if new and verdict.ruling is Ruling.STALL and row.team in {None, row.id}:
            message = f"{row.id} ({row.model}:{row.release}): wave {row.wave + 1} cannot pass: {verdict.why}; {STALLED}"
            _note(decision, row, "rollout_stalled", message)

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
