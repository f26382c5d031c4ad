"""What every process of a server has that is several: the database, signals, and a row that says that it lives."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from asyncio import AbstractEventLoop, Event
from collections.abc import Callable
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from agent.common import files
from fleet_server.app import Fleet, Shared
from fleet_server.config import FleetConfig, Folder
from fleet_server.errors import Unavailable
from fleet_server.live import SharedHub
from fleet_server.processes.others import Others
from fleet_server.status import software_version
from fleet_server.storage.database import Database
from fleet_server.storage.documents import StoredDocuments
from fleet_server.storage.processes import Pulse, new_id
from fleet_server.storage.signals import Signals

_log = logging.getLogger(__name__)

AGAIN_S = 1.0
"""Between two attempts at what is not there yet: the database, its schema, a leader's first documents."""

CRL = "crl.pem"
"""The document with the list of revoked certificates, for whoever runs the broker."""


class Common:
    """Made, not started.  Raises: Unavailable when fleet.yaml does not say what several processes need; DatabaseError."""

    def __init__(self, folder: Folder, config: FleetConfig, kind: str) -> None:
        refuse_what_is_not_shared(config)
        self.folder, self.config, self.kind = folder, config, kind
        self.id = new_id(kind)
        self.database = self.new_database()
        self.signals = Signals(self.database)
        self.hub = SharedHub(self.signals)
        self.others = Others(self.database, self.signals)
        self.detail: Callable[[], dict[str, Any]] = dict
        """What others should know of this process."""
        self.pulse = Pulse(self.database, self.id, kind, software_version(), self._detail)

    def _detail(self) -> dict[str, Any]:
        return self.detail()

    def new_database(self) -> Database:
        """With connections that bear this process's name."""
        return Database(self.folder.database_url(self.config), name=self.id)

    def documents(self, database: Database) -> StoredDocuments:
        """What is signed, as this process reads it: it hears of what is new, and others hear of what it writes."""
        made = StoredDocuments(database)
        made.on_written = lambda: self.signals.send("documents")
        self.signals.on("documents", lambda _: made.stale())
        self.signals.on_again("documents", made.stale)
        return made

    def fleet(self, database: Database, *, signs: bool) -> Fleet:
        """The parts of the server in this process."""
        for directory, mode in self.folder.directories():
            if directory in {self.folder.uploads, self.folder.broker}:
                files.make_directory(directory, mode=mode)
        fleet = Fleet(self.folder, self.config, shared=Shared(database, self.documents(database), self.hub, signs))
        self.hub.read = lambda after: fleet.journal.events(after=after, limit=1000)
        fleet.status.several = self.others
        return fleet

    def is_prepared(self) -> bool:
        """Whether a leader of this version has brought the database along, and its documents into it."""
        try:
            return self.database.is_current() and StoredDocuments.are_in(self.database)
        except SQLAlchemyError as error:
            _log.warning("the database does not answer yet: %s", str(error).partition("\n")[0])
            return False

    def start(self) -> None:
        self.signals.start()
        self.pulse.start()

    def stop(self) -> None:
        self.pulse.stop()
        self.signals.stop()
        self.hub.close()
        self.database.close()


def refuse_what_is_not_shared(config: FleetConfig) -> None:
    """Raises: Unavailable that says what to change in fleet.yaml."""
    if config.database_url is None or not config.database_url.startswith("postgresql"):
        raise Unavailable(
            "a server of several processes needs PostgreSQL: set database_url in fleet.yaml (docs/how-to/use-postgresql.md)",
            code="not_shared",
        )
    if config.shared_port is not None:
        raise Unavailable(
            "shared_port is for `edge-fleet serve`: before several processes the balancer tells apart who comes to one port "
            "(docs/how-to/reverse-proxy.md); remove it from fleet.yaml, and say in `public` where they are reached",
            code="not_shared",
        )
    if config.blobs.store is None:
        raise Unavailable(
            "a server of several processes keeps files of releases in an object store: set blobs.store in fleet.yaml "
            "(docs/how-to/use-an-object-store.md)",
            code="not_shared",
        )


def soon(loop: AbstractEventLoop, action: Callable[..., object], *given: object) -> Callable[[], None]:
    """What does this in the event loop's thread; for any other."""

    def later() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(action, *given)

    return later


def until_signalled(loop: AbstractEventLoop, stop: Event) -> None:
    """SIGTERM and SIGINT set `stop`."""
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


async def stopped_within(stop: Event, seconds: float) -> bool:
    """Whether `stop` was set within so long."""
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except asyncio.TimeoutError:
        return False
    return True
