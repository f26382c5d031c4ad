"""Questions about many devices: counting, searching, finding those that a person must see to.

The database answers each from an index or a page of rows; none reads every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

from agent.contract.names import ReleaseRef
from agent.contract.reasons import Reason
from fleet_server.devices import shared_identity
from fleet_server.devices.inventory import Inventory
from fleet_server.devices.views import CertificateState, DeviceCount, DevicePage, DeviceView
from fleet_server.storage.database import Database
from fleet_server.storage.group_models import DeviceGroup, DeviceLabel
from fleet_server.storage.models import Device, DeviceModel

PAGE_BYTES = 4 * 1024 * 1024
"""A page ends here, however few devices it has: one report may have 256 KiB."""

ROWS_AT_ONCE = 100

_AHEAD = (Reason.METADATA_ROLLBACK.value, Reason.REPLAYED_ASSIGNMENT.value)


class Filters(msgspec.Struct, frozen=True, kw_only=True):
    """Which devices are looked for: those that pass every filter that is set.

    `text` is in the id, in a group or in a model, or is the release that serves (`digits:4`); `prefix` begins the id; `label` is a name,
    or a name and a value (`site=berlin`). `model`,
    `release` and `phase` are of the same model.
    """

    text: str | None = None
    prefix: str | None = None
    group: str | None = None
    label: str | None = None
    model: str | None = None
    release: int | None = None
    phase: str | None = None
    online: bool | None = None
    hardware: str | None = None
    certificate: CertificateState | None = None
    trouble: bool | None = None


class Some(msgspec.Struct, frozen=True):
    """How many devices are like that, and the first of them."""

    count: int
    first: list[str]


class Survey:
    def __init__(self, database: Database, inventory: Inventory, clock: Callable[[], float]) -> None:
        self._database, self._inventory, self._clock = database, inventory, clock

    # -- searching ---------------------------------------------------------------------------------------------------------

    def find(self, filters: Filters, *, limit: int = 1000, after: str = "") -> DevicePage:
        """At most `limit` devices that pass the filters, in the order of their ids, from behind `after` on."""
        query = select(Device).where(*self._conditions(filters)).order_by(Device.id)
        now, found, size = self._clock(), list[DeviceView](), 0
        with self._database.reading() as session:
            while True:
                at_once = min(ROWS_AT_ONCE, limit + 1 - len(found))
                rows = session.scalars(query.where(Device.id > after).limit(at_once)).all()
                for row in rows:
                    if len(found) == limit or size > PAGE_BYTES:
                        return DevicePage(devices=found, next=after)
                    found.append(self._inventory.view(row, now))
                    size += len(msgspec.json.encode(found[-1]))
                    after = row.id
                if len(rows) < at_once:
                    return DevicePage(devices=found, next=None)
                session.expunge_all()

    def every(self, filters: Filters, limit: int) -> list[tuple[str, list[str], str | None, dict[str, str]]]:
        """Id, groups, hardware class and labels of the devices that pass the filters and are not shut out, at most `limit`."""
        query = select(Device.id, Device.groups, Device.hardware_class, Device.labels).where(
            Device.revoked.is_(False), *self._conditions(filters)
        )
        with self._database.reading() as session:
            return [
                (row.id, row.groups, row.hardware_class, row.labels or {})
                for row in session.execute(query.order_by(Device.id).limit(limit))
            ]

    def _conditions(self, filters: Filters) -> list[ColumnElement[bool]]:
        found: list[ColumnElement[bool]] = []
        if filters.prefix:
            found += [Device.id >= filters.prefix, func.substr(Device.id, 1, len(filters.prefix)) == filters.prefix]
        if filters.text:
            found.append(_says(filters.text))
        if filters.group is not None:
            found.append(Device.id.in_(select(DeviceGroup.device).where(DeviceGroup.name == filters.group)))
        if filters.label is not None:
            name, equals, value = filters.label.partition("=")
            wanted_value = [DeviceLabel.value == value] if equals else []
            found.append(Device.id.in_(select(DeviceLabel.device).where(DeviceLabel.name == name, *wanted_value)))
        of_model: dict[Any, Any] = {
            DeviceModel.model: filters.model, DeviceModel.serving: filters.release, DeviceModel.phase: filters.phase
        }  # fmt: skip
        if wanted := [column == value for column, value in of_model.items() if value is not None]:
            found.append(Device.id.in_(select(DeviceModel.device).where(*wanted)))
        if filters.online is not None:
            online = self._online()
            found.append(online if filters.online else ~online)
        if filters.hardware is not None:
            found.append(Device.hardware_class == filters.hardware)
        if filters.certificate is not None:
            found += [Device.revoked.is_(False), self._certificate(filters.certificate)]
        if filters.trouble is not None:
            found += [Device.trouble.is_(filters.trouble), Device.revoked.is_(False)]
        return found

    def _online(self) -> ColumnElement[bool]:
        """What `Inventory.is_online` says, as a condition."""
        now = self._clock()
        there = and_(Device.present.is_(True), Device.last_seen.is_not(None))
        if now < self._inventory.silent_at(float("-inf")):
            return there  # whoever is present was not heard because nobody could be
        return and_(there, Device.last_seen > now - self._inventory.silence_s)

    def _certificate(self, state: CertificateState) -> ColumnElement[bool]:
        now = self._clock()
        soon = now + self._inventory.ends_soon_s
        if state == "ended":
            return or_(Device.expires.is_(None), Device.expires <= now)
        return and_(Device.expires > now, Device.expires < soon) if state == "ends_soon" else Device.expires >= soon

    # -- counting ----------------------------------------------------------------------------------------------------------

    def count(self) -> DeviceCount:
        """How many devices there are (those shut out left out), and how many of them are online, and in trouble."""
        with self._database.reading() as session:
            total = _count(session, Device.revoked.is_(False))
            online = _count(session, Device.revoked.is_(False), self._online())
            trouble = _count(session, Device.trouble.is_(True), Device.revoked.is_(False))
        return DeviceCount(total=total, online=online, trouble=trouble)

    def present(self) -> int:
        """How many devices the broker counts as present. Cheaper than `count`, and an old word for those that fell silent."""
        with self._database.reading() as session:
            return _count(session, Device.present.is_(True), Device.revoked.is_(False))

    def shared(self, named: int) -> Some:
        """Devices of which several machines report."""
        return self._some(named, Device.shared > self._clock() - shared_identity.SHARED_S)

    def ahead(self, named: int) -> Some:
        """Devices that have seen newer signed documents than this server has, and so refuse its word: it was restored from a
        copy.
        """
        return self._some(named, or_(*(and_(Device.problem >= f"{word}:", Device.problem < f"{word};") for word in _AHEAD)))

    def certificates(self, state: CertificateState, named: int) -> Some:
        """Devices whose certificates are like that."""
        return self._some(named, self._certificate(state))

    def _some(self, named: int, *conditions: ColumnElement[bool]) -> Some:
        """Of the devices that are not shut out."""
        conditions = (Device.revoked.is_(False), *conditions)
        with self._database.reading() as session:
            count = _count(session, *conditions)
            first = select(Device.id).where(*conditions).order_by(Device.id).limit(named)
            return Some(count, list(session.scalars(first)) if count else [])


def _count(session: Session, *conditions: ColumnElement[bool]) -> int:
    return int(session.scalar(select(func.count()).select_from(Device).where(*conditions)) or 0)


def _says(text: str) -> ColumnElement[bool]:
    """Where the text stands that a person looks for, in capitals or not."""

    def has(column: Any) -> ColumnElement[bool]:
        found: ColumnElement[bool] = func.lower(column).contains(text.lower(), autoescape=True)
        return found

    where = [
        has(Device.id),
        Device.id.in_(select(DeviceGroup.device).where(has(DeviceGroup.name))),
        Device.id.in_(select(DeviceModel.device).where(has(DeviceModel.model))),
    ]
    try:
        ref = ReleaseRef.parse(text)
    except ValueError:
        return or_(*where)
    serving = select(DeviceModel.device).where(DeviceModel.model == ref.model, DeviceModel.serving == ref.version)
    return or_(*where, Device.id.in_(serving))
