"""Thousands of simulated devices in one asyncio loop."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from agent.contract.manifest import ReleaseManifest
from agent.contract.names import ReleaseRef
from fleet_server import descriptors
from fleet_server.errors import Unavailable
from fleet_server.simulation.behaviours import BREAKS, Behaviour
from fleet_server.simulation.device import Device
from fleet_server.simulation.link import KEEPALIVE_S
from fleet_server.simulation.members import Member
from fleet_server.simulation.news import Reader
from fleet_server.simulation.pace import Realism
from fleet_server.simulation.papers import Address, Papers, SharedContext
from fleet_server.simulation.simulated import Counted, Shared, Simulated

CONNECTING = 6
"""Threads that connect. A broker on one processor takes as many handshakes at a time as it takes one after the other."""

LOOKING = 4
OWN_DESCRIPTORS = 256
CLOSED_WITHIN_S = 5.0


class Crowd:
    """Every simulated device. Made, used and closed in one running loop."""

    def __init__(
        self, address: Address, members: Sequence[Member], papers: Mapping[str, Papers], folder: Path, *, realism: Realism, seed: int,
        bad: Collection[ReleaseRef], manifests: Iterable[ReleaseManifest] = (),
    ) -> None:  # fmt: skip
        """`manifests`: of the releases that the devices run already. `bad`: the releases with which they behave as they are to.

        Raises: Unavailable when this process may not have as many connections.
        """
        clones = sum(member.behaviour is Behaviour.CLONED for member in members)
        needed, allowed = len(members) + clones + OWN_DESCRIPTORS, descriptors.raise_limit()
        if needed > allowed:
            raise Unavailable(
                f"{len(members)} devices need {needed} open files and this process may have {allowed}: raise the limit "
                "(ulimit -n, LimitNOFILE of a unit), or simulate fewer"
            )
        self.counted = Counted()
        self._shared = shared = Shared(
            address, SharedContext(address.ca), asyncio.get_running_loop(), ThreadPoolExecutor(CONNECTING, "connecting"),
            ThreadPoolExecutor(LOOKING, "looking"), Reader(), {manifest.ref: manifest for manifest in manifests}, self.counted, folder,
            realism, bad, seed,
        )  # fmt: skip
        rng = random.Random(f"realism {seed}")  # noqa: S311 - to be repeated, not to be secret
        there = [member for member in members if member.behaviour is not Behaviour.OFFLINE]
        verify, fetch = (
            {member.id for member in rng.sample(there, min(len(there), round(share * len(there)) or (share > 0)))}
            for share in (realism.verify, realism.fetch)
        )
        self.devices = [
            Simulated(shared, one, papers[one.id], verifies=one.id in verify, fetches=one.id in fetch) for one in there
        ]
        self.clones = [
            Simulated(shared, one, papers[one.id], verifies=False, fetches=False, number=1)
            for one in there
            if one.behaviour is Behaviour.CLONED
        ]
        self.verifying = len(verify)
        self._misbehave = False
        self._keeping = asyncio.create_task(self._keep_alive())

    def start(self) -> None:
        """Lets every device connect."""
        for one in self.devices:
            one.start()

    def misbehave(self) -> None:
        """From now on connections break and second machines come; whatever else devices do wrong begins with the new release. Once
        is enough.
        """
        if self._misbehave:
            return
        self._misbehave = True
        for clone in self.clones:
            clone.start()
        for one in self.devices:
            if one.member.behaviour is Behaviour.FLAPPING:
                one.flap()

    async def close(self, *, politely: bool = False) -> None:
        """Ends every connection; `politely` as agents do that are stopped."""
        self._keeping.cancel()
        for one in self.all():
            one.stop(politely=politely)
        for pool in (self._shared.connecting, self._shared.looking):
            with contextlib.suppress(
                asyncio.TimeoutError
            ):  # a broker or server that hangs; the threads end with their time limits
                await asyncio.wait_for(asyncio.to_thread(pool.shutdown, wait=True, cancel_futures=True), CLOSED_WITHIN_S)
        await asyncio.sleep(0)

    def all(self) -> Iterator[Simulated]:
        yield from self.devices
        yield from self.clones

    def connected(self) -> int:
        return self.counted.connected

    def standings(self, ref: ReleaseRef) -> collections.Counter[str]:
        """How many devices stand how to a release: committed, refused, rolled_back, busy or other."""
        found: collections.Counter[str] = collections.Counter()
        for one in self.devices:
            found[standing(one.device, ref)] += 1
        return found

    def problems(self) -> list[str]:
        """Why devices are not connected whose connection is to hold, the most frequent cause first."""
        there = [one for one in self.devices if one.member.behaviour not in BREAKS]
        causes = collections.Counter(one.link.problem for one in there if not one.link.connected and one.link.problem)
        return [f"{number} devices: {text}" for text, number in causes.most_common(5)]

    async def _keep_alive(self) -> None:
        turns = KEEPALIVE_S // 3
        while True:
            for turn in range(turns):
                for one in self.devices[turn::turns]:
                    one.link.keep_alive()
                await asyncio.sleep(1.0)


def standing(device: Device, ref: ReleaseRef) -> str:
    """How a device itself takes its standing to a release."""
    model = device.models.get(ref.model)
    if model is None:
        return "other"
    last = next((answer for answer in reversed(model.answers) if answer.release == ref.version), None)
    if last is not None and last.outcome.value != "committed":
        return last.outcome.value
    if model.serving == ref.version and ref.version in model.committed and model.target is None:
        return "committed"
    return "busy" if model.target is not None else "other"
