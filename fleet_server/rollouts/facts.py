"""What devices say of a release, from their last signed reports."""

from __future__ import annotations

from sqlalchemy import Text, cast, or_, select
from sqlalchemy.orm import Session

from agent.contract.assignment import reaches
from agent.contract.names import ReleaseRef
from agent.contract.reasons import METADATA
from agent.contract.reports import Outcome, Phase
from fleet_server.devices import shared_identity
from fleet_server.devices.inventory import Inventory
from fleet_server.releases import catalogue
from fleet_server.rollouts import exclusions, rows
from fleet_server.rollouts.gates import Fact
from fleet_server.storage.models import Device, DeviceModel, RolloutRow

ABOUT_METADATA = frozenset(reason.value for reason in METADATA)


def of_wave(session: Session, row: RolloutRow, inventory: Inventory, now: float) -> list[Fact]:
    """A fact for each device that the rollout reaches by now, but for those in a class that is excluded from the release."""
    wave = rows.as_assigned(row)
    hashes = catalogue.summary_of(catalogue.find(session, ReleaseRef(row.model, row.release))).model_hashes
    said = {d.device: d for d in session.scalars(select(DeviceModel).where(DeviceModel.model == row.model))}
    # Columns, not whole rows: the states of ten thousand devices are not needed to count them.
    columns = select(Device.id, Device.groups, Device.present, Device.last_seen, Device.shared)
    facts = [
        of_one(
            fact_of(device, inventory.is_online(present, last_seen, now), said.get(device), row.release, hashes, row.id),
            several=shared_identity.are_several(shared, now),
        )
        for device, groups, present, last_seen, shared in session.execute(columns.where(Device.revoked.is_(False)))
        if reaches(wave, device, groups)
    ]
    excluded = {kind for kind, one in exclusions.known(session, row.model, row.release).items() if one.ended is None}
    if not excluded:
        return facts
    kinds = exclusions.classes_of(session, [fact.device for fact in facts])
    return [fact for fact in facts if kinds.get(fact.device) not in excluded]


def of_one(fact: Fact, *, several: bool) -> Fact:
    """What is left of a fact when `several` machines report under one identity: only what is bad. What one of them does well
    says nothing of the others, so it is no success, and it keeps no wave waiting.
    """
    if not several or fact.outcome in (Outcome.REFUSED, Outcome.ROLLED_BACK):
        return fact
    return Fact(fact.device, online=False, serving_it=False, message="several machines report under this identity")


def refusals(session: Session, row: RolloutRow) -> list[Fact]:
    """What devices say that answered the release badly, whether it is what they run now or not."""
    answered = cast(DeviceModel.answers, Text)
    bad = or_(answered.contains(Outcome.REFUSED.value), answered.contains(Outcome.ROLLED_BACK.value))
    query = select(DeviceModel).join(Device, Device.id == DeviceModel.device)
    said = session.scalars(query.where(DeviceModel.model == row.model, Device.revoked.is_(False), bad))
    return [fact_of(one.device, True, one, row.release, {}, row.id) for one in said]


def fact_of(device: str, online: bool, said: DeviceModel | None, release: int, hashes: dict[str, str], rollout: str) -> Fact:
    """What a device's last signed report says about the release. `hashes`: variant → the sha256 of its model. An answer that
    was about the metadata of its time counts only in the `rollout` that it was given to.
    """
    if said is None:
        return Fact(device, online, serving_it=False)
    serving = said.serving == release and said.sha256 is not None and hashes.get(said.variant or "") == said.sha256
    answers = [
        answer
        for answer in said.answers
        if answer["release"] == release and (answer["reason"] not in ABOUT_METADATA or answer["rollout"] == rollout)
    ]
    last = max(answers, key=lambda answer: float(answer["at"]), default=None)
    phase = Phase(said.phase) if said.phase in {p.value for p in Phase} else None
    if last is None:
        return Fact(device, online, serving_it=serving, phase=phase)
    return Fact(
        device, online, serving_it=serving, phase=phase, outcome=Outcome(last["outcome"]), reason=last["reason"],
        message=last["message"],
    )  # fmt: skip
