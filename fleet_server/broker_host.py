"""The broker and what speaks with it: the link that stores what devices send, who is let in, and the pokes.

`edge-fleet serve` has it, and `edge-fleet ingest`.
"""

from __future__ import annotations

from collections.abc import Callable

from fleet_server.app import Fleet
from fleet_server.broker import choice
from fleet_server.broker.metrics import count
from fleet_server.ingest.pokes import Pokes
from fleet_server.ingest.transfers import RenewalsAsked, TransferAnswers
from fleet_server.journal import Happening


class BrokerHost:
    """Made, not started. What the inventory and the assignment ask of the broker's side is here."""

    def __init__(self, fleet: Fleet, on_models: Callable[[set[str]], None], renewals: RenewalsAsked) -> None:
        """`on_models` is told of models whose rollouts are to be judged anew; `renewals` makes certificates for devices that ask over
        the broker.

        Raises: Unavailable that says what is missing on this machine.
        """
        self._fleet = fleet
        transfers = TransferAnswers(fleet.blobs, fleet.repository, fleet.inventory, renewals)
        self._broker = broker = choice.make(
            fleet.folder, fleet.config, fleet.authority, fleet.inventory, fleet.intake, on_models, transfers, self._note_pause
        )
        self.link, self.questions = broker.link, broker.questions
        count(fleet.metrics, broker)
        status = fleet.status
        status.paused, status.broker, status.broker_warnings = broker.paused, broker.view, broker.warnings
        self.pokes = Pokes(fleet.repository, fleet.inventory, fleet.survey, self.link, fleet.config.looks_per_s)
        self.link.on_connected, self.link.on_arrived = self.poke_all, self.pokes.poke_arrived
        if fleet.adoption.window is not None:
            fleet.intake.on_stranger = self.pokes.poke_stranger
        self._started = False

    # What the inventory asks of the broker's side.
    def poke_device(self, device: str) -> None:
        self.pokes.poke_device(device)

    def shut_out(self, device: str) -> None:
        self._broker.shut_out(device)

    def admit(self, device: str) -> None:
        self._broker.admit(device)

    def poke_all(self) -> None:
        self.pokes.poke_all(self._fleet.assignment.signed().version)

    def reload(self) -> None:
        """The list of revoked certificates on this disk is another one."""
        self._broker.reload()

    def restart(self) -> None:
        """A CA is believed no more: everybody has to connect anew."""
        self._broker.restart()

    def renew(self) -> None:
        """The server's own certificates are new: the broker shows them to who connects from now on."""
        self._broker.renew()

    # -- while it runs -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """What there is to run of the broker, until `end`."""
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

    def _note_pause(self, device: str, seconds: float) -> None:
        message = (
            f"{device} sends or asks for more than a device may, so the broker takes nothing of it for {seconds / 60:.0f} min"
        )
        self._fleet.journal.note(Happening(name="device_paused", message=message, device=device, reason="flood"))
