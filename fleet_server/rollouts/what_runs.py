"""What operators decide about what devices run already: rollbacks, withdrawals, ending exclusions."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.contract.names import ReleaseRef
from agent.contract.scopes import EVERYBODY, Scope, text_of
from fleet_server.access import Actor
from fleet_server.devices.inventory import Inventory
from fleet_server.errors import Conflict, NotFound
from fleet_server.journal import Journal
from fleet_server.releases import catalogue
from fleet_server.releases.repository import Repository
from fleet_server.rollouts import assignment, exclusions, going_back, rows, rules, steps, teams
from fleet_server.rollouts.decisions import Decision, Decisions
from fleet_server.rollouts.exclusions import ExclusionView
from fleet_server.rollouts.judging import Judge
from fleet_server.rollouts.machine import Event
from fleet_server.rollouts.moves import ChangePreview
from fleet_server.rollouts.views import RuleView, Views
from fleet_server.storage.models import RolloutRow


class RolledBack(msgspec.Struct, frozen=True):
    """The release that every device goes back to, and the one that it leaves (None: there was none)."""

    model: str
    release: int
    left: int | None


class Withdrawal(msgspec.Struct, frozen=True):
    """Whether the release is withdrawn by now."""

    release: str
    withdrawn: bool


class WhatRuns:
    """Commands that take effect on every device at once. Safe between threads."""

    def __init__(
        self, repository: Repository, inventory: Inventory, journal: Journal, decisions: Decisions, judge: Judge, views: Views,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._repository, self._inventory, self._journal, self._decisions = repository, inventory, journal, decisions
        self._judge, self._views, self._clock = judge, views, clock

    def roll_back(
        self, actor: Actor, model: str, to: int | None, *, forward: bool = False, scope: Scope = EVERYBODY
    ) -> RolledBack:
        """Takes every device, or those that follow the rule of `scope`, to an earlier release of the model at once, ending a rollout to
        them that is under way. `forward`: `to` may be a newer one.  Raises: NotFound, Conflict, Invalid.
        """
        with self._decisions.one() as decision:
            return self._roll_back(decision, actor, model, to, forward=forward, scope=scope)

    def preview_roll_back(
        self, actor: Actor, model: str, to: int | None, *, forward: bool = False, scope: Scope = EVERYBODY
    ) -> ChangePreview:
        """What `roll_back` would do. Nothing is changed.  Raises: as `roll_back`."""
        return self._preview(lambda decision: self._roll_back(decision, actor, model, to, forward=forward, scope=scope))

    def _roll_back(
        self, decision: Decision, actor: Actor, model: str, to: int | None, *, forward: bool, scope: Scope
    ) -> RolledBack:
        session = decision.session
        row = rules.base_of(session, model, scope)
        if row is None and scope:
            raise NotFound(f"{model} has no rule for {text_of(scope)}; `edge-fleet rule list` shows them")
        if row is None:
            raise NotFound(f"nothing of model {model!r} was ever rolled out")
        active = rows.active_of(session, model, rules.stored(scope))
        target = going_back.target(session, row, active, to, forward=forward)
        self._refuse_unsigned(session, ReleaseRef(model, target))
        if active is not None:
            reason = f"rolled back by {actor.name}"
            steps.apply(session, teams.of(session, active), Event.ABORT, self._clock(), reason=reason)
        left = active.release if active is not None else row.release
        if target != row.release:
            row.release, row.previous = target, rows.before(session, model, target, rules.stored(scope))
        steps.next_version(session)
        self._journal.audit(
            session, actor, "model.rollback", model, to=target, left=left, forward=forward, scope=text_of(scope)
        )
        message = f"{model} goes {'forward' if forward and target > (left or 0) else 'back'} to version {target} {'in ' + text_of(scope) if scope else 'everywhere'}"
        decision.note("model_rolled_back", message, model=model, release=target)
        return RolledBack(model, target, left)

    def withdraw(self, actor: Actor, ref: ReleaseRef) -> Withdrawal:
        """Nobody may run the release any more, in this fleet, ever. Devices that do go back to the one before.  Raises:
        NotFound, Conflict.
        """
        with self._decisions.one() as decision:
            self._withdraw(decision, actor, ref)
        self._journal.changed("releases")
        return Withdrawal(str(ref), True)

    def preview_withdraw(self, actor: Actor, ref: ReleaseRef) -> ChangePreview:
        """What `withdraw` would do. Nothing is changed.  Raises: NotFound, Conflict."""
        return self._preview(lambda decision: self._withdraw(decision, actor, ref))

    def _withdraw(self, decision: Decision, actor: Actor, ref: ReleaseRef) -> None:
        session = decision.session
        release = catalogue.find(session, ref)
        if release.withdrawn:
            raise Conflict(f"release {ref} was withdrawn already", code="withdrawn")
        release.withdrawn = True
        query = select(RolloutRow).where(
            RolloutRow.model == ref.model, RolloutRow.release == ref.version, RolloutRow.state.in_(rows.ACTIVE)
        )
        for active in session.scalars(query).all():
            reason = f"{ref} was withdrawn by {actor.name}"
            steps.apply(session, teams.of(session, active), Event.ABORT, self._clock(), reason=reason)
        going_back.leave_withdrawn(session, ref)
        steps.next_version(session)
        self._journal.audit(session, actor, "release.withdraw", str(ref))
        message = f"{ref} was withdrawn: no device may run it"
        decision.note("release_withdrawn", message, model=ref.model, release=ref.version)

    def _preview(self, change: Callable[[Decision], object]) -> ChangePreview:
        with self._decisions.undone() as decision:
            before = assignment.of_models(decision.session)
            change(decision)
            decision.session.flush()
            after, says = assignment.of_models(decision.session), decision.events[-1].message
        return self._views.change(says, before, after)

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

    def remove_rule(self, actor: Actor, model: str, scope: Scope) -> RuleView:
        """Ends the rule of a scope: its devices follow the next rule at once, in the end what everyone does.  Raises: NotFound,
        Conflict.
        """
        with self._decisions.one() as decision:
            session = decision.session
            row = rules.remove(session, model, scope)
            steps.next_version(session)
            self._journal.audit(session, actor, "rule.remove", model, scope=text_of(scope), release=row.release)
            message = f"{text_of(scope)} has no release of {model} of its own any more, says {actor.name}"
            decision.note("rule_removed", message, model=model, release=row.release or 0)
        return RuleView(model, scope, row.release, row.previous, None)

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
