"""`edge-fleet ingest`: stores what devices send, and tells them by the broker what the leader wants them to be told. It has no key but
those of its own certificates. Of a RabbitMQ cluster several may run, and they answer what its nodes ask.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from typing import Any

import msgspec

from agent.common import files
from agent.common.systemd import notify
from fleet_server import descriptors, listeners
from fleet_server.api.leader import ToLeader
from fleet_server.api.tls import Listener
from fleet_server.app import Fleet, locked
from fleet_server.broker import choice
from fleet_server.broker_host import BrokerHost
from fleet_server.config import FleetConfig, Folder, load
from fleet_server.errors import Unavailable
from fleet_server.processes import aside
from fleet_server.processes.common import AGAIN_S, CRL, Common, soon, stopped_within, until_signalled
from fleet_server.running import READY_WITHIN_S, until_stopped
from fleet_server.timers import guarded, watchdog

_log = logging.getLogger(__name__)

PAUSED_SHOWN = 20
MOSQUITTO_ORDERS = ("poke_all", "poke", "admit", "shut_out")
"""What the leader has the one do that runs a mosquitto. Of a RabbitMQ cluster the leader does it itself."""


def ingest(folder: Folder, *, metrics: str | None = None) -> None:
    """Runs until SIGTERM or SIGINT. `metrics`: HOST:PORT of a plain listener for health and metrics.

    Raises: ConfigError, Unavailable (locked, no broker, a port is taken, what several processes need is missing), DatabaseError.
    """
    config = load(folder)
    descriptors.raise_limit()
    choice.check(config)
    with locked(folder, "ingest.lock"):
        asyncio.run(Ingesting(folder, config, metrics).run())


class Ingesting:
    """One process that stores, and the broker that it runs or speaks with."""

    def __init__(self, folder: Folder, config: FleetConfig, metrics: str | None) -> None:
        self._common, self._config = Common(folder, config, "ingest"), config
        self._orders_heard = MOSQUITTO_ORDERS if config.broker.kind == "mosquitto" else ("kept_out",)
        self._fleet: Fleet | None = None
        self._broker: BrokerHost | None = None
        self._stop = asyncio.Event()
        self._orders: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self._asked: Listener | None = None
        """Where the nodes of a broker cluster ask."""
        self._aside = aside.listener(metrics, self._metrics, self._why_not) if metrics is not None else None
        self._common.detail = self._detail

    async def run(self) -> None:
        loop, common = asyncio.get_running_loop(), self._common
        until_signalled(loop, self._stop)
        for kind in self._orders_heard:
            common.signals.on(kind, functools.partial(self._take_order, loop, kind))
        if self._config.broker.kind == "mosquitto":
            common.signals.on_again("broker", functools.partial(self._take_order, loop, "again", ""))
        common.start()
        tasks = [asyncio.create_task(watchdog())]
        if self._aside is not None:
            sock = listeners.bind(self._aside.host, self._aside.port)
            tasks.append(asyncio.create_task(self._aside.run_aside(sock), name="listener"))
        broker: BrokerHost | None = None
        try:
            while not await asyncio.to_thread(common.is_prepared):
                if await stopped_within(self._stop, AGAIN_S):
                    return
            self._fleet = fleet = await asyncio.to_thread(common.fleet, common.database, signs=False)
            self._broker = broker = await asyncio.to_thread(self._host, fleet)
            if broker.questions is not None:  # before anybody connects: the nodes ask about this process too
                asked = self._asked = listeners.by_nodes(broker.questions, self._config, fleet.authority)
                sock = listeners.bind(asked.host, asked.port)
                tasks.append(asyncio.create_task(asked.run_aside(sock), name="listener"))
            tasks.append(asyncio.create_task(broker.run(), name="broker"))
            broker.start()
            await self._until_connected(broker, tasks)
            if self._stop.is_set():
                return
            common.pulse.beat()
            notify("READY=1")
            _log.info("ready: %s stores what devices send", common.id)
            tasks += [asyncio.create_task(one) for one in (self._carry_out(broker), self._beat(broker))]
            await until_stopped(self._stop, tasks)
        finally:
            notify("STOPPING=1")
            _log.info("stopping")
            await self._end(broker, tasks)

    async def _until_connected(self, broker: BrokerHost, tasks: list[asyncio.Task[None]]) -> None:
        """Raises: Unavailable."""
        deadline = time.monotonic() + READY_WITHIN_S
        while (missing := broker.missing()) and not self._stop.is_set():
            ended = any(task.done() and task.get_name() == "broker" for task in tasks)
            if ended or time.monotonic() > deadline or broker.hopeless():
                raise Unavailable(missing)
            await asyncio.sleep(0.02)

    async def _end(self, broker: BrokerHost | None, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            if task.get_name() not in {"broker", "listener"}:
                task.cancel()
        if broker is not None:
            await asyncio.to_thread(broker.stop)
            await broker.end()
        for listener in (self._aside, self._asked):
            if listener is not None:
                listener.should_exit = True
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._common.stop)

    def _host(self, fleet: Fleet) -> BrokerHost:
        leader = ToLeader(fleet.authority, self._common.others.leader, self._common.others.forget)
        fleet.inventory.record_elsewhere = leader.record
        self._write_crl(fleet)
        made = BrokerHost(fleet, self._tell, leader)
        made.on_pause = lambda device, seconds: self._common.signals.send("kept_out", f"{device} {seconds:.0f}")
        return made

    def _tell(self, models: set[str]) -> None:
        """The leader judges the rollouts of these models anew."""
        for model in models:
            self._common.signals.send("models", model)

    # -- what the leader wants of the broker -------------------------------------------------------------------------------

    def _take_order(self, loop: asyncio.AbstractEventLoop, kind: str, about: str) -> None:
        """For the thread that hears signals."""
        soon(loop, self._orders.put_nowait, (kind, about))()

    async def _carry_out(self, broker: BrokerHost) -> None:
        while True:
            kind, about = await self._orders.get()
            await guarded(functools.partial(self._do, broker, kind, about), "the broker could not be told")

    def _do(self, broker: BrokerHost, kind: str, about: str) -> None:
        assert self._fleet is not None
        if kind == "poke_all":
            broker.poke_all()
        elif kind == "poke":
            broker.poke_device(about)
        elif kind == "admit":
            broker.admit(about)
        elif kind == "kept_out":
            device, _, seconds = about.partition(" ")
            broker.keep_out(device, float(seconds))
        elif kind == "shut_out":
            self._write_crl(self._fleet)
            broker.shut_out(about)
        elif self._write_crl(self._fleet):  # what was called out while nobody here heard it
            broker.reload()
            broker.poke_all()

    def _write_crl(self, fleet: Fleet) -> bool:
        """Brings the list of revoked certificates to where the broker reads it; whether it is another one."""
        data, path = fleet.repository.documents.read(CRL), fleet.authority.crl
        if data is None or (path.is_file() and path.read_bytes() == data):
            return False
        files.write(path, data)
        return True

    # -- what others know of this process ----------------------------------------------------------------------------------

    async def _beat(self, broker: BrokerHost) -> None:
        """Others hear at once when the broker is lost or found."""
        before = True
        while True:
            await asyncio.sleep(0.2)
            if before is not (before := not broker.missing()):
                self._common.pulse.beat()

    def _detail(self) -> dict[str, Any]:
        fleet, broker = self._fleet, self._broker
        if fleet is None or broker is None:
            return {"connected": False}
        connected = not broker.missing()
        return {
            "connected": connected, "heard_since": broker.link.heard_since() if connected else None,
            "accepted": fleet.intake.accepted, "dropped": dict(fleet.intake.dropped),
            "paused": broker.paused()[:PAUSED_SHOWN], "warnings": broker.warnings(), "broker": msgspec.to_builtins(broker.view()),
        }  # fmt: skip

    def _why_not(self) -> str:
        if self._broker is None:
            return "it waits for a leader's first word"
        return self._broker.missing()

    def _metrics(self) -> str:
        return self._fleet.metrics.text() if self._fleet is not None else ""
