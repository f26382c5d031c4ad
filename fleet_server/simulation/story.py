"""What happens in a rehearsal: the devices connect, a rollout begins, its gates decide, and every device comes to rest. Beside a server
that runs, whoever started it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

import msgspec

from agent.contract.names import ReleaseRef
from fleet_server.client import Client
from fleet_server.errors import Unavailable
from fleet_server.rollouts.gates import NOT_COUNTED, TO_ANSWER
from fleet_server.simulation import expected
from fleet_server.simulation.behaviours import BREAKS, Behaviour
from fleet_server.simulation.crowd import Crowd
from fleet_server.simulation.expected import End, Ending, Plan, Stage
from fleet_server.simulation.members import Member
from fleet_server.simulation.pace import Realism
from fleet_server.simulation.report import Moment, Report, Sent
from fleet_server.simulation.simulated import Simulated

T = TypeVar("T")

LOOK_S = 0.1
"""Between two looks at how the devices stand."""

NOTED_S = 0.25
"""Between two notes of the course of a rollout."""

MANY = 10_000
"""Of so many devices the states take some hundredths of a second to read: once a second then."""

CONNECTED_STILL_S = 45.0
"""When for so long no further device was connected, the rehearsal goes on with those that are."""

SERVER_KNOWS_S = 60.0
SERVER_AWAY_S = 60.0
QUIET_S = 5.0
"""A rollout in which nothing has changed for so long after the last silent device was noticed waits for good."""

PAGE = 1000
GROUP = "simulated"
"""What the names of groups begin with that devices on a running server are in."""

OVER = frozenset({"completed", "aborted"})
CLAIMS = ("pending", *(one.value for one in TO_ANSWER), "failed", "timed_out")
"""The standings of devices that are there and never answer. A server may be older, and know `pending` alone."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be rehearsed. `silence_s`: after how long the server counts a device as offline; `timeout_s`: of the whole."""

    members: list[Member]
    release: ReleaseRef
    plan: Plan
    seed: int
    realism: Realism
    silence_s: float
    timeout_s: float


class Shown(Protocol):
    """Who shows how far it is."""

    def show(self, what: str, done: int, total: int, /) -> None: ...


class Nobody:
    """Shows nothing."""

    def show(self, _what: str, _done: int, _total: int, /) -> None:
        return


