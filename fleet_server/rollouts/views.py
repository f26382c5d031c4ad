"""What operators are shown of models, rollouts and exclusions."""

from __future__ import annotations

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.contract.assignment import Mode
from agent.contract.codec import convert
from fleet_server.rollouts import exclusions, rows, teams
from fleet_server.rollouts.exclusions import ExclusionView
from fleet_server.rollouts.gates import Counts, Ruling, Witness
from fleet_server.rollouts.machine import State, Wave
from fleet_server.storage.database import Database
from fleet_server.storage.models import ExclusionRow, ModelRow, RolloutRow, VerdictRow

EXCLUSIONS_LISTED = 200  # the newest ones


class ModelView(msgspec.Struct, frozen=True):
    """What every device runs of a model that no rollout reaches, and what it ran before."""

    model: str
    release: int | None
    previous: int | None


class MemberView(msgspec.Struct, frozen=True):
    """Another rollout of the team."""

    id: str
    model: str
    release: int


class VerdictView(msgspec.Struct, frozen=True):
    """What a gate said about a wave, with the counts and some of the devices behind it."""

    wave: int
    at: float
    verdict: Ruling
    why: str
    counts: Counts
    evidence: tuple[Witness, ...]


class RolloutView(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout with its last verdict. `wave` counts from 0; `team`: the rollouts whose releases switch with this one's."""

    id: str
    model: str
    release: int
    previous: int | None
    mode: Mode
    state: State
    wave: int
    waves: tuple[Wave, ...]
    confirm: bool
    max_failures: int
    created: float
    created_by: str
    updated: float
    reason: str
    verdict: VerdictView | None
    window: str | None
    team: tuple[MemberView, ...]
    exclusions: tuple[ExclusionView, ...]


class RolloutDetail(RolloutView, frozen=True, kw_only=True):
    """A rollout with every verdict of its gates, oldest first."""

    verdicts: tuple[VerdictView, ...]


class Views:
    """Reads the database and changes nothing."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def rollouts(self, *, model: str | None = None, limit: int = 100) -> list[RolloutView]:
        """Rollouts, the newest first."""
        query = select(RolloutRow).order_by(RolloutRow.number.desc()).limit(limit)
        if model is not None:
            query = query.where(RolloutRow.model == model)
        with self._database.reading() as session:
            return [_rollout(session, row) for row in session.scalars(query)]

    def rollout(self, rollout_id: str) -> RolloutDetail:
        """Everything about a rollout.  Raises: NotFound."""
        with self._database.reading() as session:
            row = rows.find(session, rollout_id)
            shown = _rollout(session, row)
            verdicts = session.scalars(select(VerdictRow).where(VerdictRow.rollout == row.id).order_by(VerdictRow.seq))
            return RolloutDetail(**msgspec.structs.asdict(shown), verdicts=tuple(map(_verdict, verdicts)))

    def models(self) -> list[ModelView]:
        """What the fleet runs of each model."""
        with self._database.reading() as session:
            found = session.scalars(select(ModelRow).order_by(ModelRow.model))
            return [ModelView(row.model, row.release, row.previous) for row in found]

    def exclusions(self, *, model: str | None = None) -> list[ExclusionView]:
        """Hardware classes that do not run a release, the newest first, those that were ended included."""
        query = select(ExclusionRow).order_by(ExclusionRow.id.desc()).limit(EXCLUSIONS_LISTED)
        if model is not None:
            query = query.where(ExclusionRow.model == model)
        with self._database.reading() as session:
            return [exclusions.view(row) for row in session.scalars(query)]


def _rollout(session: Session, row: RolloutRow) -> RolloutView:
    last = session.scalar(select(VerdictRow).where(VerdictRow.rollout == row.id).order_by(VerdictRow.seq.desc()).limit(1))
    excluded = [one for one in exclusions.known(session, row.model, row.release).values() if one.rollout == row.id]
    return RolloutView(
        id=row.id, model=row.model, release=row.release, previous=row.previous, mode="shadow" if row.mode == "shadow" else "install",
        state=State(row.state), wave=row.wave, waves=rows.plan_of(row).waves, confirm=row.confirm, max_failures=row.max_failures,
        created=row.created, created_by=row.created_by, updated=row.updated, reason=row.reason,
        verdict=_verdict(last) if last is not None else None, window=row.window,
        team=tuple(MemberView(one.id, one.model, one.release) for one in teams.of(session, row) if one.id != row.id),
        exclusions=tuple(map(exclusions.view, excluded)),
    )  # fmt: skip


def _verdict(row: VerdictRow) -> VerdictView:
    return VerdictView(
        wave=row.wave, at=row.at, verdict=Ruling(row.verdict), why=row.why, counts=convert(row.counts, Counts),
        evidence=convert(row.evidence, tuple[Witness, ...]),
    )  # fmt: skip
