"""The broker and what a process does with it: what devices send is stored, they are let in and shut out, and they are poked.

`edge-fleet serve` has it, and `edge-fleet ingest`; of a RabbitMQ cluster the leader has it too, and only publishes.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp

from fleet_server.app import Fleet
from fleet_server.broker import choice
from fleet_server.broker.metrics import count
from fleet_server.ingest.broker_views import BrokerView
from fleet_server.ingest.links import Link
from fleet_server.ingest.pokes import Pokes
from fleet_server.ingest.transfers import RenewalsAsked, TransferAnswers
from fleet_server.journal import Happening


class BrokerHost:
    """Made, not started. What the inventory and the assignment ask of the broker's side is here."""

    def __init__(
        self, fleet: Fleet, on_models: Callable[[set[str]], None], renewals: RenewalsAsked, *, stores: bool = True
    ) -> None:
        """`on_models` is told of models whose rollouts are to be judged anew; `renewals` makes certificates for devices that ask over
        the broker. Without `stores` others store what devices send, which a RabbitMQ cluster allows.

        Raises: Unavailable that says what is missing on this machine.
        """
        self._fleet = fleet
        transfers = TransferAnswers(fleet.blobs, fleet.repository, fleet.inventory, renewals)
        self._broker = choice.make(
            fleet.folder, fleet.config, fleet.authority, fleet.inventory, fleet.intake, on_models, transfers, self._note_pause,
            stores=stores,
        )  # fmt: skip
        self.on_pause: Callable[[str, float], None] = lambda _device, _seconds: None
        """Told of each device that is shut out for a while, and for how many seconds."""
        fleet.status.broker = self._broker
        if stores:
            count(fleet.metrics, self._broker)
        link = self._broker.link
        self.pokes = Pokes(fleet.repository, fleet.inventory, fleet.survey, link, fleet.config.looks_per_s)
        link.on_connected, link.on_arrived = self.poke_all, self._poke_arrived
        if fleet.adoption.window is not None:
            fleet.intake.on_stranger = self.pokes.poke_stranger
        self._started = False

    @property
    def link(self) -> Link:
        return self._broker.link

    @property
    def questions(self) -> ASGIApp | None:
        """Answers what the nodes of a cluster ask; None where the broker asks nothing."""
        return self._broker.questions

    # What the inventory asks of the broker's side.
    def poke_device(self, device: str) -> None:
        self.pokes.poke_device(device)

    def shut_out(self, device: str) -> None:
        self._broker.shut_out(device)

    def admit(self, device: str) -> None:
        self._broker.admit(device)

    def keep_out(self, device: str, seconds: float) -> None:
        """Lets a device not in for a while that another process has paused."""
        self._broker.keep_out(device, seconds)

    def poke_all(self) -> None:
        self.pokes.poke_all(self._version())

    def _poke_arrived(self, devices: set[str]) -> None:
        self.pokes.poke_arrived(devices, self._version())

    def _version(self) -> int:
        return self._fleet.assignment.signed().version

    # -- while it runs -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """What there is to run, until `end`."""
        await self._broker.run()

    async def end(self) -> None:
        await self._broker.end()

    def start(self) -> None:
        """Connects, and lets devices in and out."""
        self._broker.start()
        self._started = True

    def stop(self) -> None:
        if self._started:
            self._broker.stop()

    def missing(self) -> str:
        """Why it is not ready, in words; empty when it is."""
        return self._broker.missing()

    def hopeless(self) -> bool:
        """Whether it will not come up."""
        return self._broker.hopeless()

    def renew(self) -> None:
        """The server's own certificates are new: the broker is shown them, and shows them, from the next connection on."""
        self._broker.renew()

    def restart(self) -> None:
        """A CA is believed no more: everybody has to connect anew."""
        self._broker.restart()

    def reload(self) -> None:
        """The list of revoked certificates is another one; for a broker that reads it."""
        self._broker.reload()

    def paused(self) -> list[str]:
        return self._broker.paused()

    def warnings(self) -> list[str]:
        return self._broker.warnings()

    def view(self) -> BrokerView:
        return self._broker.view()

    def _note_pause(self, device: str, seconds: float) -> None:
        self.on_pause(device, seconds)
        message = (
            f"{device} sends or asks for more than a device may, so the broker takes nothing of it for {seconds / 60:.0f} min"
        )
        self._fleet.journal.note(Happening(name="device_paused", message=message, device=device, reason="flood"))
