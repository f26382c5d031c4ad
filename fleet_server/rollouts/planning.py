"""The waves that operators ask for, as this fleet's devices make them."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.contract.assignment import EVERYONE, slot
from agent.contract.scopes import Scope, text_of
from fleet_server.errors import Invalid
from fleet_server.rollouts import growth, machine, rules
from fleet_server.rollouts.machine import Wave
from fleet_server.storage.models import Device, RolloutRow

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


def draw(session: Session, number: int, waves: Sequence[Wave], model: str, scope: Scope) -> str:
    """The id of a rollout with these waves for this scope. It decides which devices come first, so several are drawn, and the one is taken whose first wave has
    most hardware classes, then most sites (label `site`), then most devices that are there; and of those alike, whose first three do.
    """
    ahead = rules.ahead_of(session, RolloutRow(model=model, scope=rules.stored(scope)))
    query = select(Device.id, Device.groups, Device.hardware_class, Device.labels, Device.present).where(
        Device.revoked.is_(False)
    )
    devices = [
        Drawn(row.id, frozenset(row.groups), row.hardware_class, row.labels.get(SITE), row.present)
        for row in session.execute(query)
        if rules.follows(scope, ahead, rules.identity_of(row))
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
    """How well the first wave of a rollout of this name is spread over what the devices are; the larger the better. One that reaches more
    devices than it is to is the worst: devices whose slots are alike, or many below a small share. Pure.
    """
    placed = sorted(((slot(name, one.id), one) for one in devices), key=lambda pair: pair[0])
    first = machine.resolved(waves[:1], [(place, one.groups) for place, one in placed])[0]
    reached = [one for place, one in placed if place < first.permille or not one.groups.isdisjoint(first.groups)]
    there = [one for one in reached if one.there]
    few = there[: growth.UNHEARD]
    too_many = max(0, len(reached) - _asked(waves[0], len(devices)))
    return (-too_many, _kinds(there), _sites(there), len(there), _kinds(few), _sites(few))


def _asked(wave: Wave, devices: int) -> int:
    """How many of so many devices the first wave is to reach at most; a share is rounded up, and groups are all in it."""
    if wave.groups:
        return devices
    return wave.count or max(1, -(-wave.permille * devices // EVERYONE))


def _kinds(devices: Sequence[Drawn]) -> int:
    return len({one.hardware for one in devices if one.hardware is not None})


def _sites(devices: Sequence[Drawn]) -> int:
    return len({one.site for one in devices if one.site is not None})


def resolve(session: Session, row: RolloutRow, waves: Sequence[Wave]) -> tuple[Wave, ...]:
    """The waves of the rollout, by the devices that follow its rule.  Raises: Invalid when one of them names a group that none of them is
    in.
    """
    scope, ahead = rules.scope_of(row), rules.ahead_of(session, row)
    devices = [
        (slot(row.team or row.id, one.device), frozenset(one.groups))
        for one in rules.identities(session)
        if rules.follows(scope, ahead, one)
    ]
    known = {group for _, groups in devices for group in groups}
    if nobody := [group for wave in waves for group in wave.groups if group not in known]:
        named = ", ".join(sorted(known)[:GROUPS_NAMED]) or "none"
        raise Invalid(
            f"no device{' of ' + text_of(scope) if scope else ''} is in the group {nobody[0]!r}, so a wave would reach nobody; groups with devices: {named}",
            code="nobody",
        )
    return machine.resolved(waves, devices)
