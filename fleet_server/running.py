"""`edge-fleet serve`: the processes, sockets and timers of a server, started and stopped in order.

Start: lock, configuration, database, certificates, repository (checked, renewed, reconciled with the database), broker, MQTT
link, listeners, READY. Stop is the reverse, so that nothing is asked of a part that is gone.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time

from agent.common.systemd import notify
from fleet_server import descriptors, housekeeping, listeners
from fleet_server.api import device as device_api
from fleet_server.api.operator import app as operator_api
from fleet_server.api.shared_port import SharedPort
from fleet_server.api.tls import Listener
from fleet_server.app import Fleet, locked
from fleet_server.broker import sessions
from fleet_server.broker import settings as broker_settings
from fleet_server.broker.door import Door
from fleet_server.broker.subscriptions import SubscriptionWatch
from fleet_server.broker.supervisor import Supervisor
from fleet_server.config import Folder, load
from fleet_server.devices.renewals import Renewals
from fleet_server.errors import Unavailable
from fleet_server.ingest.mqtt_link import MqttLink
from fleet_server.ingest.pokes import Pokes
from fleet_server.ingest.transfers import TransferAnswers
from fleet_server.journal import Happening
from fleet_server.status import software_version
from fleet_server.timers import guarded, watchdog

_log = logging.getLogger(__name__)

READY_WITHIN_S = 30.0
BROKER_TRIES = 4  # a broker that ends as often while the server starts will not come up: its port is taken, its files are wrong
LEASES_READ_S = 15.0  # a lease that is shorter than before is kept from the next reading on
RENEWALS_PER_LEASE = 4  # so that a device that misses one still has its lease
RENEW_EVERY_S = 60.0
MEMORY_READ_S = 0.5  # a device that reads nothing makes the broker hold 200 MB in a second


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
            asyncio.run(Running(fleet, executable).run())
        finally:
            fleet.close()


class Running:
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
        self._listening: list[Listener | SharedPort] = []
        self._broker.reads = SubscriptionWatch(self._pause).read
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pokes = Pokes(fleet.repository, fleet.inventory, fleet.survey, self._link, self._config.looks_per_s)
        self._link.on_connected = self._poke_all
        if fleet.adoption.window is not None:
            fleet.intake.on_stranger = self._pokes.poke_stranger
        fleet.inventory.link, fleet.assignment.poker = self, self._pokes
        fleet.ca_replacement.outside = self
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

    def trust_changed(self, *, dropped: bool) -> None:
        """Whoever is connected stays so, unless a CA is believed no more: then everybody has to connect to the broker anew."""
        for listener in self._listening:
            if isinstance(listener, Listener):
                listener.renew()
        self._link.renew()
        if dropped:
            self.restart()
        else:
            self.reload()

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
        self._listening = found
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
            await guarded(self._renew_own, "the server's own certificates could not be renewed")

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

    def _renew_own(self) -> None:
        self._fleet.ca_replacement.tick()
        if self._fleet.authority.renew_own(self._config.own_names):
            self.trust_changed(dropped=False)
            _log.warning("the server's own certificates are new")


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
