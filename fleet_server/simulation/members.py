"""Who the simulated devices are: made up, or those of a real fleet's inventory. Pure."""

from __future__ import annotations

import collections
import random
from collections.abc import Sequence

import msgspec

from agent.contract import names
from agent.contract.codec import ContractError, decode
from agent.contract.reports import Hardware, ModelState, hardware_class
from fleet_server.errors import Invalid
from fleet_server.simulation import behaviours
from fleet_server.simulation.behaviours import Behaviour, Share

MAX_INVENTORY_BYTES = 512 * 1024 * 1024
CANARY = "canary"
CANARIES = 50
"""One made-up device in so many is in the group `canary`."""

KINDS = (
    Hardware(arch="aarch64", machine="Raspberry Pi 5 Model B", os="Debian 12", cpus=4, memory_bytes=8 * 2**30),
    Hardware(
        arch="aarch64", machine="NVIDIA Jetson Orin Nano", os="Ubuntu 22.04", cpus=6, memory_bytes=8 * 2**30, accelerator="cuda"
    ),
    Hardware(arch="x86_64", machine="Intel NUC 11", os="Debian 12", cpus=8, memory_bytes=16 * 2**30),
)


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One device to be simulated. `runs`: the release of each model that it begins with; `held`: models that it keeps on that."""

    id: str
    groups: tuple[str, ...]
    hardware: Hardware
    runs: dict[str, int]
    held: frozenset[str] = frozenset()
    behaviour: Behaviour = Behaviour.HONEST

    @property
    def hardware_class(self) -> str:
        return hardware_class(self.hardware)


class _Listed(msgspec.Struct):
    """What is read of a device in `edge-fleet device list --json`."""

    id: str
    groups: list[str] = []
    hardware: Hardware | None = None
    models: dict[str, ModelState] = {}
    revoked: bool = False


def made_up(count: int, model: str, release: int, shares: Sequence[Share], seed: int) -> list[Member]:
    """`count` devices of three kinds of hardware that run one release.  Raises: Invalid."""
    rng = random.Random(f"members {seed}")  # noqa: S311 - to be repeated, not to be secret
    return [
        Member(
            id=f"sim-{number:05}", groups=(CANARY,) if number % CANARIES == 1 else (), hardware=rng.choice(KINDS),
            runs={model: release}, behaviour=behaviour,
        )
        for number, behaviour in enumerate(behaviours.draw(count, shares, seed), start=1)
    ]  # fmt: skip


def from_inventory(data: bytes, shares: Sequence[Share], seed: int) -> list[Member]:
    """The devices of `edge-fleet device list --json`, those that were shut out left out: groups, hardware, what they run.

    Raises: Invalid that says what is wrong with it.
    """
    try:
        listed = [one for one in decode(data, list[_Listed], limit_bytes=MAX_INVENTORY_BYTES) if not one.revoked]
        for one in listed:
            names.check(names.DEVICE_ID, one.id, "device id")
            for group in one.groups:
                names.check(names.GROUP_NAME, group, "group")
            for model in one.models:
                names.check_model(model)
    except (ContractError, ValueError) as error:
        raise Invalid(f"this is not what `edge-fleet device list --json` prints: {error}") from error
    twice = [device for device, number in collections.Counter(one.id for one in listed).items() if number > 1]
    if twice:
        raise Invalid(f"device {twice[0]!r} stands in the inventory twice")
    return [
        Member(
            id=one.id, groups=tuple(one.groups), hardware=one.hardware or KINDS[0], behaviour=behaviour,
            runs={model: said.serving for model, said in one.models.items() if said.serving is not None and said.serving > 0},
            held=frozenset(model for model, said in one.models.items() if said.held),
        )
        for one, behaviour in zip(listed, behaviours.draw(len(listed), shares, seed), strict=True)
    ]  # fmt: skip


def most_run(members: Sequence[Member]) -> dict[str, int]:
    """Model → the release that most devices run, the newer of two that as many run."""
    found: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for member in members:
        for model, release in member.runs.items():
            found[model][release] += 1
    return {model: max((number, release) for release, number in counts.items())[1] for model, counts in found.items()}
