"""Groups with scopes: they fill themselves with the devices that meet their conditions. What a device learns of it is its signed record, as
with groups that are given by hand.

Rules:
 1. When a scope is set or removed, every device is looked at once, in the order of ids (a regrouping). How far it has come stands in the database,
    so that another process, or this one after a restart, goes on with it; another change meanwhile begins it anew.
 2. When something changes that scopes ask about, its device alone is looked at: at once where its record can be signed (labels, enrolment),
    else its row is marked as stale and the leader does it soon (hardware class, version of the software).
 3. Both go by small steps, each a short transaction, with a pause between them in which others may write.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
from sqlalchemy import Select, func, select, true, update
from sqlalchemy.orm import Session, defer

from agent.contract import names
from agent.contract.codec import decode
from fleet_server.access import Actor
from fleet_server.devices import group_scopes, grouping
from fleet_server.devices.group_scopes import GroupScope
from fleet_server.devices.grouping import Scopes
from fleet_server.devices.inventory import Inventory
from fleet_server.devices.views import GroupDetail, GroupSet, GroupView
from fleet_server.errors import Conflict, Invalid, NotFound
from fleet_server.journal import Happening, Journal
from fleet_server.storage.database import Database
from fleet_server.storage.group_models import DeviceGroup, GroupRow
from fleet_server.storage.models import Device, EnrolmentToken, Setting

MAX_SCOPED = 64
"""Groups with scopes: each is asked of each device that changes."""

REGROUPING = (
    "regrouping"  # the row of `settings` that says how far a regrouping has come; there is none when every device was looked at
)
MAX_REGROUPING_BYTES = 1024
READ_AT_ONCE = 1000
STALE_AT_ONCE = 200  # they are read in the step's own transaction, so that none is marked anew in between
SIGNED_AT_ONCE, SIGNED_FOR_S = 100, 0.05
"""A step signs no more records than this, and begins none after so long: whoever writes waits for it no longer than for a batch of reports."""

SHOWN = 20


class Regrouping(msgspec.Struct, frozen=True):
    """A look at every device. `token` tells it from a later one; devices up to `after` were looked at, of which `changed` are in other groups."""

    token: str
    after: str = ""
    changed: int = 0


class Groups:
    """For any thread. Only who can sign records takes steps."""

    def __init__(self, database: Database, inventory: Inventory, journal: Journal, clock: Callable[[], float]) -> None:
        self._database, self._inventory, self._journal, self._clock = database, inventory, journal, clock
        self.named_by: Callable[[Session, str], list[str]] = lambda _session, _group: []
        """The rollouts under way and the rules that name a group, in words."""
        self.on_work: Callable[[], None] = lambda: None
        """Told when there are steps to take."""

    # -- what operators ask for --------------------------------------------------------------------------------------------

    def every(self) -> list[GroupView]:
        """Every group that a device is in or that has a scope, by name."""
        with self._database.reading() as session:
            counted = select(DeviceGroup.name, func.count()).group_by(DeviceGroup.name)
            counts = {name: int(number) for name, number in session.execute(counted)}
            filled = {row.name: row for row in session.scalars(select(GroupRow))}
            settled = session.get(Setting, REGROUPING) is None
        return [_view(name, filled.get(name), counts.get(name, 0), settled) for name in sorted(counts.keys() | filled.keys())]

    def get(self, group: str) -> GroupDetail:
        """Raises: NotFound."""
        with self._database.reading() as session:
            row = session.get(GroupRow, group)
            devices = _count(session, group)
            if row is None and not devices:
                raise NotFound(f"there is no group {group!r}; `edge-fleet group list` shows them")
            first = select(DeviceGroup.device).where(DeviceGroup.name == group).order_by(DeviceGroup.device).limit(SHOWN)
            shown, named_by = list(session.scalars(first)), self.named_by(session, group)
            view = _view(group, row, devices, session.get(Setting, REGROUPING) is None)
        return GroupDetail(**msgspec.structs.asdict(view), first=shown, named_by=named_by)

    def set(self, actor: Actor, group: str, texts: Iterable[str]) -> GroupSet:
        """Lets the devices that meet these conditions be the group, and no others. They come into it one after the other, from now on.

        Raises: Invalid (name, conditions), Conflict (devices or enrolment tokens have it by hand; too many).
        """
        scope = _scope(group, texts)
        written = [*scope.texts]
        with self._database.session() as session:
            row = session.get(GroupRow, group)
            before = row.scope if row is not None else None
            if row is None:
                self._refuse(session, group)
                row = GroupRow(name=group)
                session.add(row)
            row.scope, row.updated, row.updated_by = written, self._clock(), actor.name
            events = []
            if before != written:
                _begin_regrouping(session)
                self._journal.audit(session, actor, "group.set", group, scope=written, before=before)
                happening = Happening(name="group_set", message=f"the group {group} is the devices in {scope}")
                events.append(self._journal.record(session, happening))
            view = _view(group, row, _count(session, group), session.get(Setting, REGROUPING) is None)
        self._announce(events)
        return GroupSet(**msgspec.structs.asdict(view), meeting=self._meeting(scope))

    def remove(self, actor: Actor, group: str) -> None:
        """Ends a group that fills itself; its devices leave it one after the other.

        Raises: NotFound; Conflict (it is given by hand; a rollout or a rule names it).
        """
        with self._database.session() as session:
            row = session.get(GroupRow, group)
            if row is None and _count(session, group):
                raise Conflict(
                    f"the group {group!r} has no scope: its devices were given it by hand, and `edge-fleet device group` takes it off them",
                    code="by_hand",
                )
            if row is None:
                raise NotFound(f"there is no group {group!r}; `edge-fleet group list` shows them")
            if named_by := self.named_by(session, group):
                raise Conflict(f"the group {group!r} is named by {named_by[0]}", code="in_use")
            session.delete(row)
            _begin_regrouping(session)
            self._journal.audit(session, actor, "group.remove", group, scope=row.scope)
            events = [
                self._journal.record(
                    session, Happening(name="group_removed", message=f"the group {group} has no scope any more")
                )
            ]
        self._announce(events)

    def _announce(self, events: Sequence[Any]) -> None:
        self._journal.announce(events)
        if events:
            self._journal.changed("devices")
            self.on_work()

    def _refuse(self, session: Session, group: str) -> None:
        """Raises: Conflict when the group is given by hand, or there are too many that fill themselves."""
        if int(session.scalar(select(func.count()).select_from(GroupRow)) or 0) >= MAX_SCOPED:
            raise Conflict(
                f"{MAX_SCOPED} groups have scopes already; remove one with `edge-fleet group remove`", code="too_many"
            )
        by_hand = select(DeviceGroup.device).where(DeviceGroup.name == group, DeviceGroup.by_scope.is_(False))
        if (device := session.scalar(by_hand.order_by(DeviceGroup.device).limit(1))) is not None:
            raise Conflict(
                f"devices have the group {group!r} by hand, such as {device}; take it off them with `edge-fleet device group`, or choose another "
                "name: a group is filled by hand or by its scope",
                code="by_hand",
            )
        now = self._clock()
        usable = select(EnrolmentToken).where(
            EnrolmentToken.revoked.is_(False), EnrolmentToken.uses_left > 0, EnrolmentToken.expires > now
        )
        if (token := next((one.id for one in session.scalars(usable) if group in one.groups), None)) is not None:
            raise Conflict(
                f"devices that join with the enrolment token {token} are given the group {group!r} by hand; revoke it first (`edge-fleet token "
                f"revoke {token}`), or choose another name",
                code="by_hand",
            )

    def _meeting(self, scope: GroupScope) -> int:
        """How many devices meet the scope now. Holds nobody up."""
        found = {"": scope}
        after, number = "", 0
        while True:
            with self._database.reading() as session:
                rows = session.execute(_devices().where(Device.id > after).limit(READ_AT_ONCE)).all()
            number += sum(bool(grouping.groups_of(row, found)[1]) for row in rows)
            if len(rows) < READ_AT_ONCE:
                return number
            after = rows[-1].id

    # -- steps -------------------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Brings the groups of some devices to what the scopes say; whether there may be more to do."""
        return self._look_at_stale() or self._go_on()

    def _look_at_stale(self) -> bool:
        """Devices of which something changed that scopes ask about."""
        stale = _devices().where(Device.stale_groups == true())
        with self._database.reading() as session:
            if session.execute(stale.limit(1)).one_or_none() is None:
                return False
        with self._database.session() as session:
            rows, found = session.execute(stale.limit(STALE_AT_ONCE)).all(), grouping.scopes(session)
            differ = [row.id for row in rows if grouping.differs(row, found)]
            same = [row.id for row in rows if row.id not in set(differ)]
            for begin in range(0, len(same), SIGNED_AT_ONCE):
                some = same[begin : begin + SIGNED_AT_ONCE]
                session.execute(update(Device).where(Device.id.in_(some)).values(stale_groups=False))
            looked_at, changed = self._bring(session, differ, found)
            events = [self._inventory.note_groups(session, row) for row in changed]
        if changed:
            self._inventory.groups_changed([row.id for row in changed], events)
        return len(rows) == STALE_AT_ONCE or looked_at < len(differ)

    def _go_on(self) -> bool:
        """With the regrouping that is under way."""
        with self._database.reading() as session:
            now = _regrouping(session)
            if now is None:
                return False
            rows, found = (
                session.execute(_devices().where(Device.id > now.after).limit(READ_AT_ONCE)).all(),
                grouping.scopes(session),
            )
        differ = [row.id for row in rows if grouping.differs(row, found)]
        events = []
        with self._database.session() as session:
            setting = session.get(Setting, REGROUPING)
            known = _regrouping(session)
            if setting is None or known is None or known.token != now.token:
                return True  # another one began meanwhile
            looked_at, changed = self._bring(session, differ, found)
            number, is_whole = known.changed + len(changed), looked_at == len(differ)
            goes_on = not is_whole or len(rows) == READ_AT_ONCE
            if goes_on:
                after = rows[-1].id if is_whole else differ[looked_at - 1]
                setting.value = msgspec.json.encode(Regrouping(now.token, after, number)).decode()
            else:
                session.delete(setting)
                message = f"every device is in the groups whose scopes it meets; {number} are in others than before"
                events.append(self._journal.record(session, Happening(name="groups_settled", message=message)))
        if changed or events:
            self._inventory.groups_changed([row.id for row in changed], events)
        return goes_on

    def _bring(self, session: Session, devices: Sequence[str], found: Scopes) -> tuple[int, list[Device]]:
        """Brings the first of these devices to the groups that they are to be in, and signs that, as many as there is time for: how many were
        looked at, and those that are in others than before.
        """
        some = devices[:SIGNED_AT_ONCE]
        query = (
            select(Device).where(Device.id.in_(some)).order_by(Device.id).options(defer(Device.state), defer(Device.hardware))
        )
        rows, changed, until = {row.id: row for row in session.scalars(query)}, list[Device](), time.monotonic() + SIGNED_FOR_S
        for number, device in enumerate(some, 1):
            row = rows.get(device)  # it may have been deleted meanwhile
            if row is not None and grouping.regroup(row, found):
                self._inventory.sign_next(row)
                changed.append(row)
            if time.monotonic() > until:
                return number, changed
        return len(some), changed


