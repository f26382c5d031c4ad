"""The mosquitto that the server runs, with everything around it: its process, the link to it, and who is let in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp

from fleet_server.broker import sessions, settings
from fleet_server.broker.door import Door
from fleet_server.broker.subscriptions import SubscriptionWatch
from fleet_server.broker.supervisor import Supervisor
from fleet_server.config import FleetConfig, Folder
from fleet_server.devices.pki import Authority
from fleet_server.errors import FleetError
from fleet_server.ingest.broker_views import BrokerView
from fleet_server.ingest.intake import Intake
from fleet_server.ingest.mqtt_link import MqttLink
from fleet_server.ingest.transfers import TransferAnswers

TRIES = 4  # a broker that ends as often while the server starts will not come up: its port is taken, its files are wrong
MEMORY_READ_S = 0.5  # a device that reads nothing makes the broker hold 200 MB in a second


class Mosquitto:
    """See `Broker`."""

    def __init__(
        self, folder: Folder, config: FleetConfig, authority: Authority, intake: Intake, on_models: Callable[[set[str]], None],
        transfers: TransferAnswers, on_pause: Callable[[str, float], None],
    ) -> None:  # fmt: skip
        """`on_pause` is told of each device that is shut out for a while, and for how many seconds.

        Raises: Unavailable when there is no mosquitto on this machine.
        """
        self._settings, self._taken = config.broker, transfers.taken
        host, port = config.broker_here, config.broker.port
        executable, plugin = settings.find_mosquitto(config.broker), settings.find_plugin(config.broker)
        self._live = plugin is not None
        self._process = Supervisor(executable, settings.write(folder, config.broker, plugin), folder.root)
        self._process.reads = SubscriptionWatch(self._pause).read
        self.link = MqttLink(authority, host, port, intake, on_models, transfers)

        def forget(device: str) -> None:
            """Raises: OSError; also where there is no key of the CA, and then whoever has it does this."""
            try:
                sessions.forget(device, authority, host, port)
            except FleetError as error:
                raise OSError(str(error)) from error

        self._door = Door(self.link, self, forget, on_pause, plugin=self._live)
        self.link.on_flood, self.link.on_answer = self._door.pause, self._door.answered
        self.questions: ASGIApp | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self) -> None:
        self._loop = asyncio.get_running_loop()
        memory = asyncio.create_task(self._watch_memory())
        try:
            await self._process.run()
        finally:
            memory.cancel()

    async def end(self) -> None:
        await self._process.stop()

    def start(self) -> None:
        self._door.start()
        self.link.start()

    def stop(self) -> None:
        self._door.stop()
        self.link.stop()

    def hopeless(self) -> bool:
        return self._process.restarts >= TRIES

    def missing(self) -> str:
        if self.link.connected.is_set():
            return ""
        words = " | ".join(self._process.last_lines)
        return f"the broker on port {self._settings.port} did not start; it said: {words}"

    def shut_out(self, device: str) -> None:
        self._door.shut_out(device)

    def admit(self, device: str) -> None:
        self._door.admit(device)

    def keep_out(self, device: str, seconds: float) -> None:
        """No other process speaks with this broker."""

    def paused(self) -> list[str]:
        return self.link.flood.paused()

    def warnings(self) -> list[str]:
        if self._live:
            return []
        said = (
            "mosquitto's dynamic-security plug-in was not found, so revoking a device restarts the broker for everybody and a device "
            "that floods is not thrown off: install it, or name the file in fleet.yaml under broker: dynamic_security:"
        )
        return [said]

    def renew(self) -> None:
        self.link.renew()
        self.reload()

    def view(self) -> BrokerView:
        return BrokerView("mosquitto")

    # What the door asks of the process.
    def reload(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._process.reload)

    def restart(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._process.restart)

    def _pause(self, device: str) -> None:
        if seconds := self.link.flood.pause(device):
            self._door.pause(device, seconds)

    async def _watch_memory(self) -> None:
        while True:
            await asyncio.sleep(MEMORY_READ_S)
            if self._process.memory_bytes() > self._settings.memory_bytes and (device := self._taken.most()):
                self._pause(device)
