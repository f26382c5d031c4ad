"""One decision at a time.

The order of each: the decision is committed, together with the number of the assignment that it makes necessary; then the
assignment is signed; then devices are poked, and people are told.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from sqlalchemy.orm import Session

from fleet_server.journal import EventView, Happening, Journal
from fleet_server.rollouts.assignment import FleetAssignment
from fleet_server.storage.database import Database


class Decision:
    """A transaction and what is to be told once it is committed."""

    def __init__(self, session: Session, journal: Journal) -> None:
        self.session, self._journal = session, journal
        self.events: list[EventView] = []
        self.verdict_changed = False

    def note(self, name: str, message: str, *, model: str, release: int, reason: str | None = None) -> None:
        """Records an event. A decision with an event is signed and told; one without changes nothing that devices are told."""
        happening = Happening(name=name, message=message, model=model, release=release, reason=reason)
        self.events.append(self._journal.record(self.session, happening))


class Decisions:
    """Where every decision about rollouts is made, one after the other."""

    def __init__(self, database: Database, assignment: FleetAssignment, journal: Journal) -> None:
        self._database, self._assignment, self._journal = database, assignment, journal
        self.lock = threading.RLock()
        """For several decisions between which nobody else may decide."""

    @contextlib.contextmanager
    def one(self) -> Iterator[Decision]:
        """A decision: committed when the block ends well, then signed, poked and told when there is an event of it."""
        with self.lock:
            with self._database.session() as session:
                decision = Decision(session, self._journal)
                yield decision
            if decision.events:
                self._assignment.publish()
                self._journal.announce(decision.events)
            if decision.events or decision.verdict_changed:
                self._journal.changed("rollouts")

    @contextlib.contextmanager
    def undone(self) -> Iterator[Decision]:
        """A decision of which nothing stays: what would follow from it can be read in the block."""
        with self.lock, contextlib.suppress(_Undone), self._database.session() as session:
            yield Decision(session, self._journal)
            raise _Undone


class _Undone(Exception):
    """Ends a transaction without a trace."""