def _devices() -> Select[Any]:
    """What decides of each device which groups it is in, and which it is in."""
    columns = (Device.groups, Device.groups_by_scope, Device.labels, Device.hardware_class, Device.agent_version)
    return select(Device.id, *columns).order_by(Device.id)


def _begin_regrouping(session: Session) -> None:
    value = msgspec.json.encode(Regrouping(secrets.token_hex(8))).decode()
    setting = session.get(Setting, REGROUPING)
    if setting is None:
        session.add(Setting(name=REGROUPING, value=value))
    else:
        setting.value = value


def _regrouping(session: Session) -> Regrouping | None:
    setting = session.get(Setting, REGROUPING)
    return decode(setting.value.encode(), Regrouping, limit_bytes=MAX_REGROUPING_BYTES) if setting is not None else None


def _count(session: Session, group: str) -> int:
    return int(session.scalar(select(func.count()).select_from(DeviceGroup).where(DeviceGroup.name == group)) or 0)


def _scope(group: str, texts: Iterable[str]) -> GroupScope:
    """Raises: Invalid."""
    try:
        names.check(names.GROUP_NAME, group, "group")
    except ValueError as error:
        raise Invalid(str(error), code="bad_group") from error
    try:
        return group_scopes.read(texts)
    except ValueError as error:
        raise Invalid(str(error), code="bad_scope") from error


def _view(name: str, row: GroupRow | None, devices: int, settled: bool) -> GroupView:
    if row is None:
        return GroupView(name=name, scope=[], devices=devices, settled=settled, updated=None, updated_by=None)
    return GroupView(
        name=name, scope=row.scope, devices=devices, settled=settled, updated=row.updated, updated_by=row.updated_by
    )  # fmt: skip
