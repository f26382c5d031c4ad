"""What operators ask for: starting, promoting, pausing and aborting rollouts, rollbacks, withdrawals, ending exclusions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from agent.contract.assignment import Mode, parse_window
from agent.contract.names import ReleaseRef
from fleet_server.access import Actor
from fleet_server.errors import Conflict, Invalid, NotFound
from fleet_server.journal import Journal
from fleet_server.releases import catalogue
from fleet_server.releases.repository import Repository
from fleet_server.rollouts import beginning, exclusions, planning, rows, steps, teams, wording
from fleet_server.rollouts.decisions import Decisions
from fleet_server.rollouts.exclusions import ExclusionView
from fleet_server.rollouts.gates import Rules
from fleet_server.rollouts.judging import Judge
from fleet_server.rollouts.machine import Event, State, Wave
from fleet_server.rollouts.views import RolloutDetail, Views
from fleet_server.storage.models import ModelRow, RolloutRow

WEEK_S = 7 * 86400.0


class RolledBack(msgspec.Struct, frozen=True):
    """The release that every device goes back to, and the one that it leaves (None: there was none)."""

    model: str
    release: int
    left: int | None


class Withdrawal(msgspec.Struct, frozen=True):
    """Whether the release is withdrawn by now."""

    release: str
    withdrawn: bool


class Plans(msgspec.Struct, frozen=True):
    """What the members of a team have in common when they begin."""

    waves: tuple[Wave, ...]
    confirm: bool
    rules: Rules
    mode: Mode
    window: str | None


class Rollouts:
    """Every command of an operator about what the fleet runs. Safe between threads."""

    def __init__(
        self, repository: Repository, journal: Journal, decisions: Decisions, judge: Judge, views: Views, clock: Callable[[], float]
    ) -> None:  # fmt: skip
        self._repository, self._journal, self._decisions = repository, journal, decisions
        self._judge, self._views, self._clock = judge, views, clock

    # -- rollouts ----------------------------------------------------------------------------------------------------------

    def start(
        self, actor: Actor, ref: ReleaseRef, *, waves: Sequence[str] = (), groups: Iterable[str] = (), permille: int | None = None, confirm: bool = False,
        team: Iterable[ReleaseRef] = (), window: str | None = None, mode: Mode = "install", at_once: bool = False, starts: float | None = None,
        max_failures: int | None = None, failure_share: float | None = None, min_share: float | None = None, time_limit_s: float | None = None,
        bake_s: float | None = None, rate: float | None = None,
    ) -> RolloutDetail:  # fmt: skip
        """Begins a rollout. `waves`: as `machine.read_waves` has them, or the first one alone as `groups` and `permille`, and then everyone;
        each reaches one device at least. `team`: releases of other models that switch with it on each device, all or none. `confirm`: a
        person confirms each further wave. In mode shadow devices run it on copies of live requests and install nothing. `at_once`: a wave
        tells all of its devices in one step. `starts`: it begins then. `max_failures`, `bake_s`, `rate`: see `gates.Rules`; `failure_share`,
        `min_share`, `time_limit_s`: instead of what fleet.yaml says.

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
        rules = _rules(self._judge.rules, window, {name: wish for name, wish in wishes.items() if wish is not None})
        plans = _plans(refs, planning.read(waves, groups, permille), confirm, rules, mode, window)
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

    def _create(self, session: Session, actor: Actor, ref: ReleaseRef, plans: Plans) -> RolloutRow:
        if catalogue.find(session, ref).withdrawn:
            raise Conflict(f"release {ref} was withdrawn; publish a new version", code="withdrawn")
        catalogue.refuse_deleted(session, ref)
        self._refuse_unsigned(session, ref)
        if plans.mode == "install":
            catalogue.refuse_other_bytes(session, ref, catalogue.summary_of(catalogue.find(session, ref)).files)
        other = rows.active_of(session, ref.model)
        if other is not None:
            raise Conflict(
                f"rollout {other.id} of {other.model}:{other.release} is {other.state}; "
                f"wait for its end or abort it (`edge-fleet rollout abort {other.id}`)",
                code="rollout_active",
            )
        model = steps.model_row(session, ref.model)
        if model.release is None and plans.mode == "shadow":
            raise Conflict(
                f"no release of {ref.model} serves yet, so there are no requests to try {ref} with; roll it out without --shadow",
                code="nothing_serves",
            )
        if model.release == ref.version:
            raise Conflict(f"every device is assigned {ref} already", code="already_assigned")
        number = (session.scalar(select(func.max(RolloutRow.number))) or 0) + 1
        now = self._clock()
        row = RolloutRow(
            id=planning.draw(session, number, plans.waves), number=number, model=ref.model, release=ref.version, previous=model.release,
            waves=[msgspec.to_builtins(wave) for wave in plans.waves], wave=0, state=State.CREATED.value, confirm=plans.confirm,
            max_failures=plans.rules.max_failures or 0, mode=plans.mode, window=plans.window, created=now, created_by=actor.name, updated=now,
            reason="", rules=msgspec.to_builtins(plans.rules), reach=0,
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
        return self._ask(actor, rollout_id, Event.PROMOTE, "rollout_promoted", "goes on to {wave}")

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
                session = decision.session
                team = teams.of(session, rows.find(session, rollout_id))
                row = team[0]
                reason = f"by {actor.name}" if event is Event.ABORT else ""
                steps.apply(session, team, event, self._clock(), reason=reason)
                self._journal.audit(session, actor, f"rollout.{event.value}", row.id)
                wave = wording.reach(rows.plan_of(row).waves[row.wave])
                said = text.format(wave=wave, previous=wording.previous(team))
                message = f"{row.id} ({wording.named(team)}) {said}"
                decision.note(name, message, model=row.model, release=row.release)
            self._judge.evaluate_one(rollout_id)
            return self._views.rollout(rollout_id)

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

    # -- models and releases -----------------------------------------------------------------------------------------------

    def roll_back(self, actor: Actor, model: str, to: int | None) -> RolledBack:
        """Takes every device to an earlier release of the model at once, ending a rollout that is under way.  Raises: NotFound,
        Conflict.
        """
        with self._decisions.one() as decision:
            session = decision.session
            row = session.get(ModelRow, model)
            if row is None:
                raise NotFound(f"nothing of model {model!r} was ever rolled out")
            active = rows.active_of(session, model)
            target = self._rollback_target(session, row, active, to)
            if active is not None:
                reason = f"rolled back by {actor.name}"
                steps.apply(session, teams.of(session, active), Event.ABORT, self._clock(), reason=reason)
            left = active.release if active is not None else row.release
            if target != row.release:
                row.release, row.previous = target, rows.before(session, model, target)
            steps.next_version(session)
            self._journal.audit(session, actor, "model.rollback", model, to=target, left=left)
            message = f"{model} goes back to version {target} everywhere"
            decision.note("model_rolled_back", message, model=model, release=target)
        return RolledBack(model, target, left)

    def _rollback_target(self, session: Session, row: ModelRow, active: RolloutRow | None, to: int | None) -> int:
        """The release to go back to.  Raises: Conflict when there is none that devices may run."""
        model = row.model
        target = to if to is not None else (row.release if active else row.previous)
        rows.refuse_forward(session, row, to)
        if target is None:
            raise Conflict(f"there is no earlier release of {model!r} to go back to; name one with --to", code="no_previous")
        if catalogue.find(session, ReleaseRef(model, target)).withdrawn:
            raise Conflict(f"release {model}:{target} was withdrawn; name another with --to", code="withdrawn")
        catalogue.refuse_deleted(session, ReleaseRef(model, target))
        self._refuse_unsigned(session, ReleaseRef(model, target))
        if target == row.release and active is None:
            raise Conflict(f"every device is assigned {model}:{target} already", code="already_assigned")
        return target

    def withdraw(self, actor: Actor, ref: ReleaseRef) -> Withdrawal:
        """Nobody may run the release any more, in this fleet, ever. Devices that do go back to the one before.  Raises:
        NotFound, Conflict.
        """
        with self._decisions.one() as decision:
            session = decision.session
            release = catalogue.find(session, ref)
            if release.withdrawn:
                raise Conflict(f"release {ref} was withdrawn already", code="withdrawn")
            release.withdrawn = True
            active = rows.active_of(session, ref.model)
            if active is not None and active.release == ref.version:
                reason = f"{ref} was withdrawn by {actor.name}"
                steps.apply(session, teams.of(session, active), Event.ABORT, self._clock(), reason=reason)
            _leave_withdrawn(session, ref)
            steps.next_version(session)
            self._journal.audit(session, actor, "release.withdraw", str(ref))
            message = f"{ref} was withdrawn: no device may run it"
            decision.note("release_withdrawn", message, model=ref.model, release=ref.version)
        self._journal.changed("releases")
        return Withdrawal(str(ref), True)

    def reinstate(self, actor: Actor, ref: ReleaseRef) -> Withdrawal:
        """The release may be rolled out again: its publisher signed so. Nothing is rolled out by that.  Raises: NotFound."""
        with self._decisions.one() as decision:
            session = decision.session
            catalogue.find(session, ref).withdrawn = False
            steps.next_version(session)
            message = f"{ref} may be run again: its publisher signed so, at the request of {actor.name}"
            decision.note("release_reinstated", message, model=ref.model, release=ref.version)
        self._journal.changed("releases")
        return Withdrawal(str(ref), False)

    def end_exclusion(self, actor: Actor, number: int) -> ExclusionView:
        """Lets an excluded hardware class have the release after all. The class is not excluded from it again.  Raises:
        NotFound, Conflict.
        """
        with self._decisions.one() as decision:
            session = decision.session
            row = exclusions.end(session, number, actor.name, self._clock())
            steps.next_version(session)
            release = f"{row.model}:{row.release}"
            self._journal.audit(session, actor, "exclusion.end", str(number), release=release, hardware=row.hardware)
            message = f"{release} may go to {row.hardware} after all, says {actor.name}"
            decision.note("exclusion_ended", message, model=row.model, release=row.release)
        return exclusions.view(row)

    def _refuse_unsigned(self, session: Session, ref: ReleaseRef) -> None:
        """Raises: Conflict when no publisher vouches for the release any more, so that every device would refuse it."""
        sha256 = catalogue.find(session, ref).sha256
        for publisher in self._repository.publishers().values():
            target = publisher.signed.targets.get(ref.target_path)
            if target is not None and target.hashes.get("sha256") == sha256:
                return
        raise Conflict(
            f"release {ref} is not signed by any publisher that the fleet trusts now, so every device would refuse it: "
            f"its publisher was removed (`edge-fleet publisher list`); publish a new version",
            code="not_signed",
        )


def _plans(
    refs: list[ReleaseRef], waves: tuple[Wave, ...], confirm: bool, rules: Rules, mode: Mode, window: str | None
) -> Plans:
    """What the operator asks for, checked as far as it goes without the database.  Raises: Invalid."""
    if mode == "shadow" and len(refs) > 1:
        raise Invalid("a team cannot be rolled out in mode shadow, in which nothing switches")
    if len({one.model for one in refs}) < len(refs):
        raise Invalid("the releases of a team are of different models")
    try:
        if window is not None:
            parse_window(window)
    except ValueError as error:
        raise Invalid(str(error)) from error
    return Plans(waves, confirm, rules, mode, window)


def _rules(usual: Rules, window: str | None, wishes: Mapping[str, Any]) -> Rules:
    """What the waves must keep.  Raises: Invalid."""
    try:
        rules = msgspec.structs.replace(usual, **wishes)
    except ValueError as error:
        raise Invalid(str(error)) from error
    if window is not None and "time_limit_s" not in wishes:  # it may open once in a week
        rules = msgspec.structs.replace(rules, time_limit_s=rules.time_limit_s + WEEK_S)
    return rules


def _leave_withdrawn(session: Session, ref: ReleaseRef) -> None:
    """Takes the withdrawn release out of what every device runs, or ran before."""
    model = session.get(ModelRow, ref.model)
    if model is None:
        return
    if model.previous == ref.version:
        model.previous = None
    if model.release == ref.version:
        model.release = model.previous
        model.previous = rows.before(session, ref.model, model.release) if model.release is not None else None
