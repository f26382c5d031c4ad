"""What devices told of how their models do, for whoever asks, and how long it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from sqlalchemy import delete, select, tuple_
from sqlalchemy.orm import Session

from agent.contract import codec
from agent.contract.telemetry import Figures, Telemetry, median_ms
from fleet_server.devices.views import FiguresView, TelemetryView
from fleet_server.errors import NotFound
from fleet_server.sections import TelemetrySettings
from fleet_server.storage.database import Database
from fleet_server.storage.models import Device
from fleet_server.storage.telemetry_models import DeviceTelemetry, FiguresRow, PastRow

LENGTHS_S = (300, 3600, 86400)


class Told:
    """Reads the tables, and removes what is too old."""

    def __init__(self, database: Database, settings: TelemetrySettings, clock: Callable[[], float]) -> None:
        self._database, self._settings, self._clock = database, settings, clock

    def series(self, device: str, *, length_s: int, model: str | None = None, limit: int = 100) -> list[FiguresView]:
        """What the models of a device did in stretches of so many seconds, the newest first.  Raises: NotFound."""
        query = select(FiguresRow).where(FiguresRow.device == device, FiguresRow.length_s == length_s)
        if model is not None:
            query = query.where(FiguresRow.model == model)
        query = query.order_by(FiguresRow.start.desc(), FiguresRow.model, FiguresRow.release).limit(limit)
        with self._database.reading() as session:
            if session.get(Device, device) is None:
                raise NotFound(f"there is no device {device!r}; `edge-fleet device list` shows them")
            return [_shown(row) for row in session.scalars(query)]

    def prune(self, limit: int) -> int:
        """Removes at most `limit` rows that are too old; how many it were."""
        now, kept = self._clock(), self._settings
        removed = 0
        with self._database.session() as session:
            for length, seconds in zip(LENGTHS_S, (kept.minutes_kept_s, kept.hours_kept_s, kept.days_kept_s), strict=True):
                old = FiguresRow.length_s == length, FiguresRow.start < now - seconds - length
                removed += _delete(session, FiguresRow, _key(FiguresRow), old, limit - removed)
            removed += _delete(session, PastRow, _key(PastRow), (PastRow.at < now - kept.days_kept_s,), limit - removed)
        return removed


def last(session: Session, device: str) -> TelemetryView | None:
    """What the device told last; None when that was nothing, or nothing that this version understands."""
    row = session.get(DeviceTelemetry, device)
    if row is None:
        return None
    try:
        told = codec.convert(row.document, Telemetry, str_keys=True)
    except msgspec.ValidationError:
        return None
    return TelemetryView(
        row.received, told, {f"{one.model}:{one.release}": median_ms(one.figures.latency) for one in told.figures}
    )


def forget(session: Session, device: str) -> None:
    """In the caller's transaction."""
    for table in (DeviceTelemetry, FiguresRow, PastRow):
        session.execute(delete(table).where(table.device == device))


def _shown(row: FiguresRow) -> FiguresView:
    figures = codec.convert(row.figures, Figures, str_keys=True)
    return FiguresView(
        model=row.model, release=row.release, start=row.start, length_s=row.length_s, requests=figures.requests, errors=figures.errors,
        median_ms=median_ms(figures.latency), figures=figures,
    )  # fmt: skip


def _key(table: type[Any]) -> list[Any]:
    return [getattr(table, column.name) for column in table.__table__.primary_key]


def _delete(session: Session, table: type[Any], key: list[Any], old: Iterable[Any], limit: int) -> int:
    if limit <= 0:
        return 0
    found = [tuple(row) for row in session.execute(select(*key).where(*old).limit(limit))]
    for begin in range(0, len(found), 100):
        session.execute(delete(table).where(tuple_(*key).in_(found[begin : begin + 100])))
    return len(found)
