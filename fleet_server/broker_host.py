"""The broker and what speaks with it: its process, the link that stores what devices send, the door, and the pokes.

`edge-fleet serve` has it, and `edge-fleet ingest`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from fleet_server.app import Fleet
from fleet_server.broker import sessions
from fleet_server.broker import settings as broker_settings
from fleet_server.broker.door import Door
from fleet_server.broker.subscriptions import SubscriptionWatch
from fleet_server.broker.supervisor import Supervisor
from fleet_server.errors import FleetError
from fleet_server.ingest.mqtt_link import MqttLink
from fleet_server.ingest.pokes import Pokes
from fleet_server.ingest.transfers import RenewalsAsked, TransferAnswers
from fleet_server.journal import Happening

_log = logging.getLogger(__name__)

TRIES = 4  # a broker that ends as often while the server starts will not come up: its port is taken, its files are wrong
MEMORY_READ_S = 0.5  # a device that reads nothing makes the broker hold 200 MB in a second


class BrokerHost:
    """Made, not started. What the inventory, the door and the assignment ask of the broker's side is here."""

    def __init__(
        self, fleet: Fleet, executable: str, on_models: Callable[[set[str]], None], renewals: RenewalsAsked
    ) -> None:  # fmt: skip
        """`on_models` is told of models whose rollouts are to be judged anew; `renewals` makes certificates for devices that ask over
        the broker.
        """
        self._fleet, self._config = fleet, fleet.config
        plugin = broker_settings.find_plugin(self._config.broker)
        conf = broker_settings.write(fleet.folder, self._config.broker, plugin)
        self._broker = Supervisor(executable, conf, fleet.folder.root)
        host = self._config.broker_here
        transfers = TransferAnswers(fleet.blobs, fleet.repository, fleet.inventory, renewals)
        self._taken = transfers.taken
        self.link = MqttLink(fleet.authority, host, self._config.broker.port, fleet.intake, on_models, transfers)
        self._door = Door(self.link, self, self._forget, self._note_pause, plugin=plugin is not None)
        self.link.on_flood, self.link.on_answer = self._door.pause, self._door.answered
        fleet.status.paused, fleet.status.live_revocation = self.link.flood.paused, plugin is not None
        self._broker.reads = SubscriptionWatch(self._pause).read
        self._loop: asyncio.AbstractEventLoop | None = None
        self.pokes = Pokes(fleet.repository, fleet.inventory, fleet.survey, self.link, self._config.looks_per_s)
        self.link.on_connected = self.poke_all
        if fleet.adoption.window is not None:
            fleet.intake.on_stranger = self.pokes.poke_stranger
        self._started = False

    # What the inventory asks of the broker's side.
    def poke_device(self, device: str) -> None:
        self.pokes.poke_device(device)

    def shut_out(self, device: str) -> None:
        self._door.shut_out(device)

    def admit(self, device: str) -> None:
        self._door.admit(device)

    def poke_all(self) -> None:
        self.pokes.poke_all(self._fleet.assignment.signed().version)

    # What the door asks of the broker's process.
    def reload(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._broker.reload)

    def restart(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._broker.restart)

    def renew(self) -> None:
        """The server's own certificates are new: the broker shows them to who connects from now on."""
        self.link.renew()
        self.reload()

    # -- while it runs -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """The broker's process, until `end`."""
        self._loop = asyncio.get_running_loop()
        memory = asyncio.create_task(self._watch_memory())
        try:
            await self._broker.run()
        finally:
            memory.cancel()

    async def end(self) -> None:
        await self._broker.stop()

    def start(self) -> None:
        """Connects, and lets devices in and out."""
        self._door.start()
        self.link.start()
        self._started = True

    def stop(self) -> None:
        if self._started:
            self._door.stop()
            self.link.stop()

    def missing(self) -> str:
        """Why it is not ready, in words; empty when it is."""
        if self.link.connected.is_set():
            return ""
        words = " | ".join(self._broker.last_lines)
        return f"the broker on port {self._config.broker.port} did not start; it said: {words}"

    def hopeless(self) -> bool:
        """Whether it will not come up."""
        return self._broker.restarts >= TRIES

    async def _watch_memory(self) -> None:
        while True:
            await asyncio.sleep(MEMORY_READ_S)
            if self._broker.memory_bytes() > self._config.broker.memory_bytes and (device := self._taken.most()):
                self._pause(device)

    # -- floods ------------------------------------------------------------------------------------------------------------

    def _pause(self, device: str) -> None:
        if seconds := self.link.flood.pause(device):
            self._door.pause(device, seconds)

    def _note_pause(self, device: str, seconds: float) -> None:
        message = (
            f"{device} sends or asks for more than a device may, so the broker takes nothing of it for {seconds / 60:.0f} min"
        )
        self._fleet.journal.note(Happening(name="device_paused", message=message, device=device, reason="flood"))

    def _forget(self, device: str) -> None:
        """Raises: OSError; also where there is no key of the CA, and then whoever has it does this."""
        try:
            sessions.forget(device, self._fleet.authority, self._config.broker_here, self._config.broker.port)
        except FleetError as error:
            raise OSError(str(error)) from error
