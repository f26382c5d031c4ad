"""How the server is, and what a person must do something about."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

import msgspec

from fleet_server.config import FleetConfig
from fleet_server.devices.pki import Authority
from fleet_server.devices.survey import Some, Survey
from fleet_server.devices.views import DeviceCount
from fleet_server.ingest.broker_views import BrokerView
from fleet_server.ingest.intake import Intake
from fleet_server.ingest.links import Link
from fleet_server.releases.online_keys import ONLINE
from fleet_server.releases.repository import Repository
from fleet_server.releases.trust import WARN_BEFORE_S
from fleet_server.rollouts.refusals import Refusals
from fleet_server.storage.processes import ProcessView

NAMED = 5  # devices in a warning
RESTORED_SAID_S = 30 * 86400.0  # for how long it is said that the server was restored


class Broker(Protocol):
    """What is asked of the broker's side."""

    @property
    def link(self) -> Link: ...

    def paused(self) -> list[str]:
        """The devices that are shut out for a while."""

    def warnings(self) -> list[str]: ...

    def view(self) -> BrokerView: ...


class Messages(msgspec.Struct, frozen=True):
    """How many messages of devices were stored since the start, and how many were dropped, by cause."""

    accepted: int
    dropped: dict[str, int]


class LeaderView(msgspec.Struct, frozen=True):
    """The process that decides and signs, with its fencing number, and since when."""

    number: int
    process: str
    since: float


class Several(Protocol):
    """What is known of the processes, where the server is several."""

    def leading(self) -> LeaderView | None: ...

    def processes(self) -> list[ProcessView]: ...

    def connected(self) -> bool: ...

    def messages(self) -> Messages: ...

    def paused(self) -> list[str]: ...

    def broker(self) -> BrokerView | None: ...

    def warnings(self) -> list[str]:
        """What those that speak with the broker say that a person must do something about."""


class StatusView(msgspec.Struct, frozen=True, kw_only=True):
    """How the server is. `expires`: when each role's signature ends; `warnings`: what a person must do something about, and
    what. `processes`: of a server that is several, and `leader`: which of them decides; empty and null for `edge-fleet serve`.
    """

    fleet: str
    version: str
    started: float
    devices: DeviceCount
    broker_connected: bool
    broker: BrokerView
    ca_sha256: str
    device_url: str
    expires: dict[str, float]
    messages: Messages
    warnings: list[str]
    leader: LeaderView | None
    processes: list[ProcessView]


def software_version() -> str:
    """Of the installed package; `0` where it runs uninstalled."""
    try:
        return version("edge-inference-agent")
    except PackageNotFoundError:
        return "0"


