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
from fleet_server.broker import choice
from fleet_server.broker_host import BrokerHost
from fleet_server.config import Folder, load
from fleet_server.devices.renewals import Renewals
from fleet_server.errors import Unavailable
from fleet_server.status import software_version
from fleet_server.timers import Steps, guarded, watchdog

_log = logging.getLogger(__name__)

READY_WITHIN_S = 30.0
LEASES_READ_S = 15.0  # a lease that is shorter than before is kept from the next reading on
RENEWALS_PER_LEASE = 4  # so that a device that misses one still has its lease
RENEW_EVERY_S = 60.0


def serve(folder: Folder) -> None:
    """Runs the server until SIGTERM or SIGINT.

    Raises: ConfigError, Unavailable (locked, no mosquitto, a port is taken), DatabaseError, RepositoryDamaged.
    """
    config = load(folder)
    descriptors.raise_limit()
    with locked(folder):
        choice.check(config)
        fleet = Fleet(folder, config)
        try:
            fleet.recover()
            asyncio.run(Running(fleet).run())
        finally:
            fleet.close()


class Running:
    """The processes, sockets and timers of one server."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet, self._config = fleet, fleet.config
        self._broker = BrokerHost(fleet, fleet.judge.evaluate, Renewals(fleet.inventory, fleet.enrolment))
        self._listening: list[Listener | SharedPort] = []
        self._stop = asyncio.Event()
        fleet.inventory.link, fleet.assignment.poker = self._broker, self._broker.pokes
        fleet.inventory.heard_since = self._broker.link.heard_since
        fleet.ca_replacement.outside = self
        self._grouping = grouping_of(fleet)

    def trust_changed(self, *, dropped: bool) -> None:
        """Whoever is connected stays so, unless a CA is believed no more: then everybody has to connect to the broker anew."""
        for listener in self._listening:
            if isinstance(listener, Listener):
                listener.renew()
        self._broker.renew()
        if dropped:
            self._broker.restart()

    async def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)
        found = self._listeners()
        sockets = [listeners.bind(listener.host, listener.port) for listener in found]
        tasks = [asyncio.create_task(self._broker.run(), name="broker")]
        tasks += [
            asyncio.create_task(listener.run_aside(sock), name="listener")
            for listener, sock in zip(found, sockets, strict=True)
        ]
        try:
            self._broker.start()
            await self._until_ready(found, tasks)
            if self._stop.is_set():
                return
            notify("READY=1")
            _log.info("ready: operators at %s, devices at %s", self._config.operator_url, self._config.device_url)
            tasks += [
                asyncio.create_task(self._ticks()),
                asyncio.create_task(self._grouping.run()),
                asyncio.create_task(self._renewals()),
                asyncio.create_task(self._housekeeping()),
                asyncio.create_task(watchdog()),
            ]
            await until_stopped(self._stop, tasks)
        finally:
            notify("STOPPING=1")
            _log.info("stopping")
            await self._end(found, tasks)

    async def _until_ready(self, found: list[Listener | SharedPort], tasks: list[asyncio.Task[None]]) -> None:
        """Returns when everything answers, or when asked to stop.  Raises: Unavailable that says what does not."""
        deadline = time.monotonic() + READY_WITHIN_S
        while not self._stop.is_set():
            missing = [f"the listener on port {listener.port} did not start" for listener in found if not listener.started]
            missing += [self._broker.missing()] if self._broker.missing() else []
            if not missing:
                return
            ended = [task for task in tasks if task.done()]
            if ended:
                raise Unavailable(_why(ended[0]))
            if time.monotonic() > deadline or self._broker.hopeless():
                raise Unavailable("; ".join(missing))
            await asyncio.sleep(0.02)

    async def _end(self, found: list[Listener | SharedPort], tasks: list[asyncio.Task[None]]) -> None:
        self._fleet.hub.close()
        for listener in found:
            listener.should_exit = True
        for task in tasks:
            if task.get_name() not in {"broker", "listener"}:
                task.cancel()
        await asyncio.gather(*(task for task in tasks if task.get_name() != "broker"), return_exceptions=True)
        await asyncio.to_thread(self._broker.stop)
        await self._broker.end()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _listeners(self) -> list[Listener | SharedPort]:
        operators = operator_api.build(self._fleet, title=f"{self._config.fleet} fleet", version=software_version())
        found = listeners.make(
            self._config, self._fleet.authority, operators, device_api.build(self._fleet), self._broker.questions
        )
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

    def _renew(self) -> None:
        """Devices stop models whose lease ends, so the timestamp is signed several times within the shortest one."""
        lease_s = self._fleet.assignment.shortest_lease_s()
        if self._fleet.repository.renew(oldest_s=lease_s / RENEWALS_PER_LEASE if lease_s is not None else None):
            self._broker.poke_all()

    def _renew_own(self) -> None:
        self._fleet.ca_replacement.tick()
        if self._fleet.authority.renew_own(self._config.own_names):
            self.trust_changed(dropped=False)
            _log.warning("the server's own certificates are new")


def grouping_of(fleet: Fleet) -> Steps:
    """What keeps groups with scopes filled, where this process signs."""
    made = Steps(fleet.groups.step, "groups could not be filled", fleet.config.rollouts.tick_s)
    fleet.groups.on_work = made.wake
    return made


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
