"""Thousands of simulated devices in one asyncio loop, and what they have done so far."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from agent.contract.codec import ContractError
from agent.contract.manifest import ReleaseManifest
from agent.contract.names import ReleaseRef
from fleet_server import descriptors
from fleet_server.errors import FleetError, Refused, Unavailable
from fleet_server.simulation.behaviours import Behaviour
from fleet_server.simulation.device import Device, Known
from fleet_server.simulation.link import KEEPALIVE_S, Link
from fleet_server.simulation.looks import Looker
from fleet_server.simulation.members import Member
from fleet_server.simulation.news import Reader, Said
from fleet_server.simulation.pace import Pace, Realism
from fleet_server.simulation.papers import Address, Papers, SharedContext
from fleet_server.simulation.voice import Voice

CONNECTING = 6
"""Threads that connect. A broker on one processor takes as many handshakes at a time as it takes one after the other."""

LOOKING = 4
OWN_DESCRIPTORS = 256
MISS_AGAIN_S = 5.0
CLOSED_WITHIN_S = 5.0
CLOCK_OFF_S = 3 * 365 * 86400.0


class Counted(msgspec.Struct):
    """What happened so far."""

    reports: int = 0
    events: int = 0
    pokes: int = 0
    looks: int = 0
    requests: int = 0
    distrusted: list[str] = []
    """Words of the fleet that did not verify, and of devices that are no devices."""
    unanswered: int = 0
    fetched_bytes: int = 0
    unreadable: int = 0


class Shared(msgspec.Struct, frozen=True):
    """What all devices of a crowd have in common."""

    address: Address
    context: SharedContext
    loop: asyncio.AbstractEventLoop
    connecting: ThreadPoolExecutor
    looking: ThreadPoolExecutor
    reader: Reader
    manifests: dict[ReleaseRef, ReleaseManifest]
    counted: Counted
    folder: Path
    realism: Realism
    bad: Collection[ReleaseRef]
    seed: int
    changed: Callable[[], None]


class Simulated:
    """One device: what decides (`Device`), what speaks (`Voice`), what carries it (`Link`), and the timer that wakes it."""

    def __init__(
        self, shared: Shared, member: Member, papers: Papers, *, verifies: bool, fetches: bool, number: int = 0
    ) -> None:
        self._shared, self.member = shared, member
        rng = random.Random(f"{shared.seed} {member.id} {number}")  # noqa: S311 - to be repeated, not to be secret
        self._pace = pace = Pace(rng, member.behaviour, shared.realism)
        off_s = rng.choice((-CLOCK_OFF_S, CLOCK_OFF_S)) if member.behaviour is Behaviour.WRONG_CLOCK else 0.0
        self._wall: Callable[[], float] = lambda: time.time() + off_s
        self.link = Link(
            shared.address, papers, shared.context, shared.loop, shared.connecting, self,
            speed=shared.realism.speed, jitter=pace.jitter, wall=self._wall,
        )  # fmt: skip
        self.voice = Voice(member, papers, self.link, self._wall, f"{rng.getrandbits(64):016x}", shared.counted)
        self.device = Device(member, pace, self.voice, self._known, self._wall, shared.bad)
        self.voice.spoilt = lambda: self.device.spoilt
        self._looker = Looker(shared.address, papers, shared.folder / "trust" / f"{member.id}-{number}") if verifies else None
        self._papers, self._number = papers, number
        if fetches:
            self.device.fetch = self._fetch
        self._timer: asyncio.TimerHandle | None = None
        self._looks_again: asyncio.TimerHandle | None = None
        self._waits: Said | None = None
        self._looking = False

    def start(self) -> None:
        self.link.start()

    def stop(self, *, politely: bool) -> None:
        for timer in (self._timer, self._looks_again):
            if timer is not None:
                timer.cancel()
        if politely and not self.device.muted:
            self.link.goodbye()
        else:
            self.link.stop()

    def flap(self) -> None:
        """Lets the connection break now, and again and again."""
        self.link.break_off()
        self._shared.loop.call_later(self._pace.flap_s(), self.flap)

    # -- Hears: what the link tells ----------------------------------------------------------------------------------------

    def linked(self) -> None:
        self.device.connected(self._now())
        if self._looker is not None and self.device.assignment is None:
            self._look(Said())  # as an agent does at its start
        self._wake()

    def unlinked(self) -> None:
        self.device.disconnected()
        self._shared.changed()

    def poked(self, payload: bytes, alone: bool) -> None:
        self._shared.counted.pokes += 1
        try:
            said = self._shared.reader.read(payload)
        except ContractError:
            self._shared.counted.unreadable += 1
            return
        if self._looker is not None:
            self._look(said)
        elif said.assignment is not None:
            self._hear(said)
        else:
            delay_s = 0.0 if alone else said.spread_s * self._pace.jitter()
            self._shared.loop.call_later(delay_s, self._look, said)

    def acknowledged(self, mid: int) -> None:
        number = self.voice.acknowledged(mid)
        if number is not None:
            self.device.delivered(number, self._now())
            self._wake()

    # -- hearing and looking -----------------------------------------------------------------------------------------------

    def _hear(self, said: Said) -> None:
        assert said.assignment is not None
        for manifest in said.manifests:
            self._shared.manifests.setdefault(manifest.ref, manifest)
        groups = said.groups if said.groups is not None else self.device.groups
        self.device.hear(said.assignment, groups, self._now())
        if self.device.missing:
            self._look(Said())
        self._wake()

    def _look(self, said: Said) -> None:
        """Asks the fleet server, or verifies what a poke carried, in a thread beside the loop; one at a time."""
        if self._looking:
            self._waits = said
            return
        self._looking = True
        shared = self._shared
        looker = self._looker or Looker(
            shared.address, self._papers, shared.folder / "trust" / f"{self.member.id}-{self._number}"
        )
        shared.counted.looks += 1

        def work() -> tuple[Said | None, str, int]:
            before = looker.asked
            try:
                return looker.look(said.news), "", looker.asked - before
            except Refused as error:
                return None, str(error), looker.asked - before
            except Unavailable:
                return None, "", looker.asked - before

        shared.loop.run_in_executor(shared.looking, work).add_done_callback(lambda done: self._looked(*done.result()))

    def _looked(self, said: Said | None, distrusted: str, asked: int) -> None:
        self._looking = False
        counted = self._shared.counted
        counted.requests += asked
        if distrusted:
            counted.distrusted.append(distrusted)
        elif said is None:
            counted.unanswered += 1
            delay_s = MISS_AGAIN_S * (0.75 + 0.5 * self._pace.jitter())
            self._looks_again = self._shared.loop.call_later(delay_s, self._look, Said())
        else:
            self._hear(said)
        if (waits := self._waits) is not None:
            self._waits = None
            self._look(waits)

    def _known(self, ref: ReleaseRef) -> Known | None:
        manifest = self._shared.manifests.get(ref)
        if manifest is None:
            return None
        variant = manifest.variants[0]
        return Known(manifest.model_sha256(variant), variant.name)

    def _fetch(self, ref: ReleaseRef) -> None:
        shared, manifest = self._shared, self._shared.manifests[ref]
        looker = self._looker or Looker(
            shared.address, self._papers, shared.folder / "trust" / f"{self.member.id}-{self._number}"
        )
        hashes = sorted({file.sha256 for file in manifest.files.values()})

        def work() -> tuple[int, str]:
            try:
                return sum(map(looker.blob, hashes)), ""
            except FleetError as error:
                return 0, str(error)

        def done(size: int, problem: str) -> None:
            shared.counted.fetched_bytes += size
            shared.counted.requests += len(hashes)
            self.device.fetched(ref, self._now(), problem)
            self._wake()

        shared.loop.run_in_executor(shared.looking, work).add_done_callback(lambda future: done(*future.result()))

    # -- time --------------------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return self._shared.loop.time()

    def _wake(self) -> None:
        """Does what is due, and sets the timer for what comes next."""
        self.device.step(self._now())
        if self.device.muted:
            self.link.mute()
        if self._timer is not None:
            self._timer.cancel()
        at = self.device.next_at()
        self._timer = self._shared.loop.call_at(at, self._wake) if at < float("inf") else None
        self._shared.changed()


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
        self.moved = asyncio.Event()
        """Set whenever something happened."""
        self._shared = shared = Shared(
            address, SharedContext(address.ca), asyncio.get_running_loop(), ThreadPoolExecutor(CONNECTING, "connecting"),
            ThreadPoolExecutor(LOOKING, "looking"), Reader(), {manifest.ref: manifest for manifest in manifests}, self.counted, folder,
            realism, bad, seed, self.moved.set,
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
        return sum(one.link.connected for one in self.devices)

    def standings(self, ref: ReleaseRef) -> collections.Counter[str]:
        """How many devices stand how to a release: committed, refused, rolled_back, busy or other."""
        found: collections.Counter[str] = collections.Counter()
        for one in self.devices:
            found[standing(one.device, ref)] += 1
        return found

    def problems(self) -> list[str]:
        """Why devices are not connected, the most frequent cause first."""
        causes = collections.Counter(one.link.problem for one in self.devices if not one.link.connected and one.link.problem)
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
