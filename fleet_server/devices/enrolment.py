"""How a device joins: a token for a certificate. The private key never leaves the device."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.contract import addresses
from agent.contract.assignment import read_assignment
from agent.contract.enrolment import EnrolmentRequest, EnrolmentResponse, EnrolmentString, RenewalRequest
from agent.contract.reports import Hardware, hardware_class
from fleet_server.access import Actor, digest
from fleet_server.config import FleetConfig
from fleet_server.devices import grouping, pki
from fleet_server.devices.ca import Ca
from fleet_server.devices.inventory import Inventory, first_serial
from fleet_server.errors import Conflict, Denied, Invalid, NotFound, Refused
from fleet_server.journal import Happening, Journal
from fleet_server.releases.repository import Repository
from fleet_server.storage.database import Database
from fleet_server.storage.models import Certificate, Device, EnrolmentToken

MAX_CLASS = 512  # the width of its column
MAX_USES = 100_000
MAX_TTL_S = 365 * 86400.0
STILL_NEW = 2 / 3
"""A certificate with this share of a life before it is given again instead of a further one. Devices ask when a third is left.
"""


class EnrolmentTokenView(msgspec.Struct, frozen=True, kw_only=True):
    """An enrolment token as operators see it, without what the device is given. `device`: the only id that may join with it."""

    id: str
    device: str | None
    groups: list[str]
    labels: dict[str, str]
    uses_left: int
    created: float
    created_by: str
    expires: float
    revoked: bool
    usable: bool


class EnrolmentTokenMade(EnrolmentTokenView, frozen=True, kw_only=True):
    """A new enrolment token with the string that the device is given, which is shown this once."""

    string: str


class Enrolment:
    def __init__(
        self, database: Database, authority: pki.Authority, repository: Repository, inventory: Inventory, journal: Journal,
        config: FleetConfig, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._database, self._authority, self._repository, self._inventory = database, authority, repository, inventory
        self._journal, self._config, self._clock = journal, config, clock
        self.certificate_s = config.expiry.device_certificate_s
        """How long a new certificate lasts."""
        self._lock = threading.Lock()  # one enrolment at a time: a token's last use and a wished id are taken once

    # -- tokens ------------------------------------------------------------------------------------------------------------

    def create_token(
        self, actor: Actor, *, device: str | None, groups: list[str], uses: int, ttl_s: float, labels: Mapping[str, str] = {}
    ) -> EnrolmentTokenMade:
        """A new enrolment token. Devices that join with it get these groups and labels.  Raises: Invalid; Conflict (a group that fills
        itself).
        """
        if device is not None:
            pki.check_device_id(device)
            if uses != 1:
                raise Invalid("a token for one device id has one use")
        if not 1 <= uses <= MAX_USES or not 0 < ttl_s <= MAX_TTL_S:
            raise Invalid(f"uses must be from 1 to {MAX_USES} and the time to live above 0 and at most a year")
        grouping.check_groups(groups)
        grouping.check_labels(labels)
        token = secrets.token_urlsafe(32)
        now = self._clock()
        row = EnrolmentToken(
            id=secrets.token_hex(4), hash=digest(token), device=device, groups=sorted(set(groups)), labels=dict(sorted(labels.items())),
            uses_left=uses, created=now, created_by=actor.name, expires=now + ttl_s, revoked=False,
        )  # fmt: skip
        with self._database.session() as session:
            grouping.refuse_filled(session, groups)
            session.add(row)
            self._journal.audit(
                session,
                actor,
                "token.create",
                row.id,
                device=device,
                groups=row.groups,
                labels=row.labels,
                uses=uses,
                ttl_s=ttl_s,
            )
        string = EnrolmentString(*addresses.split(self._config.enrolment), token, self._authority.fingerprint)
        return EnrolmentTokenMade(**msgspec.structs.asdict(_view(row, now)), string=str(string))

    def tokens(self) -> list[EnrolmentTokenView]:
        with self._database.reading() as session:
            rows = session.scalars(select(EnrolmentToken).order_by(EnrolmentToken.created.desc()))
            return [_view(row, self._clock()) for row in rows]

    def revoke_token(self, actor: Actor, token_id: str) -> EnrolmentTokenView:
        with self._database.session() as session:
            row = session.get(EnrolmentToken, token_id)
            if row is None:
                raise NotFound(f"there is no enrolment token {token_id!r}; `edge-fleet token list` shows them")
            row.revoked = True
            self._journal.audit(session, actor, "token.revoke", token_id)
            return _view(row, self._clock())

    # -- joining -----------------------------------------------------------------------------------------------------------

    def enrol(self, request: EnrolmentRequest) -> EnrolmentResponse:
        """Lets a device join; its certificate, and what it must know of the fleet.

        Raises: Denied (the token lets nobody in), Invalid (id, certificate request), Refused (the token is for another id),
        Conflict (another device has the id).
        """
        csr = pki.read_csr(request.csr_pem) if self._token_is_good(request.token) else None
        with self._lock, self._database.session() as session:
            token = session.scalar(select(EnrolmentToken).where(EnrolmentToken.hash == digest(request.token)))
            if token is None or csr is None or self._why_not(token):
                raise Denied(self._why_not(token) or "the enrolment token is not known", code="bad_token")
            device = self._choose_id(session, token, request.device)
            certificate = self.add(session, device, csr, token.groups, request.hardware, token.labels or {})
            token.uses_left -= 1
            event = self._journal.record(
                session, Happening(name="device_enrolled", message=f"{device} joined the fleet", device=device)
            )
        if self._inventory.link:
            self._inventory.link.admit(device)
        self._journal.announce([event])
        self._journal.changed("devices")
        return self._answer(device, certificate)

    def add(
        self, session: Session, device: str, csr: x509.CertificateSigningRequest, groups: list[str], hardware: Hardware | None,
        labels: Mapping[str, str] = {},
    ) -> x509.Certificate:  # fmt: skip
        """A new device with its certificate and signed record, in the caller's transaction. It is in these groups, and in those whose scopes
        it meets. Its id must be free and allowed; the broker is not told.
        """
        certificate = self._certify(session, device, csr, self._authority.shown)
        row = Device(
            id=device, created=self._clock(), groups=groups, labels=dict(labels), serial=first_serial(session, self._clock()), revoked=False,
            counter=-1, session=-1, present=False, hardware=msgspec.to_builtins(hardware) if hardware else None,
            hardware_class=hardware_class(hardware)[:MAX_CLASS] if hardware else None,
        )  # fmt: skip
        session.add(row)
        grouping.regroup(row, grouping.scopes(session))
        self._inventory.sign_record(row)
        return certificate

    def renew(self, device: str, request: RenewalRequest) -> EnrolmentResponse:
        """A new certificate for a device that still has a valid one. When one was issued for the same key lately, it is given
        again: so a lost answer harms nobody, and a device that asks without end gets no more than one. The old certificate
        stays valid until it ends.

        Raises: Invalid (certificate request), Refused (the device was shut out meanwhile).
        """
        csr = pki.read_csr(request.csr_pem)
        with self._lock, self._database.session() as session:
            row = session.get(Device, device, with_for_update=True)
            if row is None or row.revoked:
                raise Refused(f"device {device!r} was revoked", code="revoked")
            by = self._authority.issuer_for(request.authorities)
            certificate = self._still_new(session, device, csr, by) or self._certify(session, device, csr, by)
        return self._answer(device, certificate)

    def _still_new(self, session: Session, device: str, csr: x509.CertificateSigningRequest, by: Ca) -> x509.Certificate | None:
        """The device's certificate of that CA for this key, if it has at least two thirds of a new one's life left."""
        until = self._clock() + STILL_NEW * self.certificate_s
        good = select(Certificate.pem).where(
            Certificate.device == device, Certificate.revoked.is_(None), Certificate.expires >= until,
            Certificate.authority == by.fingerprint,
        )  # fmt: skip
        found = (
            x509.load_pem_x509_certificate(pem.encode()) for pem in session.scalars(good.order_by(Certificate.expires.desc()))
        )
        return next((certificate for certificate in found if certificate.public_key() == csr.public_key()), None)

    def _token_is_good(self, token: str) -> bool:
        with self._database.reading() as session:
            row = session.scalar(select(EnrolmentToken).where(EnrolmentToken.hash == digest(token)))
        return row is not None and not self._why_not(row)

    def _why_not(self, token: EnrolmentToken | None) -> str:
        if token is None:
            return "the enrolment token is not known"
        if token.revoked:
            return "the enrolment token was revoked; ask for a new one"
        if token.expires <= self._clock():
            return "the enrolment token has expired; ask for a new one"
        if token.uses_left < 1:
            return "the enrolment token was used already; ask for a new one"
        return ""

    def _choose_id(self, session: Session, token: EnrolmentToken, wished: str | None) -> str:
        if token.device is not None and wished not in {None, token.device}:
            raise Refused(f"this token is for device {token.device!r}, not {wished!r}", code="wrong_device")
        device = token.device or wished
        if device is None:
            device = f"dev-{secrets.token_hex(5)}"
        pki.check_device_id(device)
        if session.get(Device, device) is not None:
            raise Conflict(
                f"device id {device!r} is taken; choose another, or delete that device first (`edge-fleet device delete {device}`)",
                code="id_taken",
            )
        return device

    def _certify(self, session: Session, device: str, csr: x509.CertificateSigningRequest, by: Ca) -> x509.Certificate:
        certificate = self._authority.issue_device(device, csr, self.certificate_s, by=by)
        session.add(
            Certificate(
                serial=pki.serial_hex(certificate), device=device, issued=self._clock(), authority=by.fingerprint,
                pem=certificate.public_bytes(serialization.Encoding.PEM).decode(),
                expires=certificate.not_valid_after_utc.timestamp(),
            )
        )  # fmt: skip
        return certificate

    def _answer(self, device: str, certificate: x509.Certificate) -> EnrolmentResponse:
        broker_host, broker_port = addresses.split(self._config.unshared_broker)
        return EnrolmentResponse(
            fleet=self._config.fleet,
            device=device,
            certificate_pem=certificate.public_bytes(serialization.Encoding.PEM).decode(),
            ca_pem=self._authority.ca_pem.decode(),
            device_url=self._config.unshared_device_url,
            broker_host=broker_host,
            broker_port=broker_port,
            tuf_root=self._repository.root_bytes().decode(),
            addresses=read_assignment(self._repository.assignment_bytes()).addresses,
        )


def _view(row: EnrolmentToken, now: float) -> EnrolmentTokenView:
    usable = not row.revoked and row.expires > now and row.uses_left > 0
    return EnrolmentTokenView(
        id=row.id, device=row.device, groups=row.groups, labels=row.labels or {}, uses_left=row.uses_left, created=row.created,
        created_by=row.created_by, expires=row.expires, revoked=row.revoked, usable=usable,
    )  # fmt: skip
