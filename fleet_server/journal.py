"""What happened (events) and who changed what (audit): stored, and told to everybody who reads along."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from sqlalchemy import delete, func, insert, select
from sqlalchemy.orm import Session

from agent.contract.reports import Event
from fleet_server.access import Actor
from fleet_server.live import Change, Hub
from fleet_server.storage import once
from fleet_server.storage.database import Database
from fleet_server.storage.models import AuditRow, EventRow

MAX_MESSAGE_CHARS = 2000
PRUNE_EVERY = 1000  # events of devices between two deletions of the oldest ones


class Happening(msgspec.Struct, frozen=True, kw_only=True):
    """An event of the server itself."""

    name: str
    message: str
    device: str | None = None
    model: str | None = None
    release: int | None = None
    reason: str | None = None


class EventView(msgspec.Struct, frozen=True):
    """An event as operators see it. `device` is None when the server itself says it; `at` is the teller's clock, `received` the
    server's.
    """

    seq: int
    id: str
    device: str | None
    at: float
    received: float
    name: str
    message: str
    model: str | None
    release: int | None
    reason: str | None


class AuditView(msgspec.Struct, frozen=True):
    """A change that somebody made. `detail` differs from action to action."""

    seq: int
    at: float
    who: str
    role: str
    action: str
    subject: str
    detail: dict[str, Any]


class Journal:
    def __init__(
        self, database: Database, hub: Hub, clock: Callable[[], float], *, events_kept: int, prune_every: int = PRUNE_EVERY
    ) -> None:
        self._database, self._hub, self._clock = database, hub, clock
        self._kept, self._prune_every = events_kept, prune_every
        self._since_prune = 0

    # -- events ------------------------------------------------------------------------------------------------------------

    def record(self, session: Session, happening: Happening) -> EventView:
        """Stores an event of the server in the caller's transaction. Pass what comes back to `announce` after the commit."""
        now = self._clock()
        row = EventRow(
            id=f"server-{secrets.token_hex(12)}", device=happening.device, at=now, received=now, name=happening.name,
            message=happening.message[:MAX_MESSAGE_CHARS], model=happening.model, release=happening.release, reason=happening.reason,
        )  # fmt: skip
        session.add(row)
        session.flush()
        return event_view(row)

    def note(self, happening: Happening) -> None:
        """Stores an event of the server by itself, and tells everybody who reads along."""
        with self._database.session() as session:
            event = self.record(session, happening)
        self.announce([event])

    def record_from_devices(self, session: Session, events: Iterable[Event]) -> list[EventView]:
        """Stores what devices said happened, in their order, but for what was stored before."""
        said: dict[str, dict[str, Any]] = {}
        for event in events:
            known = f"{event.device}/{event.id}"[:128]
            said.setdefault(known, _row_of(event, known, self._clock()))
        if not said:
            return []
        stored = set(session.scalars(select(EventRow.id).where(EventRow.id.in_(said))))
        rows = [row for known, row in said.items() if known not in stored]
        if not rows:
            return []
        session.execute(insert(EventRow), rows)
        numbers = dict(
            session.execute(select(EventRow.id, EventRow.seq).where(EventRow.id.in_([row["id"] for row in rows]))).all()
        )
        self._prune(session, len(rows))
        return [EventView(seq=numbers[row["id"]], **row) for row in rows]

    def announce(self, events: Iterable[EventView]) -> None:
        """Tells everybody who reads along what was stored."""
        for event in events:
            self._hub.tell(event)

    def changed(self, what: str) -> None:
        """Says that `what` (devices, rollouts, releases, …) should be read again."""
        self._hub.tell(Change(what))

    def events(
        self, *, after: int | None = None, before: int | None = None, limit: int = 100, device: str | None = None
    ) -> list[EventView]:
        """Events in order. `after` gives the oldest ones behind that number, otherwise the newest ones (before `before`)."""
        query = select(EventRow).limit(limit)
        if device is not None:
            query = query.where(EventRow.device == device)
        if after is not None:
            query = query.where(EventRow.seq > after).order_by(EventRow.seq)
        else:
            query = query.order_by(EventRow.seq.desc())
            if before is not None:
                query = query.where(EventRow.seq < before)
        with self._database.reading() as session:
            rows = list(session.scalars(query))
        return [event_view(row) for row in (rows if after is not None else reversed(rows))]

    def _prune(self, session: Session, came: int) -> None:
        self._since_prune += came
        if self._since_prune >= self._prune_every:
            # Twice what came, so that it gets there after a change of settings.
            self._delete_events(session, 2 * self._since_prune)
            self._since_prune = 0

    def prune_events(self, rows: int) -> int:
        """Deletes the oldest events that are too many, but no more than so many; how many it deleted."""
        with self._database.session() as session:
            return self._delete_events(session, rows)

    def _delete_events(self, session: Session, rows: int) -> int:
        oldest, newest = session.execute(select(func.min(EventRow.seq), func.max(EventRow.seq))).one()
        if oldest is None or oldest > newest - self._kept:
            return 0
        last = min(newest - self._kept, oldest + rows - 1)
        return session.execute(delete(EventRow).where(EventRow.seq <= last)).rowcount  # type: ignore[no-any-return,attr-defined]

    # -- audit -------------------------------------------------------------------------------------------------------------

    def audit(self, session: Session, actor: Actor | None, action: str, subject: str, **detail: Any) -> None:
        """Notes a change in the transaction that makes it. Without an actor: what somebody unknown tried."""
        who, role = (actor.name, actor.role.value) if actor is not None else ("", "")
        session.add(AuditRow(at=self._clock(), who=who, role=role, action=action, subject=subject[:256], detail=detail))

    def prune_audit(self, before: float, rows: int) -> int:
        """Deletes the oldest entries of before that moment, but no more than so many; how many it deleted."""
        with self._database.session() as session:
            oldest = select(AuditRow.seq).order_by(AuditRow.seq).limit(rows).subquery()
            query = delete(AuditRow).where(AuditRow.seq.in_(select(oldest.c.seq)), AuditRow.at < before)
            return session.execute(query).rowcount  # type: ignore[no-any-return,attr-defined]

    def forget_requests(self, now: float) -> None:
        """Forgets which requests were done, after a day."""
        with self._database.session() as session:
            once.forget(session, now)

    def audited(self, *, before: int | None = None, limit: int = 100) -> list[AuditView]:
        """Changes, the newest first."""
        query = select(AuditRow).order_by(AuditRow.seq.desc()).limit(limit)
        if before is not None:
            query = query.where(AuditRow.seq < before)
        with self._database.reading() as session:
            rows = list(session.scalars(query))
        return [AuditView(r.seq, r.at, r.who, r.role, r.action, r.subject, r.detail) for r in rows]


def _row_of(event: Event, known: str, received: float) -> dict[str, Any]:
    return {
        "id": known, "device": event.device, "at": event.at, "received": received, "name": event.name[:128],
        "message": event.message[:MAX_MESSAGE_CHARS], "model": event.model and event.model[:64], "release": event.release,
        "reason": event.reason and event.reason[:128],
    }  # fmt: skip


def event_view(row: EventRow) -> EventView:
    return EventView(
        seq=row.seq, id=row.id, device=row.device, at=row.at, received=row.received, name=row.name, message=row.message,
        model=row.model, release=row.release, reason=row.reason,
    )  # fmt: skip
