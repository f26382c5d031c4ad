"""Who decides and signs, where there are several who could: one leader, with a fencing number that grows with each.

1. The leader's lease stands in the database and ends by the database's clock. The leader prolongs it every second; one that cannot
for `LEASE_S - MARGIN_S`, by its own clock, decides no more. So it has stopped before another may begin.
2. Another takes over when the lease has ended, or at once when it was given back, with the next number.
3. Each writing transaction of a leader begins by comparing its number with the one in the database (`check`). Whoever writes is
alone, and so is whoever takes over: what an earlier leader began is stored before the next one begins, or never. One that was
stopped and goes on finds another number, and stores nothing; what is signed in such a transaction leaves the process only after it.
4. Who takes over ends the connections of the leader before. One that stands still in the middle of a transaction would keep everybody
from writing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from fleet_server.errors import Unavailable
from fleet_server.storage.database import Database
from fleet_server.storage.models import LeaderRow

_log = logging.getLogger(__name__)

NAME = "decide"
LEASE_S = 6.0
MARGIN_S = 1.0
RENEW_EVERY_S = 1.0
NOW = func.extract("epoch", func.clock_timestamp())
"""By the database's clock."""


class Fenced(Unavailable):
    """The process leads no more; nothing of the transaction is stored."""

    code = "not_leading"


class Leader(msgspec.Struct, frozen=True):
    """Who leads. `number` is the fencing number; `address` HOST:PORT where it is spoken to; `since` in seconds since the epoch."""

    number: int
    holder: str
    address: str
    since: float


def current(session: Session) -> Leader | None:
    """The leader whose lease has not ended."""
    row = session.execute(select(LeaderRow, NOW).where(LeaderRow.name == NAME)).one_or_none()
    if row is None or row[0].until <= float(row[1]):
        return None
    found: LeaderRow = row[0]
    return Leader(found.number, found.holder, found.address, found.since)


class Leadership:
    """One process that may lead. `holder` is its name, which is also that of its connections to the database."""

    def __init__(
        self, database: Database, holder: str, address: str, *, lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._database, self.holder, self.address, self._lease_s, self._clock = database, holder, address, lease_s, clock
        self.number: int | None = None
        """The number with which it leads."""
        self._deadline = 0.0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost_because = ""

    def take(self) -> bool:
        """Leads, if nobody does; whether it does now.  Raises: SQLAlchemyError."""
        with self._database.reading() as session:
            before = session.get(LeaderRow, NAME)
            if current(session) is not None:
                return False
        if before is not None and before.until > 0 and before.holder != self.holder:
            self._end_connections(before.holder)
        began = self._clock()
        with self._database.session() as session:
            if current(session) is not None:
                return False
            now = float(session.execute(select(NOW)).scalar_one())
            row = session.get(LeaderRow, NAME)
            number = row.number + 1 if row is not None else 1
            new = LeaderRow(
                name=NAME, number=number, holder=self.holder, address=self.address, since=now, until=now + self._lease_s
            )
            session.merge(new)
        self.number, self._deadline, self.lost_because = number, began + self._lease_s - MARGIN_S, ""
        return True

    def hold(self, on_lost: Callable[[], None]) -> None:
        """Prolongs the lease in a thread of its own until `give_back`, or until it is lost; that is told once."""
        self._stopping.clear()
        self._thread = threading.Thread(target=self._hold, args=(on_lost,), name="leadership", daemon=True)
        self._thread.start()

    def check(self, session: Session) -> None:
        """For the beginning of each writing transaction.  Raises: Fenced."""
        if self.number is None or self._clock() > self._deadline:
            raise Fenced(f"{self.holder} leads no more: {self.lost_because or 'its lease could not be prolonged in time'}")
        found = session.execute(select(LeaderRow.number, LeaderRow.holder).where(LeaderRow.name == NAME)).one()
        if found.number != self.number:
            raise Fenced(f"{self.holder} led with number {self.number}; {found.holder} leads with number {found.number} now")

    @property
    def leads(self) -> bool:
        """Whether it may decide, by its own clock."""
        return self.number is not None and self._clock() <= self._deadline

    def give_back(self) -> None:
        """Leads no more: another may at once."""
        number, self.number = self.number, None
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * LEASE_S)
        if number is None:
            return
        try:
            with self._database.connection() as connection:
                connection.execute("UPDATE leaders SET until = 0 WHERE name = %s AND number = %s", (NAME, number))
        except Exception as error:  # noqa: BLE001 - psycopg is not there for everybody to name its errors
            _log.warning("that this process leads no more could not be said; another one does in %.0f s: %s", LEASE_S, error)

    def _hold(self, on_lost: Callable[[], None]) -> None:
        connection: Any = None
        while not self._stopping.wait(RENEW_EVERY_S):
            began = self._clock()
            try:
                connection = connection or self._database.connection()
                if not self._prolonged(connection):
                    self.lost_because = "another one does"
                    break
                self._deadline = began + self._lease_s - MARGIN_S
            except Exception as error:  # noqa: BLE001 - as above
                _log.warning("the lease of who decides cannot be prolonged: %s", error)
                _close(connection)
                connection = None
                self.lost_because = f"the database does not answer ({error})"
            if self._clock() > self._deadline:
                break
        _close(connection)
        if not self._stopping.is_set():
            self.number = None
            on_lost()

    def _prolonged(self, connection: Any) -> bool:
        """Not for one whose lease has ended, though nobody took it: what is over is over."""
        statement = (
            "UPDATE leaders SET until = extract(epoch FROM clock_timestamp()) + %s "
            "WHERE name = %s AND number = %s AND until > extract(epoch FROM clock_timestamp())"
        )
        done = connection.execute(statement, (self._lease_s, NAME, self.number))
        return bool(done.rowcount)

    def _end_connections(self, holder: str) -> None:
        statement = text("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = :name")
        with self._database.reading() as session:
            ended = session.execute(statement, {"name": holder[:63]}).scalar()
        if ended:
            _log.warning("ended %s connections of %s, whose lease is over", ended, holder)


def _close(connection: Any) -> None:
    if connection is not None:
        connection.close()