class Story:
    """One rehearsal. Every method may raise ServerRefused and Unavailable."""

    def __init__(self, client: Client, crowd: Crowd, order: Order, shown: Shown, server_ended: Callable[[], bool]) -> None:
        """`server_ended`: whether the server is gone for good."""
        self._client, self.crowd, self._order, self._shown, self._server_ended = client, crowd, order, shown, server_ended
        self._began = time.monotonic()
        self._started = 0.0
        self.moments: list[Moment] = []
        self.rollout: dict[str, Any] = {}

    async def tell(self) -> Report:
        """From the first connection to the last commit."""
        connecting_s = await self.connect()
        return await self.roll_out(connecting_s)

    async def roll_out(self, connecting_s: float = 0.0) -> Report:
        """The rollout alone, with devices that are connected."""
        connected = self.crowd.connected()
        self._started = time.monotonic()
        course = asyncio.create_task(self._note_course())  # beside the questions to the server, whose answers may take seconds
        try:
            await self.begin()
            late = await self.follow()
            over_s = time.monotonic() - self._started
            settled_s, lost = await self.settle()
        finally:
            course.cancel()
        self._note()
        return await self._report(connected, connecting_s, over_s, settled_s, lost, late=late)

    async def connect(self) -> float:
        """Connects every device, and waits until the server knows all that are there and nobody is busy; how many seconds the
        connecting took.
        """
        crowd, total, began = self.crowd, len(self.crowd.devices), time.monotonic()
        crowd.start()
        done, since = 0, began
        while done < total and time.monotonic() - since < CONNECTED_STILL_S:
            await self._pause()
            if (now := crowd.connected()) != done:
                done, since = now, time.monotonic()
                self._shown.show("devices connect", done, total)
        took_s = time.monotonic() - began
        if not done:
            raise Unavailable(f"no device could connect: {'; '.join(crowd.problems()) or 'no answer'}")
        await self._until_all_are_known()
        while any(one.device.busy for one in crowd.devices):
            await self._pause()
            if self._late():
                raise Unavailable("the devices did not come to rest on what they are told to run within the time")
            self._shown.show("devices come to rest", sum(not one.device.busy for one in crowd.devices), total)
        return took_s

    async def _until_all_are_known(self) -> None:
        """Until the server counts every device as online that is connected.  Raises: Unavailable when it comes to know no more of them."""
        since, most = time.monotonic(), -1
        while (known := (await self._get("/status"))["devices"]["online"]) < self.crowd.connected():
            if known > most:
                since, most = time.monotonic(), known
            if time.monotonic() - since > SERVER_KNOWS_S:
                raise Unavailable(f"the server knows only {known} of {self.crowd.connected()} devices that are connected")
            await self._pause(0.3)

    async def begin(self) -> None:
        """Starts the rollout, and lets devices do wrong what they are to do wrong."""
        order, plan = self._order, self._order.plan
        body = {
            "release": str(order.release), "max_failures": plan.max_failures, "failure_share": plan.failure_share, "confirm": plan.confirm, "at_once": plan.at_once,
            "waves": [stage.group or f"{stage.permille / 10:g}%" for stage in plan.stages],
        }  # fmt: skip
        self.crowd.misbehave()
        self.rollout = await asyncio.to_thread(self._client.post, "/rollouts", body)

    async def follow(self) -> bool:
        """Until the rollout is over, or nothing more can happen to it; whether the time ran out before."""
        still_since, before = time.monotonic(), None
        while True:
            self.rollout = view = await self._get(f"/rollouts/{quote(self.rollout['id'], safe='')}")
            state, verdict = view["state"], view["verdict"] or {"counts": {}, "verdict": ""}
            busy = any(one.device.busy and not one.device.muted for one in self.crowd.devices)
            now = (state, view["wave"], verdict["counts"])
            if now != before or busy:
                still_since, before = time.monotonic(), now
            if state in OVER or state == "waiting":
                return False
            if time.monotonic() - still_since > self._order.silence_s + QUIET_S:
                return False
            if self._late():
                return True
            await self._pause(max(LOOK_S, len(self.crowd.devices) / MANY))

    async def settle(self) -> tuple[float | None, list[str]]:
        """Until every device that does nothing wrong is where it should be, by its own word and by the server's; how many
        seconds after the rollout's start the last one was (None: not in time), and who is not.
        """
        version = (await self._get("/assignment"))["version"]
        good = [one for one in self.crowd.devices if expected.does_well(one.member, self._order.release.model)]
        while not self._late():
            lost = [one for one in good if not self._at_rest(one, version)]
            if not lost:
                settled_s = time.monotonic() - self._started
                return settled_s, await self._unknown(good)
            self._shown.show("devices come to rest", len(good) - len(lost), len(good))
            await self._pause(max(LOOK_S, len(good) / MANY))
        return None, [one.member.id for one in good if not self._at_rest(one, version)]

    def _at_rest(self, one: Simulated, version: int) -> bool:
        device = one.device
        model = device.models.get(self._order.release.model)
        heard = device.assignment is not None and device.assignment.version >= version
        return heard and model is not None and not device.busy and model.serving == model.wanted

    async def _unknown(self, good: list[Simulated]) -> list[str]:
        """Devices of which the server, in the end, does not know what they serve."""
        model = self._order.release.model
        wanted = {one.member.id: one.device.models[model].serving for one in good}
        since, fewest = time.monotonic(), len(good) + 1
        while True:
            known = await self._serving(model)
            missing = [device for device, serving in wanted.items() if known.get(device) != serving]
            if len(missing) < fewest:  # what it has not stored yet, it stores
                since, fewest = time.monotonic(), len(missing)
            if not missing or time.monotonic() - since > SERVER_KNOWS_S:
                return missing
            await self._pause(0.5)

    async def _serving(self, model: str) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        after: str | None = ""
        while after is not None:
            page = await self._get("/devices", limit=PAGE, after=after)
            found |= {one["id"]: (one["models"].get(model) or {}).get("serving") for one in page["devices"]}
            after = page["next"]
        return found

    # -- what is told ------------------------------------------------------------------------------------------------------

    async def _note_course(self) -> None:
        """Notes how things stand, a few times a second, until it is cancelled."""
        while True:
            self._note()
            await asyncio.sleep(max(NOTED_S, len(self.crowd.devices) / MANY))

    def _note(self) -> None:
        """Adds how things stand now to the course of the rollout, and shows it."""
        view = self.rollout or {"wave": 0, "state": "running"}
        stand = self.crowd.standings(self._order.release)
        bad = stand["refused"] + stand["rolled_back"]
        moment = Moment(
            at=round(time.monotonic() - self._started, 2), connected=self.crowd.connected(), busy=stand["busy"],
            committed=stand["committed"], bad=bad, wave=view["wave"], state=view["state"],
        )  # fmt: skip
        self.moments.append(moment)
        self._shown.show(f"wave {view['wave'] + 1}: devices commit", stand["committed"], len(self.crowd.devices))

    async def _report(
        self, connected: int, connecting_s: float, over_s: float, settled_s: float | None, lost: list[str], *, late: bool
    ) -> Report:
        order, view, crowd, counted = self._order, self.rollout, self.crowd, self.crowd.counted
        messages = (await self._get("/status"))["messages"]
        counts = (view["verdict"] or {"counts": {}})["counts"]
        state: End = view["state"]
        wants = expected.ending(order.members, order.plan, view["id"], order.release.model)
        why = view["reason"] or (view["verdict"] or {"why": "nobody answered"})["why"]
        held = [one for one in crowd.devices if one.member.behaviour not in BREAKS]
        return Report(
            devices=len(order.members), seed=order.seed, speed=order.realism.speed, release=str(order.release), rollout=view["id"],
            behaviours={one.value: sum(m.behaviour is one for m in order.members) for one in Behaviour},
            max_failures=order.plan.max_failures, failure_share=order.plan.failure_share, waves=[_named(stage) for stage in order.plan.stages],
            connected=connected, connecting_s=round(connecting_s, 2), over_s=round(over_s, 2),
            settled_s=round(settled_s, 2) if settled_s is not None else None, lost=lost, problems=crowd.problems(),
            ended=Ending(state, view["wave"], _reached(counts), _kinds(counts)), expected=wants, late=late, last_commit_s=_last_commit_s(self.moments),
            why=f"the time ran out: {why}" if late else why, moments=self.moments,
            sent=Sent(
                reports=counted.reports, events=counted.events, pokes=counted.pokes, requests=counted.requests,
                fetched_bytes=counted.fetched_bytes, verifying=crowd.verifying, distrusted=counted.distrusted,
                unanswered=counted.unanswered, reconnected=sum(max(0, one.link.connections - 1) for one in held),
                accepted=messages["accepted"], dropped=messages["dropped"],
            ),
        )  # fmt: skip

    # -- waiting -----------------------------------------------------------------------------------------------------------

    async def _get(self, path: str, **query: Any) -> Any:
        """Asked again for SERVER_AWAY_S when the server, which is busy, does not answer.  Raises: ServerRefused, Unavailable."""
        until = time.monotonic() + SERVER_AWAY_S
        while True:
            try:
                return await asyncio.to_thread(self._client.get, path, **query)
            except Unavailable:
                self._check()
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(LOOK_S)

    def _late(self) -> bool:
        return time.monotonic() - self._began > self._order.timeout_s

    async def _pause(self, seconds: float = LOOK_S) -> None:
        await asyncio.sleep(seconds)
        self._check()

    def _check(self) -> None:
        """Raises: Unavailable when the server is gone."""
        if self._server_ended():
            raise Unavailable("the server ended in the middle of the rehearsal")


def _last_commit_s(moments: list[Moment]) -> float | None:
    """When the last device committed that did, to the next note."""
    most = max(moment.committed for moment in moments)
    return next((moment.at for moment in moments if moment.committed == most), None) if most else None


def _reached(counts: dict[str, int]) -> int:
    """How many devices the rollout has come to."""
    return sum(counts.values()) - sum(counts.get(one.value, 0) for one in NOT_COUNTED)


def _kinds(counts: dict[str, int]) -> dict[str, int]:
    """The server's counts in the words of what devices come to count as."""
    return {
        "good": counts.get("committed", 0) + counts.get("shadowed", 0),
        "bad": counts.get("refused", 0) + counts.get("rolled_back", 0),
        "claims": sum(counts.get(name, 0) for name in CLAIMS),
        "held": counts.get("held", 0),
        "lost": counts.get("lost", 0),
        "silent": counts.get("offline", 0),
    }


def _named(stage: Stage) -> str:
    return stage.group or f"{stage.permille / 10:g} %"
