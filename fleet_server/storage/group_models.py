"""The tables of groups and labels: what fills a group by itself, and what devices are searched by."""

from __future__ import annotations

from sqlalchemy import JSON, Boolean, Float, ForeignKey, Index, String, false
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.storage.models import Base


class GroupRow(Base):
    """A group with a scope: the devices that meet it are in the group. Groups that are given by hand have no row."""

    __tablename__ = "groups"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    scope: Mapped[list[str]] = mapped_column(JSON)
    """Its conditions, as `devices.group_scopes` writes them."""
    updated: Mapped[float] = mapped_column(Float)
    updated_by: Mapped[str] = mapped_column(String(128))


class DeviceGroup(Base):
    """A group of a device once more, for searching. Written wherever `Device.groups` is; see `storage.changes`."""

    __tablename__ = "device_groups"
    device: Mapped[str] = mapped_column(ForeignKey("devices.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    by_scope: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    __table_args__ = (Index("ix_device_groups_name", "name", "device"),)


class DeviceLabel(Base):
    """A label of a device once more, for searching. Written wherever `Device.labels` is; see `storage.changes`."""

    __tablename__ = "device_labels"
    device: Mapped[str] = mapped_column(ForeignKey("devices.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(String(64))
    __table_args__ = (Index("ix_device_labels_name", "name", "value", "device"),)
