"""Deletes the files of releases that nobody needs: on demand, and beyond the number that is kept of each model.

The signed manifest stays, because its publisher's list names it; the files can be uploaded again.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from agent.contract.names import ReleaseRef
from agent.contract.scopes import text_of
from fleet_server.access import SERVER, Actor
from fleet_server.errors import Conflict
from fleet_server.journal import Journal
from fleet_server.releases import catalogue
from fleet_server.releases.catalogue import Catalogue
from fleet_server.rollouts import rows, rules
from fleet_server.rollouts.decisions import Decision, Decisions
from fleet_server.storage.models import Device, DeviceModel, ExclusionRow, ModelRow, ReleaseRow, RolloutRow, RuleRow

AT_ONCE = 20  # releases in one turn


class Deletion(msgspec.Struct, frozen=True):
    """A release whose files are gone. Those that another release has too stay."""

    release: str
    deleted: bool


class Retention:
    """`kept`: how many releases of each model, the newest; 0 keeps all."""

    def __init__(self, decisions: Decisions, releases: Catalogue, journal: Journal, kept: int) -> None:
        self._decisions, self._catalogue, self._journal, self.kept = decisions, releases, journal, kept

    def delete(self, actor: Actor, ref: ReleaseRef) -> Deletion:
        """Raises: NotFound; Conflict when somebody needs it, or it was deleted already."""
        with self._decisions.one() as decision:
            row = catalogue.find(decision.session, ref)
            if row.deleted:
                raise Conflict(f"the files of {ref} were deleted already", code="deleted")
            if (why := needed(decision.session).get(ref)) is not None:
                raise Conflict(f"release {ref} cannot be deleted: {why}", code="needed")
            files = self._mark(decision, actor, row)
        self._catalogue.remove_unused(files)
        self._journal.changed("releases")
        return Deletion(str(ref), True)

    def undelete(self, actor: Actor, ref: ReleaseRef) -> Deletion:
        """The release may be rolled out again: its files were uploaded again.  Raises: NotFound; Invalid when one was not."""
        with self._decisions.lock:
            self._catalogue.undelete(actor, ref)
        return Deletion(str(ref), False)

    def apply(self) -> int:
        """Deletes what is beyond the number that is kept and needed by nobody, a few at a time; how many."""
        if not self.kept:
            return 0
        with self._decisions.one() as decision:
            found = list(_beyond(decision.session, self.kept))[:AT_ONCE]
            files = [sha256 for row in found for sha256 in self._mark(decision, SERVER, row)]
        if found:
            self._catalogue.remove_unused(files)
            self._journal.changed("releases")
        return len(found)

    def _mark(self, decision: Decision, actor: Actor, row: ReleaseRow) -> list[str]:
        """Notes that the release has no files any more; the sha256 of each."""
        ref, row.deleted = ReleaseRef(row.model, row.version), True
        self._journal.audit(decision.session, actor, "release.delete", str(ref))
        decision.note("release_deleted", f"the files of {ref} were deleted", model=ref.model, release=ref.version)
        return sorted(catalogue.summary_of(row).files)


def needed(session: Session) -> dict[ReleaseRef, str]:
    """The releases that must not be deleted, and why: assigned, in a rollout, gone back to, served."""
    found: dict[ReleaseRef, str] = {}

    def need(model: str, release: int | None, why: str) -> None:
        if release is not None:
            found.setdefault(ReleaseRef(model, release), why)

    for model in session.scalars(select(ModelRow)):
        need(model.model, model.release, "every device is assigned it")
        need(model.model, model.previous, "a rollback goes back to it")
        if model.release is not None:
            need(model.model, rows.before(session, model.model, model.release), "a rollback goes back to it")
    for rule in session.scalars(select(RuleRow)):
        need(rule.model, rule.release, f"devices in {text_of(rules.scope_of(rule))} are assigned it")
        need(rule.model, rule.previous, "a rollback goes back to it")
    for rollout in session.scalars(select(RolloutRow).where(RolloutRow.state.in_(rows.ACTIVE))):
        need(rollout.model, rollout.release, f"rollout {rollout.id} brings it to devices")
        for kept in rows.as_assigned(rollout).kept:
            need(rollout.model, kept.release, f"devices keep it until rollout {rollout.id} reaches them")
        need(rollout.model, rollout.previous, f"rollout {rollout.id} goes back to it when it fails")
    for exclusion in session.scalars(select(ExclusionRow).where(ExclusionRow.ended.is_(None))):
        need(exclusion.model, exclusion.instead, f"{exclusion.hardware} runs it instead of {exclusion.release}")
    serving = select(DeviceModel.model, DeviceModel.serving, func.min(DeviceModel.device))
    serving = serving.join(Device, Device.id == DeviceModel.device).where(Device.revoked.is_(False))
    for name, release, device in session.execute(
        serving.where(DeviceModel.serving.is_not(None)).group_by(DeviceModel.model, DeviceModel.serving)
    ):
        need(name, release, f"device {device!r} serves it")
    return found


def _beyond(session: Session, kept: int) -> Iterator[ReleaseRow]:
    """What is beyond the number, but for what is needed."""
    needs, seen = needed(session), dict[str, int]()
    query = select(ReleaseRow).where(ReleaseRow.deleted.is_(False)).order_by(ReleaseRow.model, ReleaseRow.version.desc())
    for row in session.scalars(query):
        seen[row.model] = seen.get(row.model, 0) + 1
        if seen[row.model] > kept and ReleaseRef(row.model, row.version) not in needs:
            yield row
