"""Exclusions: hardware classes that do not run a release, because devices of the class refuse it while others may be well.

Three devices (`rollouts.exclude_after`) of one class that quarantine a release exclude the class, if they are no small part of
those that had to do with it (`rollouts.exclude_share`): a few devices that are broken, or lie, must not take it from a thousand
that run it well. The assignment then leaves the class out, its devices go back to the release before, and the rollout goes on
for the others. An operator may end an exclusion, once and for all.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.contract.assignment import Exclusion
from agent.contract.codec import convert
from fleet_server.errors import Conflict, NotFound
from fleet_server.rollouts.gates import Fact
from fleet_server.storage.models import ExclusionRow, RolloutRow

EVIDENCE_KEPT = 20  # devices named in an exclusion; its count covers all of them


class Refusal(msgspec.Struct, frozen=True):
    """A device behind an exclusion, and why it refused the release."""

    device: str
    reason: str | None
    message: str


class ExclusionView(msgspec.Struct, frozen=True):
    """A hardware class that does not run a release, as operators see it. `instead`: what it runs; `ended`: when an operator
    ended it.
    """

    id: int
    model: str
    release: int
    hardware: str
    instead: int | None
    rollout: str
    at: float
    count: int
    reason: str
    devices: tuple[Refusal, ...]
    ended: float | None
    ended_by: str | None


def to_exclude(
    refused: Mapping[str, list[Fact]],
    serving: Mapping[str, int],
    least: int,
    share: float,
    stands_out: Callable[[str, int], bool],
) -> dict[str, list[Fact]]:
    """Class → the devices whose refusals exclude it. `refused`: the devices of each class that quarantine the release;
    `serving`: how many of each class run it; `stands_out`: `gates.stands_out`. Pure.
    """
    return {
        kind: devices
        for kind, devices in refused.items()
        if least
        and len(devices) >= least
        and len(devices) >= share * (len(devices) + serving.get(kind, 0))
        and stands_out(kind, len(devices))
    }


def exclude(session: Session, row: RolloutRow, hardware: str, refused: list[Fact], now: float, because: str) -> ExclusionRow:
    """Writes down that the class does not run the release of this rollout."""
    devices = [{"device": f.device, "reason": f.reason, "message": f.message} for f in refused[:EVIDENCE_KEPT]]
    made = ExclusionRow(
        model=row.model, release=row.release, hardware=hardware, instead=row.previous, rollout=row.id, at=now, count=len(refused),
        reason=because, devices=devices, ended=None, ended_by=None,
    )  # fmt: skip
    session.add(made)
    session.flush()
    return made


def known(session: Session, model: str, release: int) -> dict[str, ExclusionRow]:
    """Class → what was decided about it for this release. Exclusions that were ended are among them: such a class is not
    excluded again.
    """
    rows = session.scalars(select(ExclusionRow).where(ExclusionRow.model == model, ExclusionRow.release == release))
    return {row.hardware: row for row in rows}


def in_force(session: Session, wanted: Mapping[str, set[int]]) -> dict[str, tuple[Exclusion, ...]]:
    """Model → the exclusions that its assignment has, for the releases of it that are `wanted`."""
    found: dict[str, list[Exclusion]] = collections.defaultdict(list)
    for row in session.scalars(select(ExclusionRow).where(ExclusionRow.ended.is_(None)).order_by(ExclusionRow.id)):
        if row.release in wanted.get(row.model, ()):
            found[row.model].append(Exclusion(release=row.release, hardware=row.hardware, instead=row.instead))
    return {model: tuple(exclusions) for model, exclusions in found.items()}


def end(session: Session, number: int, who: str, now: float) -> ExclusionRow:
    """Notes that `who` ended the exclusion.  Raises: NotFound; Conflict when it was ended already."""
    row = session.get(ExclusionRow, number)
    if row is None:
        raise NotFound(f"there is no exclusion {number}; `edge-fleet exclusion list` shows them")
    if row.ended is not None:
        raise Conflict(f"exclusion {number} was ended already", code="ended")
    row.ended, row.ended_by = now, who
    return row


def view(row: ExclusionRow) -> ExclusionView:
    return ExclusionView(
        id=row.id, model=row.model, release=row.release, hardware=row.hardware, instead=row.instead, rollout=row.rollout, at=row.at,
        count=row.count, reason=row.reason, devices=convert(row.devices, tuple[Refusal, ...]), ended=row.ended, ended_by=row.ended_by,
    )  # fmt: skip
