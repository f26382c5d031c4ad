"""Rows and bytes that the fleet server keeps of one device's telemetry: python -m benchmarks.kept [--models N] [--interval SECONDS]

A database is filled with what a device leaves in it after a month and after `days_kept_s`, with figures of usual size, and its files are
looked at. SQLite; PostgreSQL takes some 10 to 30 % more for its rows' headers (read in its manual, not measured).
"""

from __future__ import annotations

import argparse
import contextlib
import sqlite3
import tempfile
from pathlib import Path

from sqlalchemy import insert
from sqlalchemy.orm import Session

from agent.contract.telemetry import Figures, MachineFigures, ModelFigures, Telemetry, packed
from fleet_server.rollouts import pasts
from fleet_server.rollouts.pasts import Past
from fleet_server.sections import TelemetrySettings
from fleet_server.storage.database import Database
from fleet_server.storage.models import Device
from fleet_server.storage.telemetry_models import DeviceTelemetry, FiguresRow, PastRow

DEVICES = 20
MONTH_S = 30 * 86400.0


def usual(scale: int) -> Figures:
    """Fifteen bins of latency, ten classes, five tenths of confidence."""
    return Figures(
        ok=15 * scale, run=3, latency=dict.fromkeys(range(60, 75), scale), rows=10 * scale, classes=dict.fromkeys(range(10), scale),
        confidence=dict.fromkeys(range(5, 10), 2 * scale),
    )  # fmt: skip


def rows_of(models: int, lived_s: float, kept: TelemetrySettings) -> dict[int, int]:
    """Length in seconds → rows of it."""
    lengths = {300: kept.minutes_kept_s, 3600: kept.hours_kept_s, 86400: kept.days_kept_s}
    return {length: models * int(min(lived_s, seconds) // length) for length, seconds in lengths.items()}


def bytes_of(models: int, lived_s: float, kept: TelemetrySettings) -> float:
    """Of one device, measured with DEVICES of them."""
    with tempfile.TemporaryDirectory(prefix="edge-kept-") as folder:
        path = Path(folder) / "x.sqlite3"
        database = Database(f"sqlite:///{path}")
        database.migrate()
        before = _size(path)
        with database.session() as session:
            session.add_all(Device(id=f"device-{number:05}", created=0.0, change=0) for number in range(DEVICES))
            session.flush()
            for number in range(DEVICES):
                _fill(session, f"device-{number:05}", models, lived_s, kept)
        database.close()
        return (_size(path) - before) / DEVICES


def _fill(session: Session, device: str, models: int, lived_s: float, kept: TelemetrySettings) -> None:
    told = tuple(ModelFigures(model=f"model-{at}", release=1, figures=usual(100)) for at in range(models))
    document = Telemetry(
        device=device, counter=1, at=1.0, seconds=300, figures=told, machine=MachineFigures(memory_bytes=1 << 33)
    )
    session.add(DeviceTelemetry(device=device, counter=1, received=1.0, document=pasts.stored(document)))
    for length, count in rows_of(1, lived_s, kept).items():
        for at in range(models):
            figures = pasts.stored(usual(length // 3))
            session.execute(insert(FiguresRow), [
                {"device": device, "model": f"model-{at}", "release": 1, "length_s": length, "start": 1_800_000_000 + length * n, "figures": figures}
                for n in range(count)
            ])  # fmt: skip
    for at in range(models):
        past = Past(window=1, present=usual(10_000), before=usual(10_000), stay=usual(10_000), worked_s=1.0)
        for release in (1, 2):
            session.add(
                PastRow(device=device, model=f"model-{at}", release=release, counter=1, at=1.0, past=pasts.stored(past))
            )


def _size(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kept", description=__doc__)
    parser.add_argument("--models", type=int, default=1)
    parser.add_argument("--interval", type=float, default=300.0)
    options = parser.parse_args()
    kept = TelemetrySettings()
    told = Telemetry(
        device="device-00001", counter=1_800_000_000_000, at=1_800_000_000.0, seconds=options.interval,
        figures=tuple(ModelFigures(model=f"model-{at}", release=1, figures=usual(1000)) for at in range(options.models)),
        machine=MachineFigures(memory_bytes=8 << 30, memory_free_bytes=4 << 30, load=0.5, celsius=60.0),
    )  # fmt: skip
    envelope = len(packed(told)) * 4 // 3 + 330  # base64, and the signature with its key's id
    print(
        f"{options.models} models, telemetry every {options.interval:g} s: {envelope} bytes a message, {envelope * 3600 / options.interval / 1024:.1f} KiB an hour"
    )
    for what, lived in (("a month", MONTH_S), ("as long as days are kept", kept.days_kept_s)):
        rows = rows_of(options.models, lived, kept)
        print(
            f"after {what}: {sum(rows.values())} rows of figures {rows}, {bytes_of(options.models, lived, kept) / 1024:.0f} KiB of database a device"
        )


if __name__ == "__main__":
    main()
