"""Which processes of the server live: each writes a row of its own every few seconds, with what others should know of it."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable
from typing import Any

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet_server.storage.database import Database
from fleet_server.storage.leadership import NOW
from fleet_server.storage.models import ProcessRow

_log = logging.getLogger(__name__)

BEAT_EVERY_S = 2.0
MISSED_AFTER_S = 10.0
"""One that said nothing for so long counts as gone."""
FORGOTTEN_AFTER_S = 3600.0

BEAT = """
INSERT INTO processes (id, kind, version, since, seen, detail)
VALUES (%(id)s, %(kind)s, %(version)s, extract(epoch FROM clock_timestamp()), extract(epoch FROM clock_timestamp()), %(detail)s)
ON CONFLICT (id) DO UPDATE SET seen = excluded.seen, detail = excluded.detail
"""
FORGET = "DELETE FROM processes WHERE seen < extract(epoch FROM clock_timestamp()) - %s"


class ProcessView(msgspec.Struct, frozen=True, kw_only=True):
    """A process of a server that is several. `id` has its kind, machine and number; `seen`: when it last said something; `missing`: so
    long ago that it counts as gone.
    """

    id: str
    kind: str
    version: str
    since: float
    seen: float
    missing: bool

    @property
    def place(self) -> str:
        """Its kind and machine."""
        return self.id.rsplit("-", 2)[0]


class Known(msgspec.Struct, frozen=True):
    """A process, and what it says of itself; that differs from kind to kind."""

    process: ProcessView
    detail: dict[str, Any]


def new_id(kind: str) -> str:
    """Of this process: no other one has it, and PostgreSQL shows all of it."""
    return f"{kind}-{socket.gethostname()[:24]}-{os.getpid()}-{secrets.token_hex(3)}"


def known(session: Session) -> list[Known]:
    """Every process that said something within the hour."""
    rows = session.execute(select(ProcessRow, NOW).order_by(ProcessRow.kind, ProcessRow.id)).all()
    return [Known(_view(row, float(now)), row.detail) for row, now in rows]


def _view(row: ProcessRow, now: float) -> ProcessView:
    missing = now - row.seen > MISSED_AFTER_S
    return ProcessView(id=row.id, kind=row.kind, version=row.version, since=row.since, seen=row.seen, missing=missing)


class Pulse:
    """Writes this process's row between `start` and `stop`, in a thread of its own; then the row is gone."""

    def __init__(self, database: Database, process: str, kind: str, version: str, detail: Callable[[], dict[str, Any]]) -> None:
        self._database, self._process, self._kind, self._version, self._detail = database, process, kind, version, detail
        self._stopping = threading.Event()
        self._now = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._now.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=2 * BEAT_EVERY_S)

    def beat(self) -> None:
        """Something that others should know has changed."""
        self._now.set()

    def _run(self) -> None:
        connection = None
        while not self._stopping.is_set():
            try:
                connection = connection or self._database.connection()
                detail = msgspec.json.encode(self._detail()).decode()
                row = {"id": self._process, "kind": self._kind, "version": self._version, "detail": detail}
                connection.execute(BEAT, row)
                connection.execute(FORGET, (FORGOTTEN_AFTER_S,))
            except Exception as error:  # noqa: BLE001 - the thread must live
                _log.debug("this process cannot say that it lives: %s", error)
                if connection is not None:
                    connection.close()
                connection = None
            self._now.wait(BEAT_EVERY_S)
            self._now.clear()
        if connection is not None:
            try:
                connection.execute("DELETE FROM processes WHERE id = %s", (self._process,))
            except Exception as error:  # noqa: BLE001 - it is forgotten in an hour
                _log.debug("this process cannot say that it ends: %s", error)
            connection.close()