class Status:
    """Asks every part how it is."""

    def __init__(
        self, config: FleetConfig, authority: Authority, repository: Repository, survey: Survey, intake: Intake,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._config, self._authority, self._repository = config, authority, repository
        self._survey, self._intake, self._clock = survey, intake, clock
        self._started = clock()
        self.several: Several | None = None
        self.broker: Broker | None = None
        self.database_problem: Callable[[], str] = str
        self.stalled: Callable[[], list[tuple[str, str]]] = list
        """The rollouts that do not go on by themselves, and why."""
        self.refusals: Callable[[], list[Refusals]] = list
        """Devices that refuse what they should run after its rollout is complete."""
        self.authorities: Callable[[], list[str]] = list
        """What a person must know of the fleet's CAs."""
        self.restored: Callable[[], tuple[float, float] | None] = lambda: None
        """Of when the backup is that this server was restored from, and when it was restored."""

    def view(self) -> StatusView:
        expires, several = self._repository.expirations(), self.several
        messages = Messages(self._intake.accepted, dict(self._intake.dropped)) if several is None else several.messages()
        return StatusView(
            fleet=self._config.fleet, version=software_version(), started=self._started, devices=self._survey.count(),
            broker_connected=self._is_connected(), broker=self._broker(), ca_sha256=self._authority.fingerprint,
            device_url=self._config.device_url, expires=expires, messages=messages, warnings=self._warnings(expires),
            leader=several.leading() if several is not None else None, processes=several.processes() if several is not None else [],
        )  # fmt: skip

    def _broker(self) -> BrokerView:
        nobody = BrokerView(self._config.broker.kind)
        if self.several is not None:
            return self.several.broker() or nobody
        return self.broker.view() if self.broker is not None else nobody

    def _is_connected(self) -> bool:
        if self.several is not None:
            return self.several.connected()
        return self.broker is not None and self.broker.link.connected.is_set()

    def _of_processes(self) -> list[str]:
        """What is wrong with the processes of a server that is several."""
        if self.several is None:
            return [] if self._is_connected() else ["the broker is not connected; its log lines stand in the server's log"]
        found = []
        if self.several.leading() is None:
            found.append(
                "no `edge-fleet decide` leads: rollouts stand still, nothing is signed, and changes are refused; start one"
            )
        if not self.several.connected():
            found.append(
                "no `edge-fleet ingest` is connected to the broker, so nothing that devices say is stored; see its log"
            )
        known = self.several.processes()
        living = [one for one in known if not one.missing]
        return found + [
            f"{one.id} ended without saying so, and no other {one.kind} began on that machine since; it is forgotten after an hour"
            for one in known
            if one.missing and not any(other.place == one.place and other.since > one.seen for other in living)
        ]

    def _warnings(self, expires: dict[str, float]) -> list[str]:
        """What a person must do something about, and what."""
        side: Several | Broker | None = self.several or self.broker
        found = self._of_processes() + (side.warnings() if side is not None else [])
        if paused := side.paused() if side is not None else []:
            found.append(
                f"{_some(Some(len(paused), paused[:NAMED]))} sent or asked for more than a device may, and the broker takes nothing of them for a while: see what runs there, and revoke what is not "
                "yours"
            )
        found += [
            f"rollout {rollout} does not go on by itself: {why}; see who is missing (`edge-fleet rollout devices {rollout}`), skip those that "
            "are known to be broken, or abort it"
            for rollout, why in self.stalled()
        ]
        found += [
            f"refused after the end of rollout {one.rollout}: {one.release}, by {_some(Some(one.count, list(one.devices)))}: "
            f"{', '.join(f'{number} {cause}' for cause, number in one.causes.items())}; once they are repaired, `edge-fleet rollout retry "
            f"{one.rollout}`"
            for one in self.refusals()
        ]
        if problem := self.database_problem():
            found.insert(0, f"NOTHING IS STORED: {problem}")
        now = self._clock()
        if (restored := self.restored()) is not None and now - restored[1] < RESTORED_SAID_S:
            found.append(_lost(*restored))
        found += self.authorities()
        for role, at in expires.items():
            if role not in ONLINE and at - now < WARN_BEFORE_S:
                days, how = int((at - now) / 86400), f"`edge-fleet keys renew {role}`"
                how = how if role in {"root", "targets"} else f"publish a release, or run {how}"
                found.append(f"the {role} metadata ends in {days} days and devices stop updating then; {how}")
        ended, ending = (self._survey.certificates(state, NAMED) for state in ("ended", "ends_soon"))
        if ended.count:
            found.append(
                f"the certificate of {_some(ended)} has ended: `edge-fleet device list --certificate ended` lists them, `edge-fleet device "
                "allow-renewal NAME` lets one renew it late"
            )
        if ending.count:
            found.append(
                f"the certificate of {_some(ending)} ends soon and was not renewed: `edge-fleet device list --certificate ends-soon`; see "
                "whether they can reach this server"
            )
        if (shared := self._survey.shared(NAMED)).count:
            found.append(
                f"several machines report as each of {_some(shared)}: cards that were copied after they had been enrolled; enrol the "
                "copies as devices of their own (docs/how-to/image-many-devices.md)"
            )
        if (ahead := self._survey.ahead(NAMED)).count:
            found.append(
                f"{_some(ahead)} saw newer signed metadata than this server has and follow it no more: if it was restored from a copy, "
                "stop it and run `edge-fleet keys recover`; if not, somebody else speaks for this fleet"
            )
        return found


def _lost(taken: float, restored: float) -> str:
    """What to look after on a server that was restored from a backup."""
    copy, back = (dt.datetime.fromtimestamp(at).astimezone().isoformat(" ", "minutes") for at in (taken, restored))
    return (
        f"this server was restored at {back} from a backup of {copy}, and what was decided in between is lost: look at who was shut out, at "
        "groups, access tokens and running rollouts, and publish again what was published (docs/how-to/back-up-and-restore.md)"
    )


def _some(devices: Some) -> str:
    """`3 devices (a, b, c)`, with no more than a few named."""
    shown = ", ".join(devices.first) + (", …" if devices.count > len(devices.first) else "")
    return f"{devices.count} device{'s' if devices.count != 1 else ''} ({shown})"
