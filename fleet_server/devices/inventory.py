"""The devices of the fleet: their groups and signed records, their certificates, what they said last."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

import msgspec
from cryptography import x509
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from agent.contract.assignment import RECORD_PAYLOAD_TYPE, DeviceRecord, Retry
from agent.contract.codec import convert, encode
from agent.contract.reports import Hardware, ModelState, StateReport
from fleet_server.access import Actor
from fleet_server.config import FleetConfig
from fleet_server.devices import grouping, pki, shared_identity, told
from fleet_server.devices.envelopes import DeviceKey, key_of
from fleet_server.devices.views import CertificateState, CertificateView, DeviceDetail, DeviceView
from fleet_server.errors import Conflict, Invalid, NotFound, Refused
from fleet_server.journal import EventView, Happening, Journal
from fleet_server.releases.repository import Repository
from fleet_server.storage.database import Database
from fleet_server.storage.models import Certificate, Device, DeviceModel, Setting, SkippedDevice

SERIAL_FLOOR = "deleted_serial"  # the row of `settings` with the largest record serial of a device that was deleted
ENDS_SOON = 6  # a certificate with less than this part of its life left ends soon
MAX_LATE_S = 30 * 86400.0  # for how long an operator may allow a late renewal at most
T = TypeVar("T")


class Link(Protocol):
    """What the inventory needs of the broker's side."""

    def poke_device(self, device: str) -> None: ...

    def shut_out(self, device: str) -> None:
        """The device's certificates are on the revocation list on disk now: the broker must drop it and not let it in again."""

    def admit(self, device: str) -> None:
        """A device of this id was enrolled: the broker may let it in, with its new certificate."""


