"""The pokes that devices get: the news, and over how long those spread that still have to ask.

The broker keeps the last poke to all. So a device that was not connected when it was sent hears it as soon as it is back,
instead of at its next look, and one that knows it all asks for nothing.
"""

from __future__ import annotations

import logging
import time
from typing import Protocol

from sqlalchemy.exc import SQLAlchemyError

from agent.contract import topics
from agent.contract.codec import encode
from fleet_server.devices.inventory import Inventory
from fleet_server.devices.survey import Survey
from fleet_server.errors import FleetError
from fleet_server.releases import news
from fleet_server.releases.metadata_files import RepositoryDamaged
from fleet_server.releases.repository import Repository
from fleet_server.sign_in import Allowance

_log = logging.getLogger(__name__)

LONGEST_SPREAD_S = 600.0
STRANGER_EVERY_S = 60.0


class Publisher(Protocol):
    """The server's link to the broker."""

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None: ...


class Pokes:
    """Pokes devices. For any thread."""

    def __init__(
        self, repository: Repository, inventory: Inventory, survey: Survey, link: Publisher, looks_per_s: float
    ) -> None:
        """`looks_per_s`: how many devices the server wants to be asked by at most."""
        self._repository, self._inventory, self._survey = repository, inventory, survey
        self._link, self._looks_per_s = link, looks_per_s
        self._strangers = Allowance(1, STRANGER_EVERY_S, time.monotonic)

    def poke_all(self, assignment_version: int) -> None:
        """One message for the whole fleet."""
        said = topics.Poke(assignment_version=assignment_version, news=self._news(None), spread_s=self._spread_s())
        self._link.publish(topics.POKE_ALL, encode(said), retain=True)

    def poke_device(self, device: str) -> None:
        """That device asks at once when the news are not enough."""
        self._link.publish(topics.down_poke(device), encode(topics.Poke(news=self._news(device))))

    def poke_arrived(self, devices: set[str], assignment_version: int) -> None:
        """Devices that have just connected to a broker which keeps no poke hear the news, each on its own topic."""
        said = encode(
            topics.Poke(assignment_version=assignment_version, news=self._news(None), spread_s=self._spread_of(len(devices)))
        )
        for device in devices:
            self._link.publish(topics.down_poke(device), said)

    def poke_stranger(self, device: str) -> None:
        """A device that this server does not know, or not by its present certificate, asks it over HTTPS, where it shows that. Once
        a minute at most, as it may speak without end.
        """
        if self._strangers.wait_s(device) > 0:
            return
        self._strangers.spend(device)
        self._link.publish(topics.down_poke(device), encode(topics.Poke()))

    def _spread_s(self) -> float:
        try:
            present = self._survey.present()
        except SQLAlchemyError as error:
            _log.error("nobody knows how many devices a poke reaches: %s", error)
            return LONGEST_SPREAD_S
        return self._spread_of(present)

    def _spread_of(self, devices: int) -> float:
        return min(LONGEST_SPREAD_S, round(devices / self._looks_per_s, 3))

    def _news(self, device: str | None) -> bytes:
        """Nothing when there are none to be had: then devices ask, and are told what is wrong."""
        try:
            return news.packed(self._repository, self._inventory.record(device) if device is not None else None)
        except (RepositoryDamaged, FleetError, SQLAlchemyError) as error:
            _log.error("a poke goes without news: %s", error)
            return b""
