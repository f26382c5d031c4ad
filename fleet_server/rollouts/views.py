"""What operators are shown of models, rollouts and exclusions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Select, func, select, union_all
from sqlalchemy.orm import Session, aliased

from agent.contract.assignment import Mode, Rule
from agent.contract.codec import convert
from agent.contract.names import ReleaseRef
from agent.contract.scopes import EVERYBODY, Scope
from fleet_server.rollouts import exclusions, facts, gates, moves, planning, preview, refusals, rows, rules, teams
from fleet_server.rollouts.beginning import Calendar
from fleet_server.rollouts.exclusions import ExclusionView
from fleet_server.rollouts.facts import About, Hearing
from fleet_server.rollouts.gates import Counts, Ruling, Standing, Witness
from fleet_server.rollouts.machine import State, Wave
from fleet_server.rollouts.moves import ChangePreview, Told
from fleet_server.rollouts.preview import RolloutPreview
from fleet_server.rollouts.refusals import Refusals
from fleet_server.rollouts.vitals import Vitals
from fleet_server.storage.database import Database
from fleet_server.storage.models import Device, ExclusionRow, ModelRow, RolloutRow, RuleRow, ToldDevice, VerdictRow

EXCLUSIONS_LISTED = 200  # the newest ones
EXCLUSIONS_OF_ONE = 50  # in the view of a rollout, the newest ones
VERDICTS_SHOWN = 20  # in the view of a rollout, the newest ones
WITNESSES_LISTED = 10  # devices named of each rollout in a list
ROWS_READ = 2000  # devices looked at for one page of a rollout's devices


class RuleView(msgspec.Struct, frozen=True):
    """What the devices of a scope run of a model in place of what everyone does. `release` None: nothing was brought to all of them yet;
    `rollout`: the one to them that is under way.
    """

    model: str
    scope: Scope
    release: int | None
    previous: int | None
    rollout: str | None


class ModelView(msgspec.Struct, frozen=True):
    """What every device runs of a model that no rollout reaches, and what it ran before."""

    model: str
    release: int | None
    previous: int | None
    rules: tuple[RuleView, ...] = ()


class MemberView(msgspec.Struct, frozen=True):
    """Another rollout of the team."""

    id: str
    model: str
    release: int


class VerdictView(msgspec.Struct, frozen=True):
    """What a gate said about a wave, with the counts and the first devices of each standing, bad answers first. `at`: when the
    counts were like that last.
    """

    seq: int
    wave: int
    at: float
    verdict: Ruling
    why: str
    counts: Counts
    evidence: tuple[Witness, ...]
    health: Vitals | None = None
    """What was known of the devices' health; None where the rollout began before that was kept."""