class Inventory:
    def __init__(
        self, database: Database, authority: pki.Authority, repository: Repository, journal: Journal, config: FleetConfig,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._database, self._authority, self._repository = database, authority, repository
        self._journal, self._config, self._clock = journal, config, clock
        self._revocation = threading.Lock()
        self.shut_out = 0
        """How often devices were shut out since this process began: who was let in before is looked up again."""
        self.link: Link | None = None
        self.on_crl: Callable[[], None] = lambda: None
        """Told when the list of revoked certificates was written."""
        self.on_groups_changed: Callable[[], None] = lambda: None
        self.adopt: Callable[[x509.Certificate], bool] = lambda _: False
        """Makes a certificate known that was issued and forgotten; whether it did."""
        self.record_elsewhere: Callable[[str], bytes] | None = None
        """Gets a record that is to be signed again, where this process signs nothing."""
        self.heard_since: Callable[[], float] = lambda: 0.0
        """Since when devices could be heard without a break; now while they cannot."""
        self.silence_s = config.rollouts.silence_s
        self.ends_soon_s = config.expiry.device_certificate_s / ENDS_SOON
        """How much life is left of a certificate that ends soon: devices renew theirs when a third of it is left."""

    # -- reading -----------------------------------------------------------------------------------------------------------

    def is_online(self, present: bool, last_seen: float | None, now: float) -> bool:
        """Whether the broker counts the device as present and it was heard of lately: a silent device is not there, whatever
        was said of it.

        A server or broker that was away makes nobody silent: otherwise devices still busy would stop counting and a wave would
        pass.
        """
        return present and last_seen is not None and now < self.silent_at(last_seen)

    def silent_at(self, last_seen: float) -> float:
        """When a device that was heard last at that time counts as silent, unless it is heard again."""
        return max(last_seen, self.heard_since()) + self.silence_s

    def get(self, device: str) -> DeviceDetail:
        """Everything about one device.  Raises: NotFound."""
        with self._database.reading() as session:
            row = _row(session, device)
            certificates = list(session.scalars(select(Certificate).where(Certificate.device == device)))
            telemetry = told.last(session, device)
        return DeviceDetail(
            **msgspec.structs.asdict(self.view(row, self._clock())), state=_reported(row.state, StateReport), telemetry=telemetry,
            certificates=[CertificateView(c.serial, c.issued, c.expires, c.revoked) for c in certificates],
        )  # fmt: skip

    def view(self, row: Device, now: float) -> DeviceView:
        """The device in `row` as it is shown in lists."""
        state = row.state or {}
        return DeviceView(
            id=row.id, groups=row.groups, groups_by_scope=row.groups_by_scope or [], labels=row.labels, online=self.is_online(row.present, row.last_seen, now),
            revoked=row.revoked, last_seen=row.last_seen, created=row.created, record_serial=row.serial,
            hardware=_reported(row.hardware, Hardware), agent_version=state.get("agent_version"),
            assignment_version=state.get("assignment_version"), problem=state.get("problem"), trouble=row.trouble,
            shared=shared_identity.are_several(row.shared, now), certificate=self.standing(row.expires, now),
            certificate_expires=row.expires,
            renewal_allowed_until=row.late_until if row.late_until is not None and now < row.late_until else None,
            models=_reported(state.get("models"), dict[str, ModelState]) or {},
        )  # fmt: skip

    # -- changing ----------------------------------------------------------------------------------------------------------

    def set_groups(self, actor: Actor, device: str, groups: list[str]) -> DeviceDetail:
        """Puts the device in exactly these groups and signs a new record with the next serial.  Raises: NotFound; Invalid; Conflict where the
        scope of a group says otherwise.
        """
        grouping.check_groups(groups)
        with self._database.session() as session:
            row = _row(session, device)
            grouping.give(row, groups, grouping.scopes(session))
            self.sign_next(row)
            self._journal.audit(session, actor, "device.groups", device, groups=row.groups)
            events = [self.note_groups(session, row)]
        self.groups_changed([device], events)
        return self.get(device)

    def set_labels(self, actor: Actor, device: str, given: Mapping[str, str], taken: Iterable[str] = ()) -> DeviceDetail:
        """Gives the device these labels, takes others off, and signs a new record with the next serial. Other labels stay. It leaves and comes
        into groups whose scopes ask about them.  Raises: NotFound; Invalid (not allowed, too many, one that it does not have).
        """
        grouping.check_labels(given)
        with self._database.session() as session:
            row = _row(session, device)
            known = dict(row.labels or {})
            if missing := [name for name in taken if name not in known]:
                has = ", ".join(f"{name}={value}" for name, value in sorted(known.items())) or "none"
                raise Invalid(f"{device} has no label {missing[0]!r}; it has: {has}", code="no_label")
            labels = {**{name: value for name, value in known.items() if name not in set(taken)}, **given}
            grouping.check_labels(labels)
            row.labels = dict(sorted(labels.items()))
            regrouped = grouping.regroup(row, grouping.scopes(session))
            self.sign_next(row)
            self._journal.audit(session, actor, "device.labels", device, labels=row.labels)
            has = ", ".join(f"{name}={value}" for name, value in row.labels.items()) or "no label"
            happening = Happening(name="device_labels", message=f"{device} has now {has}", device=device)
            events = [self._journal.record(session, happening)]
            if regrouped:
                events.append(self.note_groups(session, row))
        self.groups_changed([device], events)
        return self.get(device)

    def note_groups(self, session: Session, row: Device) -> EventView:
        """Records that the device is in other groups now. After the commit `groups_changed` tells who is to know."""
        message = f"{row.id} is now in {', '.join(row.groups) or 'no group'}"
        return self._journal.record(session, Happening(name="device_groups", message=message, device=row.id))

    def groups_changed(self, devices: Iterable[str], events: Iterable[EventView]) -> None:
        """Tells devices, people and rollouts of groups or labels that changed."""
        self._journal.announce(events)
        self._journal.changed("devices")
        for device in devices:
            self.poke(device)
        self.on_groups_changed()

    def let_try_again(self, session: Session, device: str, retries: list[Any]) -> None:
        """Signs a record that lets the device try these releases again. In the caller's transaction, after which `poke` tells it."""
        row = _row(session, device)
        row.retries = retries
        self.sign_next(row)

    def poke(self, device: str) -> None:
        """Tells the device that there is something new for it."""
        if self.link:
            self.link.poke_device(device)

    def revoke(self, actor: Actor, device: str) -> DeviceDetail:
        """Shuts the device out: its certificates are on the revocation list and the listeners refuse it."""
        with self._revocation:
            with self._database.session() as session:
                row = _row(session, device)
                row.revoked, row.present = True, False
                self._revoke_certificates(session, device)
                self._journal.audit(session, actor, "device.revoke", device)
                event = self._journal.record(
                    session, Happening(name="device_revoked", message=f"{device} was shut out", device=device)
                )
            self._after_revocation(device)
        self._journal.announce([event])
        self._journal.changed("devices")
        return self.get(device)

    def delete(self, actor: Actor, device: str) -> None:
        """Shuts the device out and forgets it; its id can be enrolled again."""
        with self._revocation:
            with self._database.session() as session:
                row = _row(session, device)
                self._revoke_certificates(session, device)
                for table in (DeviceModel, SkippedDevice):  # who was told does not vanish from the count of a rollout
                    session.execute(delete(table).where(table.device == device))
                told.forget(session, device)
                session.delete(row)
                _raise_floor(session, row.serial)
                self._journal.audit(session, actor, "device.delete", device)
                event = self._journal.record(
                    session, Happening(name="device_deleted", message=f"{device} was deleted", device=device)
                )
            self._after_revocation(device)
        self._journal.announce([event])
        self._journal.changed("devices")

    def _revoke_certificates(self, session: Session, device: str) -> None:
        for certificate in session.scalars(
            select(Certificate).where(Certificate.device == device, Certificate.revoked.is_(None))
        ):
            certificate.revoked = self._clock()

    def _after_revocation(self, device: str) -> None:
        self.shut_out += 1
        self.write_crl()
        if self.link:
            self.link.shut_out(device)

    def write_crl(self) -> None:
        """Writes the list of revoked certificates that have not ended by themselves, of CAs that are believed."""
        with self._database.reading() as session:
            query = select(Certificate.serial).where(
                Certificate.revoked.is_not(None), Certificate.expires > self._clock(),
                Certificate.authority.in_([one.fingerprint for one in self._authority.believed]),
            )  # fmt: skip
            serials = [int(serial, 16) for serial in session.scalars(query)]
        self._authority.write_crl(serials)
        self.on_crl()

    # -- certificates and records ------------------------------------------------------------------------------------------

    def authenticate(self, certificate: x509.Certificate, *, to_renew: bool = False) -> str:
        """The device that a TLS client certificate of our CA belongs to. `to_renew`: the certificate may have ended, while an
        operator allows a late renewal.

        Raises: Refused when it may not come in (any more).
        """
        query = (  # the columns alone: what a device reported last is large, and read for each of its requests
            select(Device.id, Device.revoked, Device.late_until, Certificate.revoked, Certificate.expires, Certificate.pem)
            .join(Certificate, Certificate.device == Device.id)
            .where(Certificate.serial == pki.serial_hex(certificate))
        )
        with self._database.reading() as session:
            found = session.execute(query).one_or_none()
        if found is None and self.adopt(certificate):
            with self._database.reading() as session:
                found = session.execute(query).one_or_none()
        if found is None or pki.pem_of(certificate).decode() != found[5]:  # byte for byte: the CA's key may be a thief's too
            raise Refused("this certificate belongs to no device of the fleet; enrol the device again", code="unknown_device")
        device, shut_out, late_until, revoked, expires, _ = found
        if revoked is not None or shut_out:
            raise Refused(f"device {device!r} was revoked", code="revoked")
        now = self._clock()
        if expires <= now and not (to_renew and late_until is not None and now < late_until):
            raise Refused(
                f"the certificate of {device!r} has ended; allow a late renewal (`edge-fleet device allow-renewal {device}`), or "
                "enrol the device again",
                code="expired",
            )
        return str(device)

    def is_admitted(self, device: str) -> bool:
        """Whether there is a device of this name that is not shut out for good, and has a certificate that is good now."""
        good = select(Certificate.serial).where(
            Certificate.device == device, Certificate.revoked.is_(None), Certificate.expires > self._clock()
        )
        query = select(Device.id).where(Device.id == device, Device.revoked.is_(False), good.exists())
        with self._database.reading() as session:
            return session.scalar(query) is not None

    def allow_renewal(self, actor: Actor, device: str, seconds: float) -> DeviceDetail:
        """Lets the device renew a certificate that has ended, with its old key, for so long.  Raises: NotFound, Conflict."""
        with self._database.session() as session:
            row = _row(session, device)
            if row.revoked:
                raise Conflict(f"device {device!r} was shut out; delete it and enrol it again", code="revoked")
            row.late_until = self._clock() + seconds
            self._journal.audit(session, actor, "device.allow_renewal", device, seconds=seconds)
            message = f"{device} may renew a certificate that has ended, for {seconds / 3600:.1f} h"
            event = self._journal.record(session, Happening(name="renewal_allowed", message=message, device=device))
        self._journal.announce([event])
        self._journal.changed("devices")
        return self.get(device)

    def standing(self, expires: float | None, now: float) -> CertificateState:
        """How a certificate is that ends at `expires`. Devices renew theirs when a third of its life is left; one with a sixth
        left has failed to for long.
        """
        if expires is None or expires <= now:
            return "ended"
        return "ends_soon" if expires < now + self.ends_soon_s else "good"

    def issued(self, serial: str) -> x509.Certificate | None:
        """The certificate with this serial number (hex), good or not."""
        with self._database.reading() as session:
            row = session.get(Certificate, serial)
        return x509.load_pem_x509_certificate(row.pem.encode()) if row is not None else None

    def signers(self, device: str) -> list[DeviceKey]:
        """The keys of the device's certificates that are still good: who may sign for it."""
        with self._database.reading() as session:
            query = select(Certificate.pem).where(
                Certificate.device == device, Certificate.revoked.is_(None), Certificate.expires > self._clock()
            )
            return [key_of(pem) for pem in session.scalars(query)]

    def record(self, device: str) -> bytes:
        """The device's signed record, signed again when less than half of its time is left, or by a key that was replaced."""
        now = self._clock()
        with self._database.reading() as session:
            found = session.execute(select(Device.record, Device.record_expires).where(Device.id == device)).one_or_none()
        record, expires = found or (None, 0.0)
        current = record is not None and self._repository.record_keyid in record
        if not current or expires - now < self._config.expiry.record_s / 2:
            if self.record_elsewhere is not None:
                return self.record_elsewhere(device)
            with self._database.session() as session:
                row = _row(session, device)
                self.sign_next(row)
                record = row.record
        assert record is not None
        return str(record).encode()

    def sign_next(self, row: Device) -> None:
        """Fills in a signed record with the next serial that says what `row` says."""
        row.serial += 1
        self.sign_record(row)

    def sign_record(self, row: Device) -> None:
        """Fills in the signed record that says what `row` says."""
        now = self._clock()
        expires = now + self._config.expiry.record_s
        record = DeviceRecord(
            fleet=self._config.fleet, device=row.id, serial=row.serial, groups=tuple(row.groups), issued=now, expires=expires,
            labels=row.labels or {}, retries=tuple(convert(one, Retry) for one in row.retries or ()),
        )  # fmt: skip
        envelope = self._repository.sign_record(encode(record), RECORD_PAYLOAD_TYPE)
        row.record, row.record_expires = msgspec.json.encode(envelope).decode(), expires


def _reported(value: object, kind: type[T]) -> T | None:
    """What a device reported, as it was stored; None when there is none, or when it is not what this version understands."""
    try:
        return convert(value, kind) if value is not None else None
    except msgspec.ValidationError:
        return None


def first_serial(session: Session, now: float) -> int:
    """The record serial of a new device: above that of every device deleted before, so that one that enrols again believes it.

    The time, unless the clock went back since.
    """
    floor = session.get(Setting, SERIAL_FLOOR)
    return max(int(now), int(floor.value) + 1 if floor is not None else 0)


def _raise_floor(session: Session, serial: int) -> None:
    floor = session.get(Setting, SERIAL_FLOOR)
    if floor is None:
        session.add(Setting(name=SERIAL_FLOOR, value=str(serial)))
    else:
        floor.value = str(max(int(floor.value), serial))


def _row(session: Session, device: str) -> Device:
    row = session.get(Device, device)
    if row is None:
        raise NotFound(f"there is no device {device!r}; `edge-fleet device list` shows them")
    return row
