"""What changed of devices, in order, for whoever keeps up with it by reading the database: rollouts are judged by that.

Each transaction that changes what rollouts know of a device (groups, revoked, present, silence, shared identity, hardware class,
what it says of its models) takes one number and writes it into the device's row; one that deletes a device leaves the number
behind. The counter's row is held until the transaction ends, so numbers become visible in their order, also where several
processes write: who has read up to a number has missed nothing below it.

Rows that are changed as objects get their number by themselves (`follow`), and what devices are searched by follows their groups and
certificates; statements must do so on their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, event, func, insert, inspect, select, update
from sqlalchemy.orm import Session

from fleet_server.storage.group_models import DeviceGroup, DeviceLabel
from fleet_server.storage.models import Base, Certificate, Counter, DeletedDevice, Device, ToldDevice

COUNTER = "device_changes"
WATCHED = ("groups", "labels", "revoked", "present", "last_seen", "shared", "hardware_class", "retries")
AT_ONCE = 500
_KEPT = "device_change"  # in the session's notes: the number of its transaction

_ADD = (
    update(Counter.__table__)  # type: ignore[arg-type]
    .where(Counter.__table__.c.name == COUNTER)
    .values(value=Counter.__table__.c.value + 1)
    .returning(Counter.__table__.c.value)
)


def take(session: Session) -> int:
    """The number of this transaction's changes. Take it before the first row of a device is written."""
    number = session.info.get(_KEPT)
    if number is None:
        number = session.info[_KEPT] = int(session.connection().execute(_ADD).scalar_one())
    return int(number)


def last(session: Session) -> int:
    """The number up to which everything can be read."""
    return int(session.scalar(select(Counter.value).where(Counter.name == COUNTER)) or 0)


def deleted(session: Session, after: int, up_to: int) -> Sequence[str]:
    """The devices that were deleted by changes with a number above `after`. One may have been enrolled again since."""
    query = select(DeletedDevice.device).where(DeletedDevice.change > after, DeletedDevice.change <= up_to)
    return session.scalars(query).all()


def follow(session_class: type[Session]) -> None:
    """Lets the sessions of this class number what they change of devices, and keep what devices are searched by."""
    event.listen(session_class, "before_flush", _number)
    event.listen(session_class, "before_flush", _begin_untold)
    event.listen(session_class, "after_flush", _write_groups)
    event.listen(session_class, "after_flush", _write_labels)
    event.listen(session_class, "after_flush", _write_expiry)


def _number(session: Session, *_: Any) -> None:
    for row in [*session.new, *session.dirty]:
        if isinstance(row, Device) and (row in session.new or _differs(row, WATCHED)):
            row.change = take(session)
    for row in session.deleted:
        if isinstance(row, Device):
            number, connection = take(session), session.connection()
            connection.execute(delete(DeletedDevice).where(DeletedDevice.device == row.id))
            connection.execute(insert(DeletedDevice).values(device=row.id, change=number))


def _begin_untold(session: Session, *_: Any) -> None:
    """What a deleted device was told says nothing of a new one with its id."""
    fresh = [row.id for row in session.new if isinstance(row, Device)]
    for start in range(0, len(fresh), AT_ONCE):
        some, connection = fresh[start : start + AT_ONCE], session.connection()
        again = connection.scalars(select(DeletedDevice.device).where(DeletedDevice.device.in_(some))).all()
        if again:
            connection.execute(delete(ToldDevice).where(ToldDevice.device.in_(again)))


def _write_groups(session: Session, *_: Any) -> None:
    for row in [*session.new, *session.dirty]:
        if isinstance(row, Device) and (row in session.new or _differs(row, ("groups", "groups_by_scope"))):
            connection = session.connection()
            connection.execute(delete(DeviceGroup).where(DeviceGroup.device == row.id))
            if row.groups:
                by_scope = set(row.groups_by_scope or ())
                found = [{"device": row.id, "name": name, "by_scope": name in by_scope} for name in dict.fromkeys(row.groups)]
                connection.execute(insert(DeviceGroup), found)


def _write_labels(session: Session, *_: Any) -> None:
    for row in [*session.new, *session.dirty]:
        if isinstance(row, Device) and (row in session.new or _differs(row, ("labels",))):
            connection = session.connection()
            connection.execute(delete(DeviceLabel).where(DeviceLabel.device == row.id))
            if row.labels:
                found = [{"device": row.id, "name": name, "value": value} for name, value in row.labels.items()]
                connection.execute(insert(DeviceLabel), found)


def _write_expiry(session: Session, *_: Any) -> None:
    rows = [row for row in [*session.new, *session.dirty] if isinstance(row, Certificate)]
    touched = {row.device for row in rows if row in session.new or _differs(row, ("revoked", "expires"))}
    touched |= {row.id for row in session.new if isinstance(row, Device)}  # its certificate may have been written before
    if touched:
        last = select(func.max(Certificate.expires)).where(Certificate.device == Device.id, Certificate.revoked.is_(None))
        session.connection().execute(
            update(Device.__table__)  # type: ignore[arg-type]
            .where(Device.__table__.c.id.in_(touched))
            .values(expires=last.correlate(Device).scalar_subquery())
        )


def _differs(row: Base, names: Sequence[str]) -> bool:
    attributes = inspect(row).attrs
    return any(attributes[name].history.has_changes() for name in names)
