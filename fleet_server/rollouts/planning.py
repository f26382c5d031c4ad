"""The waves that operators ask for, as this fleet's devices make them."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.contract.assignment import slot
from fleet_server.errors import Invalid
from fleet_server.rollouts import growth, machine
from fleet_server.rollouts.machine import Wave
from fleet_server.storage.models import Device

GROUPS_NAMED = 20
SITE = "site"
CANDIDATES = 32
HASHES = 100_000
"""How many devices' slots are worked out for all candidates together: a tenth of a second. In a large fleet any draw is spread well."""


def read(texts: Sequence[str], groups: Iterable[str], permille: int | None) -> tuple[Wave, ...]:
    """The waves in `texts` (`machine.read_waves`); without any, a first one of groups and a share, and everyone.  Raises: Invalid."""
    first = tuple(dict.fromkeys(groups))
    if texts and (first or permille is not None):
        raise Invalid("name all waves, or the groups and the share of the first one; not both")
    try:
        return machine.read_waves(texts) if texts else machine.waves(first, permille)
    except ValueError as error:
        raise Invalid(str(error)) from error


def draw(session: Session, number: int, waves: Sequence[Wave]) -> str:
    """The id of a rollout with these waves. It decides which devices come first, so several are drawn, and the one is taken whose first wave has
    most hardware classes, then most sites (label `site`), then most devices that are there; and of those alike, whose first three do.
    """
    query = select(Device.id, Device.groups, Device.hardware_class, Device.labels, Device.present).where(
        Device.revoked.is_(False)
    )
    devices = [
        Drawn(row.id, frozenset(row.groups), row.hardware_class, row.labels.get(SITE), row.present)
        for row in session.execute(query)
    ]
    found = [f"r{number}-{secrets.token_hex(2)}" for _ in range(max(1, min(CANDIDATES, HASHES // max(1, len(devices)))))]
    return max(found, key=lambda name: spread(name, devices, waves)) if len(found) > 1 else found[0]


class Drawn(msgspec.Struct, frozen=True):
    """A device that a wave may reach."""

    id: str
    groups: frozenset[str]
    hardware: str | None
    site: str | None
    there: bool


def spread(name: str, devices: Sequence[Drawn], waves: Sequence[Wave]) -> tuple[int, ...]:
    """How well the first wave of a rollout of this name is spread over what the devices are; the larger the better. Pure."""
    placed = sorted(((slot(name, one.id), one) for one in devices), key=lambda pair: pair[0])
    first = machine.resolved(waves[:1], [(place, one.groups) for place, one in placed])[0]
    reached = [one for place, one in placed if place < first.permille or not one.groups.isdisjoint(first.groups)]
    there = [one for one in reached if one.there]
    few = there[: growth.UNHEARD]
    return (_kinds(there), _sites(there), len(there), _kinds(few), _sites(few))


def _kinds(devices: Sequence[Drawn]) -> int:
    return len({one.hardware for one in devices if one.hardware is not None})


def _sites(devices: Sequence[Drawn]) -> int:
    return len({one.site for one in devices if one.site is not None})


def resolve(session: Session, rollout: str, waves: Sequence[Wave]) -> tuple[Wave, ...]:
    """The waves of the rollout with this id.  Raises: Invalid when one of them names a group that nobody is in."""
    query = select(Device.id, Device.groups).where(Device.revoked.is_(False))
    devices = [(slot(rollout, device), frozenset(groups)) for device, groups in session.execute(query)]
    known = {group for _, groups in devices for group in groups}
    if nobody := [group for wave in waves for group in wave.groups if group not in known]:
        named = ", ".join(sorted(known)[:GROUPS_NAMED]) or "none"
        raise Invalid(
            f"no device is in the group {nobody[0]!r}, so a wave would reach nobody; groups with devices: {named}",
            code="nobody",
        )
    return machine.resolved(waves, devices)
