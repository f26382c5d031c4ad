"""Judges running rollouts on what devices have said by now, and does what the verdicts ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.contract.assignment import EVERYONE
from agent.contract.codec import convert
from fleet_server.devices.inventory import Inventory
from fleet_server.rollouts import beginning, exclusions, facts, gates, growth, machine, rows, rules, steps, teams, wording
from fleet_server.rollouts.assignment import FleetAssignment
from fleet_server.rollouts.beginning import Calendar
from fleet_server.rollouts.decisions import Decision, Decisions
from fleet_server.rollouts.gates import Fact, Rules, Ruling, Verdict
from fleet_server.rollouts.health import HealthRules
from fleet_server.rollouts.ledger import Ledgers
from fleet_server.rollouts.machine import Event, State
from fleet_server.rollouts.tally import Tally
from fleet_server.rollouts.vitals import Vitals, VitalsLedgers, to_pause
from fleet_server.sections import RolloutSettings
from fleet_server.storage.database import Database
from fleet_server.storage.models import ModelRow, RolloutRow, RuleRow, VerdictRow

WHAT_RUNS_JUDGED_S = 60.0
"""Between two readings of the refusals of what every device runs already: devices report as often, and nobody waits for it."""


PAUSED = "let it go on (`edge-fleet rollout resume`) or abort it"
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
        self.calendar = Calendar(settings)
        self.rules = Rules(
            failure_share=settings.failure_share, min_devices=settings.min_devices, min_share=settings.min_share, missing_share=settings.missing_share,
            confidence=settings.confidence, time_limit_s=settings.time_limit_s,
        )  # fmt: skip
        """What a wave must keep where whoever starts its rollout says nothing else."""
        self.ledgers = Ledgers(inventory, clock)
        self.health = HealthRules()
        """And the health of its release."""
        self.vitals = VitalsLedgers()

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
            decided = False
            try:
                while self._decided(rollout_id):
                    decided = True
                    self._prepare(rollout_id)
            except BaseException:
                self.ledgers.forget_all()  # what they took for written down was not
                raise
            if decided:
                self._assignment.publish()  # steps of a wave are signed once, however many were decided

    def _prepare(self, rollout_id: str) -> None:
        """Reads every device before the decision, where that must be, so that nobody who writes waits for it."""
        with self._database.reading() as session:
            row = rows.find(session, rollout_id)
            if State(row.state) in machine.BEGUN:
                for member in teams.of(session, row):
                    if not self.ledgers.are_current(facts.about(session, member)):
                        self.ledgers.tally(session, member)

    def _decided(self, rollout_id: str) -> bool:
        """Whether something was decided, so that the rollout must be judged anew."""
        with self._decisions.one() as decision:
            session = decision.session
            team = teams.of(session, rows.find(session, rollout_id))
            if beginning.is_due(self.calendar, team[0], self._clock()):
                beginning.begin(decision, team, self._clock())
                return True
            if State(team[0].state) not in machine.BEGUN:
                return False
            found = [(row, self.ledgers.tally(session, row)) for row in team]
            self.ledgers.write_told(session, [row.id for row in team])
            verdict = teams.verdict([(row, self.verdict(session, row, tally)) for row, tally in found])
            verdict, vitals = self.vitals.judge(session, team, verdict)
            grown = False
            # What is bad for too many ends for everybody. Only where the rollout may go on, or goes well without it, a class is excluded.
            if (verdict.ruling is Ruling.FAIL and not self._goes_well_without(found)) or not self._exclude(decision, found):
                for row in team:
                    self._keep(decision, row, verdict, vitals)
                self._follow(decision, team, verdict)
                self._pause(decision, team, vitals)
                grown = self._grow(session, found, verdict)
            return grown or bool(decision.events)

    def _grow(self, session: Session, found: list[tuple[RolloutRow, Tally]], verdict: Verdict) -> bool:
        """Lets the wave tell more of its devices, where what was heard allows it; whether it does."""
        team, row, now = [row for row, _ in found], found[0][0], self._clock()
        going = State(row.state) is State.RUNNING and rows.reach_of(row) < EVERYONE and now >= (row.grows or 0.0)
        if not going or verdict.ruling is not Ruling.WAIT or self.calendar.frozen_until(now) is not None:
            return False
        reach = min(growth.next_reach(rows.reach_of(one), tally.ahead, _more(one, tally)) for one, tally in found)
        if reach <= rows.reach_of(row):
            return False
        rate, ahead = rows.rules_of(row).rate, found[0][1].ahead
        told = sum(ahead[rows.reach_of(row) : reach])
        steps.grow(session, team, reach, None if rate is None else now + 60.0 * told / rate)
        return True

    def _judge_what_runs(self) -> None:
        """Devices that were away refuse what every device runs after its rollout is over: their class may be excluded then,
        too. Keeps no ledger of a rollout that is of no use any more.
        """
        if self._clock() - self._what_runs_judged < WHAT_RUNS_JUDGED_S:
            return
        self._what_runs_judged, least = self._clock(), self._settings.exclude_after
        with self._database.reading() as session:
            used, refused = set(session.scalars(select(RolloutRow.id).where(RolloutRow.state.in_(rows.ACTIVE)))), []
            what_runs = [*session.scalars(select(ModelRow)), *session.scalars(select(RuleRow))] if least else []
            for base in what_runs:
                scope = base.scope if isinstance(base, RuleRow) else ""
                row = rows.came_to_all(session, base.model, base.release, scope) if base.release is not None else None
                team = teams.of(session, row) if row is not None else []
                used |= {one.id for one in team}
                if any(self.ledgers.tally(session, one, over=True).refused(least) for one in team):
                    refused.append(team[0].id)
        for rollout_id in refused:
            with self._decisions.one() as decision:
                team = teams.of(decision.session, rows.find(decision.session, rollout_id))
                self._exclude(decision, [(one, self.ledgers.tally(decision.session, one, over=True)) for one in team])
        self.ledgers.keep(used)
        self.vitals.keep(used)

    # -- verdicts ----------------------------------------------------------------------------------------------------------

    def _exclude(self, decision: Decision, said: list[tuple[RolloutRow, Tally]]) -> bool:
        """Excludes the hardware classes of which enough devices refuse a release of the team; whether there was one."""
        session, excluded = decision.session, False
        for row, tally in said:
            decided = exclusions.known(session, row.model, row.release)
            for kind, devices in self._excludable(row, tally).items():
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

    def _excludable(self, row: RolloutRow, tally: Tally) -> dict[str, list[Fact]]:
        """Hardware classes that have trouble of their own with the release → their devices that refuse it."""
        least = self._settings.exclude_after
        refused = tally.refused(least) if least else {}
        if not refused:
            return {}
        serving = {kind: len(devices) + tally.serving.get(kind, 0) for kind, devices in refused.items()}
        asked = {kind: max(number, tally.asked.get(kind, 0)) for kind, number in serving.items()}
        stands_out = gates.stands_out(asked, rows.rules_of(row))
        return exclusions.to_exclude(refused, tally.serving, least, self._settings.exclude_share, stands_out)

    def _goes_well_without(self, found: list[tuple[RolloutRow, Tally]]) -> bool:
        """Whether classes can be excluded without which no gate of a team fails, and some device of another class does well."""
        kinds = {kind for row, tally in found for kind in self._excludable(row, tally)}
        return bool(kinds) and all(
            gates.goes_well(tally.counts, tally.without(kinds), rows.rules_of(row)) for row, tally in found
        )

    def verdict(self, session: Session, row: RolloutRow, tally: Tally) -> Verdict:
        """What the gate of the rollout's wave says of devices that stand like that."""
        counts = tally.counts
        if not counts.total and any(one.ended is None for one in exclusions.known(session, row.model, row.release).values()):
            return Verdict(Ruling.FAIL, "every kind of hardware in the wave is excluded from it", counts)
        return gates.judge(counts, tally.witnesses, rows.rules_of(row), whole=rows.reach_of(row) >= EVERYONE)

    def _keep(self, decision: Decision, row: RolloutRow, verdict: Verdict, vitals: Vitals | None) -> None:
        """Stores the verdict, unless it is the last one. One whose ruling is that of the last one takes its place: a rollout has as
        many as its gates changed their minds, not as devices reported. A wave that comes to a halt is told to people.
        """
        session = decision.session
        last = session.scalar(select(VerdictRow).where(VerdictRow.rollout == row.id).order_by(VerdictRow.seq.desc()).limit(1))
        counts, evidence = msgspec.to_builtins(verdict.counts), msgspec.to_builtins(list(verdict.evidence))
        health = msgspec.to_builtins(vitals)
        new = last is None or (last.wave, last.verdict) != (row.wave, verdict.ruling.value)
        if last is None or new:
            last = VerdictRow(rollout=row.id, wave=row.wave, verdict=verdict.ruling.value, counts={})
            session.add(last)
        elif (last.counts, last.evidence, last.health) == (counts, evidence, health):
            return
        last.at, last.why, last.counts, last.evidence, last.health = self._clock(), verdict.why, counts, evidence, health
        decision.verdict_changed = True
        if new and verdict.ruling is Ruling.STALL and row.team in {None, row.id}:
            message = f"{row.id} ({row.model}:{row.release}): wave {row.wave + 1} cannot pass: {verdict.why}; {STALLED}"
            _note(decision, row, "rollout_stalled", message)

    def _follow(self, decision: Decision, team: list[RolloutRow], verdict: Verdict) -> None:
        """Does what the verdict asks for."""
        session, row, named = decision.session, team[0], wording.named(team)
        if verdict.ruling is Ruling.FAIL:
            steps.apply(session, team, Event.GATE_FAILED, self._clock(), reason=verdict.why)
            message = f"{row.id} ({named}) was aborted: {verdict.why}; back to {wording.previous(team)}"
            _note(decision, row, "rollout_aborted", message, reason="gate_failed")
            return
        event = machine.on_pass(rows.plan_of(row)) if verdict.ruling is Ruling.PASS else None
        if verdict.ruling is Ruling.STALL:
            self._bake(team, None)
        if event is None or not self._is_baked(team, event):
            return
        steps.apply(session, team, event, self._clock())
        if event is Event.LAST_WAVE_PASSED and row.mode == "shadow":
            said = f"{named} kept its rules beside what serves ({verdict.why}); nothing was installed"
            _note(decision, row, "rollout_completed", f"{row.id}: {said}")
        elif event is Event.LAST_WAVE_PASSED:
            _note(decision, row, "rollout_completed", f"{row.id}: {wording.everywhere(team)} ({verdict.why})")
        elif event is Event.WAIT:
            message = f"{row.id} ({named}): wave {row.wave + 1} passed; waits for confirmation (promote)"
            _note(decision, row, "rollout_waiting", message)
        else:
            wave = wording.reach(rows.plan_of(row).waves[row.wave], rules.scope_of(row))
            _note(decision, row, "rollout_wave", f"{row.id} ({named}): wave {row.wave} passed; goes on to {wave}")

    def _is_baked(self, team: list[RolloutRow], event: Event) -> bool:
        """Whether the wave has passed for long enough, and another one may begin now."""
        now, row = self._clock(), team[0]
        if row.passed is None:
            self._bake(team, now)
        frozen = event is Event.WAVE_PASSED and self.calendar.frozen_until(now) is not None
        return not frozen and now >= beginning.bakes_until(row)

    def _bake(self, team: list[RolloutRow], since: float | None) -> None:
        for row in team:
            row.passed = since

    def _pause(self, decision: Decision, team: list[RolloutRow], vitals: Vitals | None) -> None:
        """Pauses a rollout under way when the devices' health asks for it; once for each test."""
        row, session = team[0], decision.session
        pausing = {one.model: convert(one.health, HealthRules).pause for one in team if one.health is not None}
        tests = to_pause(vitals, pausing) if (State(row.state), Event.PAUSE) in machine.TRANSITIONS else ()
        if vitals is None or not tests:
            return
        steps.apply(session, team, Event.PAUSE, self._clock(), reason=vitals.why)
        for one in team:
            last = session.scalar(
                select(VerdictRow).where(VerdictRow.rollout == one.id).order_by(VerdictRow.seq.desc()).limit(1)
            )
            assert last is not None
            last.health = msgspec.to_builtins(msgspec.structs.replace(vitals, paused=(*vitals.paused, *tests)))
        message = f"{row.id} ({wording.named(team)}) was paused: {vitals.why}; look at `edge-fleet rollout evidence {row.id}`, then {PAUSED}"
        _note(decision, row, "rollout_paused", message, reason="health")


def _more(row: RolloutRow, tally: Tally) -> int | None:
    """How many more devices the wave may tell in this step; None: all of them."""
    rules, counts = rows.rules_of(row), tally.counts
    most = growth.may_be_told(counts, rules)
    more = None if most is None else most - counts.asked
    if rules.rate is None:
        return more
    return max(1, int(rules.rate)) if more is None else min(more, max(1, int(rules.rate)))


def _note(decision: Decision, row: RolloutRow, name: str, message: str, *, reason: str | None = None) -> None:
    decision.note(name, message, model=row.model, release=row.release, reason=reason)
