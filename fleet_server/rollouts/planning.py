"""The waves that operators ask for, as this fleet's devices make them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.contract.assignment import slot
from fleet_server.errors import Invalid
from fleet_server.rollouts import machine
from fleet_server.rollouts.machine import Wave
from fleet_server.storage.models import Device

GROUPS_NAMED = 20


def read(texts: Sequence[str], groups: Iterable[str], permille: int | None) -> tuple[Wave, ...]:
    """The waves in `texts` (`machine.read_waves`); without any, a first one of groups and a share, and everyone.  Raises: Invalid."""
    first = tuple(dict.fromkeys(groups))
    if texts and (first or permille is not None):
        raise Invalid("name all waves, or the groups and the share of the first one; not both")
    try:
        return machine.read_waves(texts) if texts else machine.waves(first, permille)
    except ValueError as error:
        raise Invalid(str(error)) from error


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
