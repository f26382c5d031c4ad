"""Devices that refuse a release after its rollout is complete: those that were away, or roll it back late. Counted by cause."""

from __future__ import annotations

import collections

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.contract.reports import Phase
from fleet_server.rollouts import facts, rows, rules
from fleet_server.rollouts.machine import State
from fleet_server.rollouts.tally import quarantined
from fleet_server.storage.models import Device, DeviceModel, ModelRow, RolloutRow, RuleRow

READ_AT_MOST = 2000
"""Devices in quarantine that are looked at for one rollout."""
NAMED = 5


class Refusals(msgspec.Struct, frozen=True):
    """How many devices that should run the release of a complete rollout refuse it, by cause, and the first of them."""

    rollout: str
    release: str
    causes: dict[str, int]
    devices: tuple[str, ...]

    @property
    def count(self) -> int:
        return sum(self.causes.values())


def after_the_end(session: Session, row: RolloutRow) -> Refusals | None:
    """Of a complete rollout whose release is what its scope runs; None of any other, and when nobody refuses it. Reads the devices in
    quarantine alone.
    """
    base = rules.base_of(session, row.model, rules.scope_of(row))
    if row.state != State.COMPLETED.value or row.mode == "shadow" or base is None or base.release != row.release:
        return None
    about = facts.about(session, row)
    query = facts.of_devices(about).where(DeviceModel.phase == Phase.QUARANTINED.value, Device.revoked.is_(False))
    causes, devices = collections.Counter[str](), list[str]()
    for one in session.execute(query.order_by(Device.id).limit(READ_AT_MOST)):
        attempt = facts.attempt_of(about, one.retries)
        fact = facts.fact_of(one.id, True, one, row.release, about.hashes, row.id, attempt)
        if quarantined(fact) and one.hardware_class not in about.excluded and facts.is_reached(about, one):
            causes[fact.reason or "unknown"] += 1
            devices.append(one.id)
    if not devices:
        return None
    return Refusals(row.id, f"{row.model}:{row.release}", dict(causes.most_common()), tuple(devices[:NAMED]))


def of_fleet(session: Session) -> list[Refusals]:
    """Of what everyone runs, and of every rule."""
    bases = [("", base.model, base.release) for base in session.scalars(select(ModelRow))]
    bases += [(rule.scope, rule.model, rule.release) for rule in session.scalars(select(RuleRow))]
    came = [rows.came_to_all(session, model, release, scope) for scope, model, release in bases if release is not None]
    found = [after_the_end(session, row) for row in came if row is not None]
    return [one for one in found if one is not None]
