"""`edge-fleet api`: answers operators and devices. It has no key but that of its certificates: what needs one, or a decision, it hands on
to the leader.
"""

from __future__ import annotations

import asyncio
import logging
import time

from agent.common.systemd import notify
from fleet_server import descriptors, housekeeping, listeners
from fleet_server.api import device as device_api
from fleet_server.api.forwarding import Forwarding, RenewalsForwarded
from fleet_server.api.leader import ToLeader
from fleet_server.api.operator import app as operator_api
from fleet_server.api.shared_port import SharedPort
from fleet_server.api.tls import Listener
from fleet_server.app import Fleet
from fleet_server.config import FleetConfig, Folder, load
from fleet_server.errors import Unavailable
from fleet_server.metrics import Sample
from fleet_server.processes.common import AGAIN_S, Common, stopped_within, until_signalled
from fleet_server.running import READY_WITHIN_S, until_stopped
from fleet_server.status import software_version
from fleet_server.timers import guarded, watchdog

_log = logging.getLogger(__name__)


def api(folder: Folder) -> None:
    """Runs until SIGTERM or SIGINT.

    Raises: ConfigError, Unavailable (a port is taken, what several processes need is missing), DatabaseError.
    """
    config = load(folder)
    descriptors.raise_limit()
    asyncio.run(Answering(folder, config).run())


class Answering:
    """One process that answers."""

    def __init__(self, folder: Folder, config: FleetConfig) -> None:
        self._common, self._config = Common(folder, config, "api"), config
        self._stop = asyncio.Event()

    async def run(self) -> None:
        common = self._common
        until_signalled(asyncio.get_running_loop(), self._stop)
        common.start()
        found: list[Listener | SharedPort] = []
        tasks = [asyncio.create_task(watchdog())]
        try:
            while not await asyncio.to_thread(common.is_prepared):
                if await stopped_within(self._stop, AGAIN_S):
                    return
            fleet = await asyncio.to_thread(common.fleet, common.database, signs=False)
            common.hub.start()
            found = self._listeners(fleet)
            sockets = [listeners.bind(listener.host, listener.port) for listener in found]
            tasks += [
                asyncio.create_task(listener.run_aside(sock), name="listener")
                for listener, sock in zip(found, sockets, strict=True)
            ]
            await self._until_started(found)
            if self._stop.is_set():
                return
            notify("READY=1")
            _log.info(
                "ready: %s answers operators at port %d, devices at port %d",
                common.id,
                self._config.operator_port,
                self._config.device_port,
            )
            tasks.append(asyncio.create_task(self._housekeeping(fleet)))
            await until_stopped(self._stop, tasks)
        finally:
            notify("STOPPING=1")
            _log.info("stopping")
            common.hub.close()
            for listener in found:
                listener.should_exit = True
            for task in tasks:
                if task.get_name() != "listener":
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(common.stop)

    def _listeners(self, fleet: Fleet) -> list[Listener | SharedPort]:
        others, signals = self._common.others, self._common.signals
        leader = ToLeader(fleet.authority, others.leader, others.forget)
        fleet.inventory.record_elsewhere = leader.record

        def forget_who_was_let_in() -> None:
            fleet.inventory.shut_out += 1

        signals.on("shut_out", lambda _: forget_who_was_let_in())
        signals.on_again("shut_out", forget_who_was_let_in)
        operators = operator_api.build(fleet, title=f"{self._config.fleet} fleet", version=software_version())
        found = listeners.make(
            self._config, fleet.authority, Forwarding(operators, fleet.access, leader),
            RenewalsForwarded(device_api.build(fleet), leader),
        )  # fmt: skip
        listeners.count(fleet.metrics, found)
        fleet.metrics.add(
            "edge_fleet_forwarded_total", "requests for the leader, by what became of them",
            lambda: [Sample(number, {"outcome": outcome}) for outcome, number in sorted(dict(leader.outcomes).items())],
        )  # fmt: skip
        return found

    async def _until_started(self, found: list[Listener | SharedPort]) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        while not all(listener.started for listener in found) and not self._stop.is_set():
            if time.monotonic() > deadline:
                raise Unavailable("the listeners did not start; see the lines above")
            await asyncio.sleep(0.02)

    async def _housekeeping(self, fleet: Fleet) -> None:
        while True:
            await guarded(lambda: tidy(fleet), "uploads that nobody needs could not be removed")
            await asyncio.sleep(housekeeping.EVERY_S)


def tidy(fleet: Fleet) -> None:
    """Removes what broke off here, and forgets of whole files that they wait for a release which has come."""
    named = fleet.catalogue.blobs()
    fleet.blobs.pending.forget([sha256 for sha256 in fleet.blobs.pending.marked() if sha256 in named])
    for sha256 in fleet.blobs.pending.parts_older_than(time.time() - fleet.config.keep.uploads_s):
        fleet.blobs.remove_part(sha256)
