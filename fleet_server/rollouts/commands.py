"""What operators ask for: starting, promoting, pausing and ending rollouts, and having releases tried again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from agent.contract.assignment import EVERYONE, Mode, parse_window
from agent.contract.names import ReleaseRef
from agent.contract.scopes import EVERYBODY, Scope, text_of
from fleet_server.access import Actor
from fleet_server.errors import Conflict, Invalid
from fleet_server.releases import catalogue
from fleet_server.rollouts import beginning, planning, retries, rows, rules, steps, superseding, teams, wording
from fleet_server.rollouts.decisions import Decision
from fleet_server.rollouts.gates import Rules
from fleet_server.rollouts.machine import TERMINAL, Event, State, Wave
from fleet_server.rollouts.moves import ChangePreview
from fleet_server.rollouts.superseding import Plans
from fleet_server.rollouts.views import RolloutDetail
from fleet_server.rollouts.what_runs import WhatRuns
from fleet_server.storage.models import Device, RolloutRow

WEEK_S = 7 * 86400.0
PROMOTED = ("rollout_promoted", "goes on to {wave}")


class Rollouts(WhatRuns):
    """Every command of an operator about what the fleet runs. Safe between threads."""

    def start(
        self, actor: Actor, ref: ReleaseRef, *, waves: Sequence[str] = (), groups: Iterable[str] = (), permille: int | None = None, confirm: bool = False,
        team: Iterable[ReleaseRef] = (), window: str | None = None, mode: Mode = "install", at_once: bool = False, starts: float | None = None,
        max_failures: int | None = None, failure_share: float | None = None, min_share: float | None = None, time_limit_s: float | None = None,
        bake_s: float | None = None, rate: float | None = None, retry: bool = False, scope: Scope = EVERYBODY,
    ) -> RolloutDetail:  # fmt: skip
        """Begins a rollout. `waves`: as `machine.read_waves` has them, or the first one alone as `groups` and `permille`, and then everyone;
        each reaches one device at least. `team`: releases of other models that switch with it on each device, all or none. `confirm`: a
        person confirms each further wave. In mode shadow devices run it on copies of live requests and install nothing. `at_once`: a wave
        tells all of its devices in one step. `starts`: it begins then. `max_failures`, `bake_s`, `rate`: see `gates.Rules`; `failure_share`,
        `min_share`, `time_limit_s`: instead of what fleet.yaml says. `retry`: devices that refused the release before try it again.
        `scope`: whom it is for; it ends there, and they keep the release for good.

        Raises: NotFound, Conflict (another one is under way, withdrawn, not signed any more, already what everyone runs),
        Invalid.
        """
        refs = [ref, *team]
        wishes = {
            "max_failures": max_failures,
            "failure_share": failure_share,
            "bake_s": bake_s,
            "rate": rate,
            "growth": mode == "install" and not at_once,  # in mode shadow nobody is harmed
            "shadow": mode == "shadow",
            "min_share": min_share,
            "time_limit_s": time_limit_s,
        }
        kept_rules = _rules(self._judge.rules, window, {name: wish for name, wish in wishes.items() if wish is not None})
        plans = _plans(refs, planning.read(waves, groups, permille), confirm, kept_rules, mode, window, retry, scope)
        with self._decisions.lock:
            with self._decisions.one() as decision:
                session = decision.session
                started = [self._create(session, actor, one, plans) for one in refs]
                beginning.resolve(session, started, plans.waves)
                for row in started:
                    row.team, row.starts = started[0].id if len(started) > 1 else None, starts
                calendar, now = self._judge.calendar, self._clock()
                event = beginning.first_event(calendar, starts, now)
                steps.apply(session, started, event, now)
                if event is Event.START:
                    beginning.note_started(decision, started)
                else:
                    name, row = "rollout_proposed" if event is Event.PROPOSE else "rollout_scheduled", started[0]
                    message = f"{row.id} ({wording.named(started)}): {calendar.waits(row, now)}"
                    decision.note(name, message, model=ref.model, release=ref.version)
            self._judge.evaluate_one(started[0].id)
            return self._views.rollout(started[0].id)

    def supersede(
        self, actor: Actor, rollout_id: str, ref: ReleaseRef, *, waves: Sequence[str] = (), confirm: bool | None = None
    ) -> RolloutDetail:
        """Lets a newer release of the model take the place of a rollout that is under way. Devices that the first had reached keep its release
        until the second reaches them, and then go straight on to it. `waves`, `confirm`: instead of those of the first; the rest of
        its plan stays.

        Raises: NotFound, Conflict (over, of a team, in mode shadow, not newer, withdrawn …), Invalid.
        """
        asked = planning.read(waves, (), None) if waves else None
        with self._decisions.lock:
            with self._decisions.one() as decision:
                session = decision.session
                first = superseding.refuse_unfit(rows.find(session, rollout_id), ref, approval=self._judge.calendar.approval)
                plans = superseding.plans_of(first, asked, confirm)
                steps.apply(session, [first], Event.SUPERSEDE, self._clock(), reason=f"superseded by {ref}, says {actor.name}")
                session.flush()  # it is under way no more when the other begins
                row = self._create(session, actor, ref, plans)
                row.kept = superseding.kept(first)
                beginning.resolve(session, [row], plans.waves)
                steps.apply(session, [row], Event.START, self._clock())
                first.reason = f"superseded by {row.id} ({ref}), says {actor.name}"
                self._journal.audit(session, actor, "rollout.supersede", first.id, by=row.id, release=str(ref))
                message = f"{row.id}: {ref} takes the place of {first.model}:{first.release} ({first.id}); goes to {wording.reach(plans.waves[0], plans.scope)}"
                decision.note("rollout_superseded", message, model=ref.model, release=ref.version)
                started = row.id
            self._judge.evaluate_one(started)
            return self._views.rollout(started)

    def complete(self, actor: Actor, rollout_id: str) -> RolloutDetail:
        """Ends a rollout as if its last wave had passed: every device is assigned the release now, with no further wave and gate. In
        mode shadow it only ends.  Raises: NotFound, Conflict.
        """
        return self._ask(actor, rollout_id, Event.COMPLETE, "rollout_completed", "was completed by {who}: {all}")

    def retry(self, actor: Actor, rollout_id: str, device: str | None = None) -> RolloutDetail:
        """Lets devices try the release again that refused it, rolled it back or failed: one, or all that the rollout reached. Also after
        its end. What they answered before counts no more, and stays in the verdicts.

        Raises: NotFound; Conflict (it did not refuse, none did, too many to be told one by one).
        """
        told: list[str] = []
        with self._decisions.lock:
            with self._decisions.one() as decision:
                session, now = decision.session, self._clock()
                team = teams.of(session, rows.find(session, rollout_id))
                row, attempt = team[0], retries.next_attempt(session, now)
                if device is None and State(row.state) not in TERMINAL:
                    for one in team:
                        one.attempt, one.updated = attempt, now
                    steps.next_version(session)
                    whom = "devices that refused it"
                else:
                    told = self._tell_to_retry(session, team, device, attempt)
                    whom = told[0] if device is not None else f"{len(told)} devices that refused it"
                audited = told[: retries.AT_ONCE] or ["all"]
                self._journal.audit(session, actor, "rollout.retry", row.id, attempt=attempt, devices=audited)
                message = f"{row.id} ({wording.named(team)}): attempt {attempt} for {whom}, says {actor.name}"
                decision.note("rollout_retried", message, model=row.model, release=row.release)
            for one_device in told:
                self._inventory.poke(one_device)
            if State(row.state) not in TERMINAL:
                self._judge.evaluate_one(rollout_id)
            return self._views.rollout(rollout_id)

    def _tell_to_retry(self, session: Session, team: list[RolloutRow], device: str | None, attempt: int) -> list[str]:
        found: dict[str, list[RolloutRow]] = {}
        for row in team:
            for name in retries.failed(session, row, device):
                found.setdefault(name, []).append(row)
        retries.refuse_none(session, team[0], device, found)
        for name, refused in found.items():
            known = session.get_one(Device, name).retries
            for row in refused:
                known = retries.with_retry(known, row.model, row.release, attempt)
            self._inventory.let_try_again(session, name, known or [])
        return list(found)

    def _create(self, session: Session, actor: Actor, ref: ReleaseRef, plans: Plans) -> RolloutRow:
        if catalogue.find(session, ref).withdrawn:
            raise Conflict(f"release {ref} was withdrawn; publish a new version", code="withdrawn")
        catalogue.refuse_deleted(session, ref)
        self._refuse_unsigned(session, ref)
        if plans.mode == "install":
            catalogue.refuse_other_bytes(session, ref, catalogue.summary_of(catalogue.find(session, ref)).files)
        other = rows.active_of(session, ref.model, rules.stored(plans.scope))
        if other is not None:
            raise Conflict(
                f"rollout {other.id} of {other.model}:{other.release} is {other.state}; "
                f"wait for its end, abort it (`edge-fleet rollout abort {other.id}`), or let {ref} take its place "
                f"(`edge-fleet rollout supersede {other.id} {ref}`)",
                code="rollout_active",
            )
        _refuse_scope(session, ref.model, plans.scope)
        steps.model_row(session, ref.model)
        base = rules.base_of(session, ref.model, plans.scope)
        model = base if base is not None else steps.model_row(session, ref.model)
        if model.release is None and plans.mode == "shadow":
            raise Conflict(
                f"no release of {ref.model} serves yet, so there are no requests to try {ref} with; roll it out without --shadow",
                code="nothing_serves",
            )
        if base is not None and base.release == ref.version:
            who = f"every device in {text_of(plans.scope)}" if plans.scope else "every device"
            raise Conflict(f"{who} is assigned {ref} already", code="already_assigned")
        number = (session.scalar(select(func.max(RolloutRow.number))) or 0) + 1
        now = self._clock()
        row = RolloutRow(
            id=planning.draw(session, number, plans.waves, ref.model, plans.scope), number=number, model=ref.model, release=ref.version, previous=model.release,
            waves=[msgspec.to_builtins(wave) for wave in plans.waves], wave=0, state=State.CREATED.value, confirm=plans.confirm,
            max_failures=plans.rules.max_failures or 0, mode=plans.mode, window=plans.window, created=now, created_by=actor.name, updated=now,
            reason="", rules=msgspec.to_builtins(plans.rules), reach=0, health=msgspec.to_builtins(self._judge.health), scope=rules.stored(plans.scope),
            attempt=retries.next_attempt(session, now) if plans.retry else 0,
        )  # fmt: skip
        session.add(row)
        session.flush()
        self._journal.audit(
            session, actor, "rollout.start", row.id, release=str(ref), waves=row.waves, confirm=plans.confirm,
            mode=plans.mode, rules=row.rules,
        )  # fmt: skip
        return row

    def approve(self, actor: Actor, rollout_id: str) -> RolloutDetail:
        """Lets a rollout begin that another person started: at once, or at its time.  Raises: NotFound, Conflict."""
        with self._decisions.lock:
            with self._decisions.one() as decision:
                session = decision.session
                team = teams.of(session, rows.find(session, rollout_id))
                row = team[0]
                if actor.name == row.created_by and State(row.state) is State.PROPOSED:
                    raise Conflict(
                        f"{actor.name} started rollout {row.id}; another person must approve it (rollouts.approval in fleet.yaml)",
                        code="same_person",
                    )
                steps.apply(session, team, Event.APPROVE, self._clock())
                for member in team:
                    member.approved_by = actor.name
                self._journal.audit(session, actor, "rollout.approve", row.id)
                message = f"{row.id} ({wording.named(team)}) was approved by {actor.name}"
                decision.note("rollout_approved", message, model=row.model, release=row.release)
            self._judge.evaluate_one(rollout_id)
            return self._views.rollout(rollout_id)

    def promote(self, actor: Actor, rollout_id: str) -> RolloutDetail:
        """Confirms that the next wave begins."""
        return self._ask(actor, rollout_id, Event.PROMOTE, *PROMOTED)

    def preview_promote(self, actor: Actor, rollout_id: str) -> ChangePreview:
        """What the next wave would do once it has told all of its devices. Nothing is changed.  Raises: as `promote`."""

        def change(decision: Decision) -> None:
            team = self._asked(decision, actor, rollout_id, Event.PROMOTE, *PROMOTED)
            steps.grow(decision.session, team, EVERYONE, None)

        return self._preview(change)

    def pause(self, actor: Actor, rollout_id: str) -> RolloutDetail:
        return self._ask(actor, rollout_id, Event.PAUSE, "rollout_paused", "is paused; devices already reached go on")

    def resume(self, actor: Actor, rollout_id: str) -> RolloutDetail:
        return self._ask(actor, rollout_id, Event.RESUME, "rollout_resumed", "goes on with {wave}")

    def abort(self, actor: Actor, rollout_id: str) -> RolloutDetail:
        """Takes every device back to the release before."""
        return self._ask(actor, rollout_id, Event.ABORT, "rollout_aborted", "was aborted; back to {previous}")

    def _ask(self, actor: Actor, rollout_id: str, event: Event, name: str, text: str) -> RolloutDetail:
        """Lets an event happen to the whole team of a rollout.  Raises: NotFound, Conflict."""
        with self._decisions.lock:
            with self._decisions.one() as decision:
                self._asked(decision, actor, rollout_id, event, name, text)
            self._judge.evaluate_one(rollout_id)
            return self._views.rollout(rollout_id)

    def _asked(self, decision: Decision, actor: Actor, rollout_id: str, event: Event, name: str, text: str) -> list[RolloutRow]:
        session = decision.session
        team = teams.of(session, rows.find(session, rollout_id))
        row = team[0]
        reason = f"by {actor.name}" if event in {Event.ABORT, Event.COMPLETE} else ""
        steps.apply(session, team, event, self._clock(), reason=reason)
        self._journal.audit(session, actor, f"rollout.{event.value}", row.id)
        wave = wording.reach(rows.plan_of(row).waves[row.wave], rules.scope_of(row))
        said = text.format(wave=wave, previous=wording.previous(team), who=actor.name, all=wording.everywhere(team))
        decision.note(name, f"{row.id} ({wording.named(team)}) {said}", model=row.model, release=row.release)
        return team

    def skip(self, actor: Actor, rollout_id: str, device: str) -> RolloutDetail:
        """Takes a device out of the count of a rollout: no wave waits for it, and what it answers says nothing of the release. It is
        told to run the release all the same.  Raises: NotFound, Conflict (over, skipped already).
        """
        return self._leave_out(actor, rollout_id, device, out=True)

    def unskip(self, actor: Actor, rollout_id: str, device: str) -> RolloutDetail:
        """Lets a device that was skipped count again.  Raises: NotFound, Conflict (over, not skipped)."""
        return self._leave_out(actor, rollout_id, device, out=False)

    def _leave_out(self, actor: Actor, rollout_id: str, device: str, *, out: bool) -> RolloutDetail:
        with self._decisions.lock:
            with self._decisions.one() as decision:
                session = decision.session
                team = teams.of(session, rows.find(session, rollout_id))
                steps.skip(session, team, device, actor.name if out else None, self._clock())
                self._journal.audit(session, actor, "rollout.skip" if out else "rollout.unskip", team[0].id, device=device)
                said = "is skipped: it does not count" if out else "counts again"
                name, row = "rollout_skipped" if out else "rollout_unskipped", team[0]
                decision.note(name, f"{row.id} ({wording.named(team)}): {device} {said}", model=row.model, release=row.release)
            self._judge.evaluate_one(rollout_id)
            return self._views.rollout(rollout_id)


def _plans(
    refs: list[ReleaseRef],
    waves: tuple[Wave, ...],
    confirm: bool,
    rules: Rules,
    mode: Mode,
    window: str | None,
    retry: bool,
    scope: Scope,
) -> Plans:
    """What the operator asks for, checked as far as it goes without the database.  Raises: Invalid."""
    if mode == "shadow" and len(refs) > 1:
        raise Invalid("a team cannot be rolled out in mode shadow, in which nothing switches")
    if scope and len(refs) > 1:
        raise Invalid("a team is for every device, because its releases only switch together; leave the scope out, or the team")
    if len({one.model for one in refs}) < len(refs):
        raise Invalid("the releases of a team are of different models")
    try:
        if window is not None:
            parse_window(window)
    except ValueError as error:
        raise Invalid(str(error)) from error
    return Plans(waves, confirm, rules, mode, window, retry, scope)


def _rules(usual: Rules, window: str | None, wishes: Mapping[str, Any]) -> Rules:
    """What the waves must keep.  Raises: Invalid."""
    try:
        rules = msgspec.structs.replace(usual, **wishes)
    except ValueError as error:
        raise Invalid(str(error)) from error
    if window is not None and "time_limit_s" not in wishes:  # it may open once in a week
        rules = msgspec.structs.replace(rules, time_limit_s=rules.time_limit_s + WEEK_S)
    return rules


def _refuse_scope(session: Session, model: str, scope: Scope) -> None:
    """Raises: Invalid, Conflict when no rollout with this scope may begin."""
    rules.refuse_nobody(session, model, scope)
    rules.refuse_meeting(session, model, scope)
    rules.refuse_too_many(session, model, scope)
    if scope and (team := teams.of_model(session, model)) is not None:
        raise Conflict(
            f"{model} switches together with the other releases of team {team}, on every device; roll it out without a scope",
            code="of_a_team",
        )