class RolloutView(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout with its last verdict. `wave` counts from 0; of its devices those are told by now whose slot is below `reach` (1000: all).
    `team`: the rollouts whose releases switch with this one's. `waits_for`: what of time or people keeps it from going on, in words.
    `scope`: whom it is for, everyone when it is empty; `attempt`: what devices refused in one with a lower number is tried again;
    `superseded`: the rollouts whose place it took.
    """

    id: str
    model: str
    release: int
    previous: int | None
    mode: Mode
    state: State
    wave: int
    waves: tuple[Wave, ...]
    reach: int
    confirm: bool
    max_failures: int | None
    failure_share: float | None
    bake_s: float
    rate: float | None
    created: float
    created_by: str
    approved_by: str | None
    starts: float | None
    updated: float
    reason: str
    verdict: VerdictView | None
    waits_for: str | None
    window: str | None
    team: tuple[MemberView, ...]
    exclusions: tuple[ExclusionView, ...]
    scope: Scope
    attempt: int
    superseded: tuple[str, ...]


class RolloutDetail(RolloutView, frozen=True, kw_only=True):
    """A rollout with the newest verdicts of its gates, oldest first, one for each time that a gate changed its mind."""

    verdicts: tuple[VerdictView, ...]
    refusals: Refusals | None
    """Devices that refuse the release now that it is what they should run; None of a rollout that is not complete, or was followed."""


class StandingPage(msgspec.Struct, frozen=True, kw_only=True):
    """Devices of a rollout, in the order of their ids, and how each stands to its release by its last report. `next`:
    what to give as `after` for those behind them, also when none is here; None at the end.
    """

    devices: list[Witness]
    next: str | None


class Views:
    """Reads the database and changes nothing."""

    def __init__(self, database: Database, hearing: Hearing, calendar: Calendar, clock: Callable[[], float]) -> None:
        self._database, self._hearing, self._calendar, self._clock = database, hearing, calendar, clock

    def rollouts(self, *, model: str | None = None, limit: int = 100) -> list[RolloutView]:
        """Rollouts, the newest first."""
        query = select(RolloutRow).order_by(RolloutRow.number.desc()).limit(limit)
        if model is not None:
            query = query.where(RolloutRow.model == model)
        with self._database.reading() as session:
            return [self._rollout(session, row, WITNESSES_LISTED) for row in session.scalars(query)]

    def rollout(self, rollout_id: str) -> RolloutDetail:
        """Everything about a rollout.  Raises: NotFound."""
        with self._database.reading() as session:
            row = rows.find(session, rollout_id)
            shown = self._rollout(session, row)
            return RolloutDetail(
                **msgspec.structs.asdict(shown),
                verdicts=_verdicts(session, row.id, VERDICTS_SHOWN),
                refusals=refusals.after_the_end(session, row),
            )

    def verdicts(self, rollout_id: str, *, before: int | None = None, limit: int = 100) -> list[VerdictView]:
        """The newest verdicts of a rollout's gates (before the one of number `before`), oldest first.  Raises: NotFound."""
        with self._database.reading() as session:
            return list(_verdicts(session, rows.find(session, rollout_id).id, limit, before))

    def devices(self, rollout_id: str, *, standing: Standing | None = None, limit: int = 100, after: str = "") -> StandingPage:
        """The devices in the scope of a rollout, and those that left it, or those of one standing (`PENDING`: all that have still to answer),
        from behind `after` on.  Raises: NotFound.
        """
        now, found, last, more = self._clock(), list[Witness](), after, False
        wanted = {standing} if standing is not Standing.PENDING else {*gates.TO_ANSWER}
        with self._database.reading() as session:
            row = rows.find(session, rollout_id)
            about = facts.about(session, row)
            ids = session.scalars(_ids(about, after)).all()
            read = {device.id: device for device in facts.of_some(session, about, ids)}
            for device in ids:
                witness = self._witness(about, device, read.get(device), now)
                if witness is not None and (standing is None or witness.standing in wanted):
                    if len(found) == limit:
                        more = True
                        break
                    found.append(witness)
                last = device
        return StandingPage(devices=found, next=last if more or len(ids) == ROWS_READ else None)

    def _witness(self, about: About, device: str, row: Any, now: float) -> Witness | None:
        """How the device stands; None when it has nothing to do with the rollout. `row`: None of one that was deleted."""
        entry = facts.seen(about, row, self._hearing, now).entry if row is not None else None
        fact = entry.fact if entry is not None else facts.left(device, facts.DELETED)
        if fact is not None:
            return Witness(device, gates.standing(fact, shadow=about.wave.mode == "shadow"), fact.reason, fact.message)
        return Witness(device, Standing.NOT_REACHED) if entry is not None and entry.not_reached else None

    def stalled(self) -> list[tuple[str, str]]:
        """The rollouts under way whose wave cannot pass as it is, and why."""
        last = aliased(VerdictRow)
        newest = select(func.max(last.seq)).where(last.rollout == RolloutRow.id).scalar_subquery()
        query = select(RolloutRow.id, VerdictRow.why).join(VerdictRow, VerdictRow.seq == newest)
        query = query.where(RolloutRow.state.in_(rows.ACTIVE), VerdictRow.verdict == Ruling.STALL.value).order_by(
            RolloutRow.number
        )
        with self._database.reading() as session:
            return [(rollout, why) for rollout, why in session.execute(query)]

    def refusals(self) -> list[Refusals]:
        """Devices that refuse what they should run after its rollout is complete, for each release of which there are some."""
        with self._database.reading() as session:
            return refusals.of_fleet(session)

    def preview(
        self, refs: Sequence[ReleaseRef], waves: Sequence[str], groups: Sequence[str], permille: int | None, scope: Scope = EVERYBODY,
    ) -> list[RolloutPreview]:  # fmt: skip
        """What a rollout of these releases would reach, with waves as `planning.read` takes them.  Raises: NotFound, Invalid."""
        asked = planning.read(waves, groups, permille)
        with self._database.reading() as session:
            drawn = [RolloutRow(id=preview.DRAW, model=ref.model, scope=rules.stored(scope)) for ref in refs]
            for row in drawn:
                rules.refuse_nobody(session, row.model, scope)
            found = planning.resolve(session, drawn[0], asked)
            return [
                preview.of(session, ref, found, row, self._hearing, self._clock()) for ref, row in zip(refs, drawn, strict=True)
            ]

    def change(self, says: str, before: Told, after: Told) -> ChangePreview:
        """What devices would do that are told `after` where they are told `before`. `says`: what would be told to people."""
        with self._database.reading() as session:
            return moves.of(session, says, before, after, self._hearing, self._clock())

    def models(self) -> list[ModelView]:
        """What the fleet runs of each model."""
        with self._database.reading() as session:
            found = session.scalars(select(ModelRow).order_by(ModelRow.model))
            of_models, scopes = (
                rules.of_models(session),
                {(row.model, row.scope): row for row in session.scalars(select(RuleRow))},
            )
            return [
                ModelView(row.model, row.release, row.previous, _rules(row.model, of_models.get(row.model, ()), scopes))
                for row in found
            ]

    def exclusions(self, *, model: str | None = None) -> list[ExclusionView]:
        """Hardware classes that do not run a release, the newest first, those that were ended included."""
        query = select(ExclusionRow).order_by(ExclusionRow.id.desc()).limit(EXCLUSIONS_LISTED)
        if model is not None:
            query = query.where(ExclusionRow.model == model)
        with self._database.reading() as session:
            return [exclusions.view(row) for row in session.scalars(query)]

    def _rollout(self, session: Session, row: RolloutRow, witnesses: int | None = None) -> RolloutView:
        """`witnesses`: how many devices its verdict names at most; None: all that it has."""
        last = session.scalar(select(VerdictRow).where(VerdictRow.rollout == row.id).order_by(VerdictRow.seq.desc()).limit(1))
        excluded = select(ExclusionRow).where(
            ExclusionRow.model == row.model, ExclusionRow.release == row.release, ExclusionRow.rollout == row.id
        )
        newest = session.scalars(excluded.order_by(ExclusionRow.id.desc()).limit(EXCLUSIONS_OF_ONE)).all()
        kept_rules = rows.rules_of(row)
        return RolloutView(
            id=row.id, model=row.model, release=row.release, previous=row.previous, mode="shadow" if row.mode == "shadow" else "install",
            state=State(row.state), wave=row.wave, waves=rows.plan_of(row).waves, reach=rows.reach_of(row), confirm=row.confirm,
            max_failures=kept_rules.max_failures, failure_share=kept_rules.failure_share, bake_s=kept_rules.bake_s, rate=kept_rules.rate, starts=row.starts,
            approved_by=row.approved_by, waits_for=self._calendar.waits(row, self._clock()), created=row.created, created_by=row.created_by, updated=row.updated, reason=row.reason,
            verdict=_verdict(last, witnesses) if last is not None else None, window=row.window,
            team=tuple(MemberView(one.id, one.model, one.release) for one in teams.of(session, row) if one.id != row.id),
            exclusions=tuple(map(exclusions.view, reversed(newest))), scope=rules.scope_of(row), attempt=row.attempt,
            superseded=tuple(one.id for one in rows.as_assigned(row).kept),
        )  # fmt: skip


def _ids(about: About, after: str) -> Select[Any]:
    """The query of a page of devices: those that there are, and those that were told of the rollout and deleted since."""
    there, gone = select(Device.id.label("id")).where(Device.id > after), facts.deleted(about).where(ToldDevice.device > after)
    both = union_all(there, gone).subquery()
    return select(both.c.id).order_by(both.c.id).limit(ROWS_READ)


def _rules(model: str, found: tuple[Rule, ...], known: Mapping[tuple[str, str], RuleRow]) -> tuple[RuleView, ...]:
    views = []
    for rule in found:
        row = known.get((model, rules.stored(rule.scope)))
        previous = row.previous if row is not None else None
        views.append(RuleView(model, rule.scope, rule.release, previous, rule.rollout.id if rule.rollout else None))
    return tuple(views)


def _verdicts(session: Session, rollout_id: str, limit: int, before: int | None = None) -> tuple[VerdictView, ...]:
    query = select(VerdictRow).where(VerdictRow.rollout == rollout_id).order_by(VerdictRow.seq.desc()).limit(limit)
    if before is not None:
        query = query.where(VerdictRow.seq < before)
    return tuple(map(_verdict, reversed(session.scalars(query).all())))


def _verdict(row: VerdictRow, witnesses: int | None = None) -> VerdictView:
    return VerdictView(
        seq=row.seq, wave=row.wave, at=row.at, verdict=Ruling(row.verdict), why=row.why, counts=convert(row.counts, Counts),
        evidence=convert(row.evidence[:witnesses], tuple[Witness, ...]), health=convert(row.health, Vitals) if row.health else None,
    )  # fmt: skip
