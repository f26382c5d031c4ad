"""The tables of what devices tell about how their models do, and of what rollouts take from it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Float, ForeignKey, Index, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.storage.models import Base, Sequence


class DeviceTelemetry(Base):
    """The last telemetry of a device. `counter`: nothing that is not above it is taken."""

    __tablename__ = "device_telemetry"
    device: Mapped[str] = mapped_column(ForeignKey("devices.id", ondelete="CASCADE"), primary_key=True)
    counter: Mapped[int]
    received: Mapped[float] = mapped_column(Float)
    document: Mapped[dict[str, Any]] = mapped_column(JSON)


class FiguresRow(Base):
    """What a release did on a device in a while: `length_s` seconds from `start` on, both in whole seconds."""

    __tablename__ = "device_figures"
    device: Mapped[str] = mapped_column(ForeignKey("devices.id", ondelete="CASCADE"), primary_key=True)
    model: Mapped[str] = mapped_column(String(64), primary_key=True)
    release: Mapped[int] = mapped_column(primary_key=True)
    length_s: Mapped[int] = mapped_column(Integer, primary_key=True)
    start: Mapped[int] = mapped_column(primary_key=True)
    figures: Mapped[dict[str, Any]] = mapped_column(JSON)
    __table_args__ = (Index("ix_device_figures_age", "length_s", "start"),)


class PastRow(Base):
    """What a device did with a release, for rollouts to compare: see `rollouts.pasts`."""

    __tablename__ = "device_pasts"
    device: Mapped[str] = mapped_column(ForeignKey("devices.id", ondelete="CASCADE"), primary_key=True)
    model: Mapped[str] = mapped_column(String(64), primary_key=True)
    release: Mapped[int] = mapped_column(primary_key=True)
    counter: Mapped[int]
    """Of the last telemetry that told of it."""
    at: Mapped[float] = mapped_column(Float, index=True)
    past: Mapped[dict[str, Any]] = mapped_column(JSON)


class HealthSampleRow(Base):
    """What one device said in one test of a rollout's health; never changed. `change`: the number of the transaction that stored it."""

    __tablename__ = "health_samples"
    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    rollout: Mapped[str] = mapped_column(ForeignKey("rollouts.id", ondelete="CASCADE"))
    change: Mapped[int]
    device: Mapped[str] = mapped_column(String(64))
    test: Mapped[str] = mapped_column(String(16))
    at: Mapped[float] = mapped_column(Float)
    before: Mapped[float] = mapped_column(Float)
    now: Mapped[float] = mapped_column(Float)
    of_before: Mapped[int]
    of_now: Mapped[int]
    __table_args__ = (
        Index("ix_health_samples_change", "rollout", "change", "seq"),
        Index("ix_health_samples_device", "rollout", "device", "test", unique=True),
    )
