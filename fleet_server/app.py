"""The composition root of `edge-fleet serve`: makes every part, wires them, starts and stops them in order.

Start: lock, configuration, database, certificates, repository (checked, renewed, reconciled with the database), broker, MQTT
link, listeners, READY. Stop is the reverse, so that nothing is asked of a part that is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator

from agent.common.systemd import notify
from agent.contract.addresses import Addresses
from fleet_server import descriptors, housekeeping, listeners
from fleet_server.access import Access
from fleet_server.api import device as device_api
from fleet_server.api.operator import app as operator_api
from fleet_server.api.shared_port import SharedPort
from fleet_server.api.tls import Listener
from fleet_server.broker import sessions
from fleet_server.broker import settings as broker_settings
from fleet_server.broker.door import Door
from fleet_server.broker.subscriptions import SubscriptionWatch
from fleet_server.broker.supervisor import Supervisor
from fleet_server.config import FleetConfig, Folder, load
from fleet_server.devices.adoption import Adoption
from fleet_server.devices.enrolment import Enrolment
from fleet_server.devices.inventory import Inventory
from fleet_server.devices.pki import Authority
from fleet_server.devices.renewals import Renewals
from fleet_server.devices.survey import Survey
from fleet_server.errors import Unavailable
from fleet_server.housekeeping import Housekeeping
from fleet_server.ingest.intake import Intake
from fleet_server.ingest.mqtt_link import MqttLink
from fleet_server.ingest.pokes import LONGEST_SPREAD_S, Pokes
from fleet_server.ingest.transfers import TransferAnswers
from fleet_server.journal import Happening, Journal
from fleet_server.live import Hub
from fleet_server.metrics import Metrics, Sample
from fleet_server.releases.catalogue import Catalogue
from fleet_server.releases.key_changes import KeyChanges
from fleet_server.releases.online_keys import OnlineKeys
from fleet_server.releases.repository import Repository
from fleet_server.releases.trust import Trust
from fleet_server.rollouts.assignment import FleetAssignment
from fleet_server.rollouts.bundles import Bundles
from fleet_server.rollouts.commands import Rollouts
from fleet_server.rollouts.decisions import Decisions
from fleet_server.rollouts.judging import Judge
from fleet_server.rollouts.retention import Retention
from fleet_server.rollouts.views import Views
from fleet_server.sign_in import SignIns, WrongTokens
from fleet_server.status import Status, software_version
from fleet_server.storage.blobs import Blobs
from fleet_server.storage.database import Database
from fleet_server.storage.object_store import shelf_of
from fleet_server.timers import guarded, watchdog

_log = logging.getLogger(__name__)

READY_WITHIN_S = 30.0
BROKER_TRIES = 4  # a broker that ends as often while the server starts will not come up: its port is taken, its files are wrong
LEASES_READ_S = 15.0  # a lease that is shorter than before is kept from the next reading on
RENEWALS_PER_LEASE = 4  # so that a device that misses one still has its lease
RENEW_EVERY_S = 60.0
MEMORY_READ_S = 0.5  # a device that reads nothing makes the broker hold 200 MB in a second


class Fleet:
    """Every part that works on one data folder, without the processes and sockets around them."""

    def __init__(self, folder: Folder, config: FleetConfig, clock: Callable[[], float] = time.time) -> None:
        self.folder, self.config = folder, config
        self.hub, self.metrics = Hub(), Metrics()
        self.database = Database(folder.database_url(config), must_exist=True)
        self.authority = Authority(folder.pki)
        self.blobs = Blobs(shelf_of(folder, config.blobs), folder.uploads)
        self.repository = Repository(folder.metadata, folder.targets, OnlineKeys.read(folder.keys), config.expiry, clock)
        self.access = Access(self.database, clock, session_s=config.session_s)
        self.journal = Journal(self.database, self.hub, clock, events_kept=config.events_kept)
        self.sign_ins = SignIns(self.database, self.access, self.journal, clock)
        self.wrong_tokens = WrongTokens(self.database, self.journal, clock)
        self.inventory = Inventory(self.database, self.authority, self.repository, self.journal, config, clock)
        self.adoption = Adoption(self.database, self.authority, self.journal, clock)
        self.inventory.adopt = self.adoption.adopt
        self.survey = Survey(self.database, self.inventory, clock)
        self.enrolment = Enrolment(self.database, self.authority, self.repository, self.inventory, self.journal, config, clock)
        self.key_changes = KeyChanges(self.repository, clock)
        self.trust = Trust(self.database, self.repository, self.key_changes, self.journal, clock)
        self.catalogue = Catalogue(self.database, self.repository, self.blobs, self.journal, clock)
        self.assignment = FleetAssignment(self.database, self.repository, self.journal, config.fleet, clock)
        decisions = Decisions(self.database, self.assignment, self.journal)
        self.judge = Judge(self.database, self.inventory, self.assignment, decisions, config.rollouts, clock)
        self.views = Views(self.database, self.inventory, clock)
        self.rollouts = Rollouts(self.repository, self.journal, decisions, self.judge, self.views, clock)
        self.retention = Retention(decisions, self.catalogue, self.journal, config.keep.releases)
        self.bundles = Bundles(
            self.database, self.repository, self.inventory, self.survey, self.catalogue, self.assignment, self.blobs, self.journal,
            config.fleet, clock,
        )  # fmt: skip
        self.intake = Intake(self.database, self.journal, clock, config.rollouts.silence_s)
        self.inventory.on_groups_changed = self.judge.evaluate
        self.status = Status(config, self.authority, self.repository, self.survey, self.intake, clock)
        self.status.restored = lambda: self.adoption.window
        self.status.database_problem = lambda: self.database.problem
        self.housekeeping = Housekeeping(self.blobs, self.catalogue, self.retention, self.journal, config.keep, clock)
        self._count()

    def _count(self) -> None:
        add, database = self.metrics.add, self.database
        refused = "transactions that the database did not take"
        add("edge_fleet_database_refused_total", refused, lambda: [Sample(database.refused)])
        add("edge_fleet_database_ok", "1 when the last transaction was stored", lambda: [Sample(not database.problem)])
        files, pending = "files that were uploaded and no release names yet", self.blobs.pending
        add("edge_fleet_pending_uploads", files, lambda: [Sample(pending.held()[0])])
        add("edge_fleet_pending_uploads_bytes", f"bytes of {files}", lambda: [Sample(pending.held()[1])])
        removed = self.housekeeping.removed
        add(
            "edge_fleet_removed_total",
            "what was removed because nobody needs it",
            lambda: [Sample(removed[what], {"what": what}) for what in ("uploads", "releases", "events", "audit")],
        )
        outcomes = self.sign_ins.outcomes
        add(
            "edge_fleet_sign_ins_total",
            "attempts to open a browser session, by outcome",
            lambda: [Sample(outcomes[one], {"outcome": one}) for one in ("opened", "denied", "throttled")],
        )
        wrong = self.wrong_tokens.outcomes
        add(
            "edge_fleet_wrong_tokens_total",
            "requests with an access token that is not known or was revoked, by outcome",
            lambda: [Sample(wrong[one], {"outcome": one}) for one in ("denied", "throttled")],
        )

    def recover(self) -> None:
        """Makes good what an interrupted server left, so that disk, database and signed documents say the same."""
        self.database.migrate()
        self.authority.renew_own(self.config.own_names)
        self.inventory.write_crl()
        if self.key_changes.finish():
            _log.warning("a change of keys that was interrupted is complete now")
        self.repository.check()
        for ref in self.catalogue.reconcile():
            _log.warning("release %s was published but not indexed; it is now", ref)
        if self.assignment.catch_up():
            _log.warning("the database is older than what is signed (a backup?); it was brought to what devices were told last")
        if self.assignment.tell(self.addresses()):
            _log.warning("devices are told to come to %s, broker %s", self.config.device_url, self.config.broker_address)
        self.assignment.publish()
        self.repository.renew()

    def addresses(self) -> Addresses:
        """Where devices are to reach this server."""
        spread_s = round(self.survey.count().total / self.config.looks_per_s, 3)
        return Addresses(
            device_url=self.config.device_url, broker=self.config.broker_address, spread_s=min(LONGEST_SPREAD_S, spread_s)
        )

    def close(self) -> None:
        self.database.close()


@contextlib.contextmanager
def locked(folder: Folder) -> Iterator[None]:
    """Keeps every other server off the folder.  Raises: Unavailable naming the one that has it."""
    try:
        fd = os.open(folder.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Unavailable(f"{folder.root} cannot be used: {error}") from error
    with os.fdopen(fd, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read().strip() or "unknown"
            raise Unavailable(
                f"another edge-fleet serve (process {holder}) works on {folder.root}; stop it first", code="locked"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def serve(folder: Folder) -> None:
    """Runs the server until SIGTERM or SIGINT.

    Raises: ConfigError, Unavailable (locked, no mosquitto, a port is taken), DatabaseError, RepositoryDamaged.
    """
    config = load(folder)
    descriptors.raise_limit()
    with locked(folder):
        executable = broker_settings.find_mosquitto(config.broker)
        fleet = Fleet(folder, config)
        try:
            fleet.recover()
            asyncio.run(_Running(fleet, executable).run())
        finally:
            fleet.close()


class _Running:
    """The processes, sockets and timers of one server."""

    def __init__(self, fleet: Fleet, executable: str) -> None:
        self._fleet, self._config = fleet, fleet.config
        plugin = broker_settings.find_plugin(self._config.broker)
        conf = broker_settings.write(fleet.folder, self._config.broker, plugin)
        self._broker = Supervisor(executable, conf, fleet.folder.root)
        host = self._config.broker_here
        transfers = TransferAnswers(fleet.blobs, fleet.repository, fleet.inventory, Renewals(fleet.inventory, fleet.enrolment))
        self._taken = transfers.taken
        self._link = MqttLink(fleet.authority, host, self._config.broker.port, fleet.intake, fleet.judge.evaluate, transfers)
        self._door = Door(
            self._link, self, lambda device: sessions.forget(device, fleet.authority, host, self._config.broker.port),
            self._note_pause, plugin=plugin is not None,
        )  # fmt: skip
        self._link.on_flood, self._link.on_answer = self._door.pause, self._door.answered
        fleet.status.paused, fleet.status.live_revocation = self._link.flood.paused, plugin is not None
        self._broker.reads = SubscriptionWatch(self._pause).read
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pokes = Pokes(fleet.repository, fleet.inventory, fleet.survey, self._link, self._config.looks_per_s)
        self._link.on_connected = self._poke_all
        if fleet.adoption.window is not None:
            fleet.intake.on_stranger = self._pokes.poke_stranger
        fleet.inventory.link, fleet.assignment.poker = self, self._pokes
        fleet.status.broker_connected, fleet.inventory.heard_since = self._link.connected.is_set, self._link.heard_since

    # What the inventory asks of the broker's side.
    def poke_device(self, device: str) -> None:
        self._pokes.poke_device(device)

    def _poke_all(self) -> None:
        self._pokes.poke_all(self._fleet.assignment.signed().version)

    def shut_out(self, device: str) -> None:
        self._door.shut_out(device)

    def admit(self, device: str) -> None:
        self._door.admit(device)

    def _pause(self, device: str) -> None:
        if seconds := self._link.flood.pause(device):
            self._door.pause(device, seconds)

    def _note_pause(self, device: str, seconds: float) -> None:
        message = (
            f"{device} sends or asks for more than a device may, so the broker takes nothing of it for {seconds / 60:.0f} min"
        )
        self._fleet.journal.note(Happening(name="device_paused", message=message, device=device, reason="flood"))

    # What the door asks of the broker's process.
    def reload(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._broker.reload)

    def restart(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._broker.restart)

    async def run(self) -> None:
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop.set)
        found = self._listeners()
        sockets = [listeners.bind(listener.host, listener.port) for listener in found]
        tasks = [asyncio.create_task(self._broker.run(), name="broker")]
        tasks += [
            asyncio.create_task(listener.run_aside(sock), name="listener")
            for listener, sock in zip(found, sockets, strict=True)
        ]
        link_started = False
        try:
            self._door.start()
            self._link.start()
            link_started = True
            await self._until_ready(found, tasks)
            if self._stop.is_set():
                return
            notify("READY=1")
            _log.info("ready: operators at %s, devices at %s", self._config.operator_url, self._config.device_url)
            tasks += [
                asyncio.create_task(self._ticks()),
                asyncio.create_task(self._renewals()),
                asyncio.create_task(self._broker_memory()),
                asyncio.create_task(self._housekeeping()),
                asyncio.create_task(watchdog()),
            ]
            await until_stopped(self._stop, tasks)
        finally:
            notify("STOPPING=1")
            _log.info("stopping")
            await self._end(found, tasks, link_started=link_started)

    async def _until_ready(self, found: list[Listener | SharedPort], tasks: list[asyncio.Task[None]]) -> None:
        """Returns when everything answers, or when asked to stop.  Raises: Unavailable that says what does not."""
        deadline = time.monotonic() + READY_WITHIN_S
        while not self._stop.is_set():
            missing = [name for name, up in self._parts(found) if not up]
            if not missing:
                return
            ended = [task for task in tasks if task.done()]
            if ended:
                raise Unavailable(_why(ended[0]))
            if time.monotonic() > deadline or self._broker.restarts >= BROKER_TRIES:
                words = " | ".join(self._broker.last_lines)
                raise Unavailable(f"{', '.join(missing)} did not start; the broker said: {words}")
            await asyncio.sleep(0.02)

    def _parts(self, found: list[Listener | SharedPort]) -> list[tuple[str, bool]]:
        parts = [(f"the listener on port {listener.port}", listener.started) for listener in found]
        return [*parts, (f"the broker on port {self._config.broker.port}", self._link.connected.is_set())]

    async def _end(self, found: list[Listener | SharedPort], tasks: list[asyncio.Task[None]], *, link_started: bool) -> None:
        self._fleet.hub.close()
        for listener in found:
            listener.should_exit = True
        for task in tasks:
            if task.get_name() not in {"broker", "listener"}:
                task.cancel()
        await asyncio.gather(*(task for task in tasks if task.get_name() != "broker"), return_exceptions=True)
        if link_started:
            await asyncio.to_thread(self._door.stop)
            await asyncio.to_thread(self._link.stop)
        await self._broker.stop()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _listeners(self) -> list[Listener | SharedPort]:
        operators = operator_api.build(self._fleet, title=f"{self._config.fleet} fleet", version=software_version())
        found = listeners.make(self._config, self._fleet.authority, operators, device_api.build(self._fleet))
        listeners.count(self._fleet.metrics, found)
        return found

    # -- timers ------------------------------------------------------------------------------------------------------------

    async def _ticks(self) -> None:
        while True:
            await asyncio.sleep(self._config.rollouts.tick_s)
            await guarded(self._tick, "rollouts could not be judged")

    def _tick(self) -> None:
        self._fleet.database.check()
        self._fleet.judge.evaluate()

    async def _housekeeping(self) -> None:
        while True:
            await guarded(self._fleet.housekeeping.run, "what nobody needs could not be removed")
            await asyncio.sleep(housekeeping.EVERY_S)

    async def _renewals(self) -> None:
        expiry = self._config.expiry
        interval = min(RENEW_EVERY_S, min(expiry.assignments_s, expiry.snapshot_s, expiry.timestamp_s) / 8)
        while True:
            await asyncio.sleep(min(interval, LEASES_READ_S))
            await guarded(self._renew, "metadata could not be renewed")

    async def _broker_memory(self) -> None:
        while True:
            await asyncio.sleep(MEMORY_READ_S)
            if self._broker.memory_bytes() > self._config.broker.memory_bytes and (device := self._taken.most()):
                self._pause(device)

    def _renew(self) -> None:
        """Devices stop models whose lease ends, so the timestamp is signed several times within the shortest one."""
        lease_s = self._fleet.assignment.shortest_lease_s()
        if self._fleet.repository.renew(oldest_s=lease_s / RENEWALS_PER_LEASE if lease_s is not None else None):
            self._poke_all()


async def until_stopped(stop: asyncio.Event, tasks: list[asyncio.Task[None]]) -> None:
    """Returns when `stop` is set.  Raises: Unavailable when a part ended by itself: half a server helps nobody, and systemd
    starts a whole one.
    """
    stopped = asyncio.create_task(stop.wait())
    try:
        parts = [task for task in tasks if task.get_name() in {"broker", "listener"}]
        done, _ = await asyncio.wait({stopped, *parts}, return_when=asyncio.FIRST_COMPLETED)
        if stopped not in done:
            task = next(iter(done))
            raise Unavailable(f"the {task.get_name()} ended: {task.exception() or 'see the lines above'}")
    finally:
        stopped.cancel()


def _why(task: asyncio.Task[None]) -> str:
    error = None if task.cancelled() else task.exception()
    return f"the {task.get_name()} ended before the server was ready: {error or 'see the lines above'}"
