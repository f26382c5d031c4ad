"""One simulated device: what decides, what speaks, what carries it, and the timer that wakes it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec

from agent.contract.codec import ContractError
from agent.contract.manifest import ReleaseManifest
from agent.contract.names import ReleaseRef
from fleet_server.errors import FleetError, Refused, Unavailable
from fleet_server.simulation.behaviours import Behaviour
from fleet_server.simulation.device import Device, Known
from fleet_server.simulation.link import Link
from fleet_server.simulation.looks import Looker
from fleet_server.simulation.members import Member
from fleet_server.simulation.news import Reader, Said
from fleet_server.simulation.pace import Pace, Realism
from fleet_server.simulation.papers import Address, Papers, SharedContext
from fleet_server.simulation.voice import Voice

T = TypeVar("T")

MISS_AGAIN_S = 5.0
CLOCK_OFF_S = 3 * 365 * 86400.0


class Counted(msgspec.Struct):
    """What happened so far."""

    connected: int = 0
    """Devices that are connected now, second machines left out."""
    reports: int = 0
    events: int = 0
    pokes: int = 0
    looks: int = 0
    requests: int = 0
    distrusted: list[str] = []
    """What came as the fleet's word and did not verify, or could not be read."""
    unanswered: int = 0
    fetched_bytes: int = 0


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


class _Look(msgspec.Struct):
    """What became of a look. `asked`: requests that were made for it."""

    said: Said | None = None
    distrusted: str = ""
    unanswered: bool = False
    asked: int = 0


class Simulated:
    """One device of a crowd. Everything here belongs to the loop's thread."""

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
        self._papers, self._number = papers, number
        self._looker = self._make_looker() if verifies else None
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
        self._shared.counted.connected += self._number == 0
        self.device.connected(self._now())
        if self._looker is not None and self.device.assignment is None:
            self._look(Said())  # as an agent does at its start
        self._wake()

    def unlinked(self) -> None:
        self._shared.counted.connected -= self._number == 0
        self.device.disconnected()

    def poked(self, payload: bytes, alone: bool) -> None:
        self._shared.counted.pokes += 1
        try:
            said = self._shared.reader.read(payload)
        except ContractError as error:
            self._shared.counted.distrusted.append(f"{self.member.id}: {error}")
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
        looker = self._looker or self._make_looker()
        shared.counted.looks += 1

        def work() -> _Look:
            before, found = looker.asked, _Look()
            try:
                found.said = looker.look(said.news)
            except Refused as error:
                found.distrusted = str(error)
            except Unavailable:
                found.unanswered = True
            found.asked = looker.asked - before
            return found

        self._beside(work, self._looked)

    def _looked(self, found: _Look) -> None:
        self._looking = False
        counted = self._shared.counted
        counted.requests += found.asked
        if found.distrusted:
            counted.distrusted.append(found.distrusted)
        elif found.unanswered:
            counted.unanswered += 1
            delay_s = MISS_AGAIN_S * (0.75 + 0.5 * self._pace.jitter())
            self._looks_again = self._shared.loop.call_later(delay_s, self._look, Said())
        elif found.said is not None:
            self._hear(found.said)
        if (waits := self._waits) is not None:
            self._waits = None
            self._look(waits)

    def _make_looker(self) -> Looker:
        folder = self._shared.folder / "trust" / f"{self.member.id}-{self._number}"
        return Looker(self._shared.address, self._papers, folder)

    def _known(self, ref: ReleaseRef) -> Known | None:
        manifest = self._shared.manifests.get(ref)
        if manifest is None:
            return None
        variant = manifest.variants[0]
        return Known(manifest.model_sha256(variant), variant.name)

    def _fetch(self, ref: ReleaseRef) -> None:
        shared, manifest = self._shared, self._shared.manifests[ref]
        looker = self._looker or self._make_looker()
        hashes = sorted({file.sha256 for file in manifest.files.values()})

        def work() -> tuple[int, str]:
            try:
                return sum(map(looker.blob, hashes)), ""
            except FleetError as error:
                return 0, str(error)

        def done(found: tuple[int, str]) -> None:
            size, problem = found
            shared.counted.fetched_bytes += size
            shared.counted.requests += len(hashes)
            self.device.fetched(ref, self._now(), problem)
            self._wake()

        self._beside(work, done)

    def _beside(self, work: Callable[[], T], then: Callable[[T], None]) -> None:
        """Does something in a thread beside the loop, and then something with what came of it in the loop's."""

        def done(future: asyncio.Future[T]) -> None:
            if not future.cancelled():  # the crowd is closed
                then(future.result())

        self._shared.loop.run_in_executor(self._shared.looking, work).add_done_callback(done)

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
