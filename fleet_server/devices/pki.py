"""The fleet's own certificate authority: who is a device, who is the server. While it is replaced there are two
(`ca_steps.py` has the steps).

ECDSA P-256 throughout. A device's certificate says its id in the CN and may only be used as a client.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from agent.common import files
from agent.contract import names
from agent.contract.authorities import MAX_CROSS_CERTIFICATES, Authorities
from fleet_server.devices import ca, ca_steps
from fleet_server.devices.ca import CLOCK_SKEW, Ca, common_name, key_pem, pem_of
from fleet_server.devices.ca_steps import Event, Replacement, Step
from fleet_server.errors import Invalid

__all__ = ["CLOCK_SKEW", "Authority", "check_device_id", "common_name", "key_pem", "pem_of", "read_csr", "serial_hex"]

SERVER_CN = "fleet-server"
RESERVED_IDS = frozenset({SERVER_CN, "all"})
"""Names with a meaning on the broker; no device may be called so."""

BROKER_NODE_CN = "fleet broker"
"""Of the certificates of a cluster's nodes. No device can be called so, because of the space."""

SERVER_DAYS = 730
RENEW_SERVER_BEFORE_DAYS = 60
MAX_CSR_BYTES = 16 * 1024


class _Now(NamedTuple):
    replacement: Replacement
    present: Ca
    following: Ca | None


class Authority:
    """The CA in `folder`: ca.crt, ca.key, server.crt/key (both HTTPS listeners and the broker), client.crt/key (our own MQTT
    client). trusted.pem has every CA that is believed, crl.pem a revocation list of each.

    While the CA is replaced: next.crt and next.key, and cross.pem, by which the present CA certifies the next one's key;
    replacement.json says which step that has reached. crossed.pem keeps the cross certificates of earlier replacements.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca_path = folder / "ca.crt"
        self.server_cert, self.server_key = folder / "server.crt", folder / "server.key"
        self.client_cert, self.client_key = folder / "client.crt", folder / "client.key"
        self.crl = folder / "crl.pem"
        self._made: dict[bytes, Ca] = {}  # one object for each CA: it remembers when it listed revoked certificates last
        self._now = self._read()

    def _read(self) -> _Now:
        replacement = ca_steps.read(self.folder)
        if replacement.step is Step.FINISHING:
            return _Now(replacement, self._read_ca("next"), None)
        following = self._read_ca("next") if replacement.step in {Step.INTRODUCED, Step.SWITCHED} else None
        return _Now(replacement, self._read_ca("ca"), following)

    def _read_ca(self, name: str) -> Ca:
        certificate = (self.folder / f"{name}.crt").read_bytes()
        if certificate not in self._made:
            key = self.folder / f"{name}.key"
            self._made[certificate] = Ca.read(certificate, key.read_bytes() if key.is_file() else None)
        return self._made[certificate]

    @classmethod
    def create(cls, folder: Path, fleet: str, hosts: tuple[str, ...]) -> Authority:
        """Makes a new CA with everything the server itself needs."""
        made = Ca.create(f"{fleet} fleet CA"[: ca.MAX_NAME_CHARS])
        files.write(folder / "ca.key", made.key_pem, mode=0o600)
        files.write(folder / "ca.crt", made.pem)
        authority = cls(folder)
        authority.renew_own(hosts, force=True)
        authority.write_trusted()
        authority.write_crl([])
        return authority

    # -- which CA is believed, and which shown -----------------------------------------------------------------------------

    @property
    def replacement(self) -> Replacement:
        return self._now.replacement

    @property
    def present(self) -> Ca:
        return self._now.present

    @property
    def next(self) -> Ca | None:
        return self._now.following

    @property
    def believed(self) -> tuple[Ca, ...]:
        """The CAs whose certificates count, the newest first."""
        _, present, following = self._now
        return (present,) if following is None else (following, present)

    @property
    def shown(self) -> Ca:
        """The CA of the server's own certificates, which enrolment strings name."""
        replacement, present, following = self._now
        return following if following is not None and replacement.step is Step.SWITCHED else present

    @property
    def ca_pem(self) -> bytes:
        return self.shown.pem

    @property
    def ca(self) -> x509.Certificate:
        return self.shown.certificate

    @property
    def fingerprint(self) -> str:
        """The sha256 of the CA certificate's DER bytes: what an enrolment string names."""
        return self.shown.fingerprint

    def issuer_of(self, certificate: x509.Certificate) -> Ca | None:
        """Which CA that is believed signed the certificate."""
        return next((one for one in self.believed if one.issued(certificate)), None)

    def told(self) -> Authorities | None:
        """What devices are told; None while the fleet's first CA was never replaced."""
        crossed = _crossed(self.folder)
        if self.replacement.step is not Step.SETTLED:
            crossed = [*crossed, (self.folder / "cross.pem").read_text()]
        if not crossed:
            return None
        return Authorities(
            certificates=tuple(one.pem.decode() for one in self.believed),
            cross_certificates=tuple(crossed[-MAX_CROSS_CERTIFICATES:]),
            spread_s=self.replacement.spread_s,
        )

    @property
    def trusted_path(self) -> Path:
        """The file of the CAs that are believed. A folder that was copied from a server that never replaced its CA may have none."""
        written = self.folder / "trusted.pem"
        return written if written.is_file() else self.ca_path

    def write_trusted(self) -> None:
        """Writes the CAs that are believed for those who read them as a file: listeners, broker, our own clients."""
        data = b"".join(one.pem for one in self.believed)
        path = self.folder / "trusted.pem"
        if not path.is_file() or path.read_bytes() != data:
            files.write(path, data)

    # -- replacing ---------------------------------------------------------------------------------------------------------

    def prepare(self, fleet: str) -> Ca:
        """Makes a CA that may become the next one, and has the present one certify it. Nothing counts until `enter` is called."""
        number = f" {len(_crossed(self.folder)) + 2}"
        made = Ca.create(f"{fleet} fleet CA"[: ca.MAX_NAME_CHARS - len(number)] + number)
        files.write(self.folder / "next.key", made.key_pem, mode=0o600)
        files.write(self.folder / "next.crt", made.pem)
        files.write(self.folder / "cross.pem", pem_of(self.present.cross_certify(made)))
        return made

    def enter(self, replacement: Replacement) -> None:
        """Makes a step of the replacement durable; it counts from here on."""
        ca_steps.write(self.folder, replacement)
        self._now = self._read()

    def settle(self) -> bool:
        """Puts the next CA in the place of the present one, once that is believed no more; whether there was something to do."""
        if self.replacement.step is not Step.FINISHING:
            return False
        cross = self.folder / "cross.pem"
        if cross.is_file() and (text := cross.read_text()) not in (crossed := _crossed(self.folder)):
            files.write(self.folder / "crossed.pem", "".join([*crossed, text][-MAX_CROSS_CERTIFICATES:]).encode())
        files.write(self.folder / "ca.key", self.present.key_pem, mode=0o600)
        files.write(self.folder / "ca.crt", self.present.pem)
        self.enter(Replacement(step=ca_steps.after(self.replacement.step, Event.DONE)))
        for name in ("next.key", "next.crt", "cross.pem"):
            files.remove(self.folder / name)
        return True

    # -- the server's own --------------------------------------------------------------------------------------------------

    def renew_own(self, hosts: tuple[str, ...], *, force: bool = False) -> bool:
        """Issues the server's own certificates again when they end soon, do not name every host, or are of another CA than they
        are to be. Whether it did.
        """
        wanted = {*hosts, "localhost", "127.0.0.1", "::1"}
        if not force and self._own_are_good(wanted):
            return False
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.SERVER_AUTH
        server = self.shown.issue(hosts[0][:64], key.public_key(), SERVER_DAYS, usage, alternatives=wanted)
        files.write(self.server_key, key_pem(key), mode=0o600)
        files.write(self.server_cert, pem_of(server))
        key = ec.generate_private_key(ec.SECP256R1())
        client = self.shown.issue(SERVER_CN, key.public_key(), SERVER_DAYS, ExtendedKeyUsageOID.CLIENT_AUTH)
        files.write(self.client_key, key_pem(key), mode=0o600)
        files.write(self.client_cert, pem_of(client))
        return True

    def issue_broker_node(self, hosts: tuple[str, ...]) -> tuple[bytes, bytes]:
        """A certificate and its key (PEM) with which a node of a broker cluster answers at `hosts`, and asks this server."""
        key = ec.generate_private_key(ec.SECP256R1())
        usages = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
        certificate = self.shown.issue(BROKER_NODE_CN, key.public_key(), SERVER_DAYS, *usages, alternatives=hosts)
        return pem_of(certificate), key_pem(key)

    def _own_are_good(self, wanted: set[str]) -> bool:
        pairs = ((self.server_cert, self.server_key), (self.client_cert, self.client_key))
        server, client = (_good(*pair, self.shown) for pair in pairs)
        if server is None or client is None:
            return False
        sans = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return wanted <= {str(san.value) for san in sans}

    # -- devices -----------------------------------------------------------------------------------------------------------

    def issue_device(
        self, device: str, csr: x509.CertificateSigningRequest, lifetime_s: float, *, by: Ca | None = None
    ) -> x509.Certificate:
        """A client certificate for `device` with the key of `csr`; nothing else of the request is used. `by` another CA than the
        one that is shown.
        """
        key = csr.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey), "read_csr lets no others pass"
        return (by or self.shown).issue(device, key, lifetime_s / 86400, ExtendedKeyUsageOID.CLIENT_AUTH)

    def issuer_for(self, known: Collection[str]) -> Ca:
        """The CA of which a device gets its certificate that believes those: the newest of them. One that names none, as earlier
        agents do, believes the one of its enrolment only.
        """
        return next((one for one in self.believed if one.fingerprint in known), self.present)

    def write_crl(self, serials: list[int]) -> None:
        """Writes the lists of revoked certificates that the broker checks, one of each CA. A number that another CA gave does no
        harm in a list.
        """
        files.write(self.crl, b"".join(one.revocation_list(serials) for one in self.believed))


def read_csr(pem: str) -> x509.CertificateSigningRequest:
    """A certificate request whose sender has the private key.  Raises: Invalid."""
    if len(pem) > MAX_CSR_BYTES:
        raise Invalid(f"a certificate request may have at most {MAX_CSR_BYTES} bytes", code="bad_csr")
    try:
        csr = x509.load_pem_x509_csr(pem.encode())
        key = csr.public_key()
        valid = csr.is_signature_valid
    except (ValueError, TypeError, InvalidSignature) as error:
        raise Invalid(f"csr_pem is not a certificate request in PEM: {error}", code="bad_csr") from error
    except Exception as error:  # cryptography raises its own kinds for keys it does not know
        raise Invalid(f"csr_pem cannot be used: {error}", code="bad_csr") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Invalid("the key of csr_pem must be ECDSA on curve P-256", code="bad_csr")
    if not valid:
        raise Invalid("csr_pem is not signed by its own key", code="bad_csr")
    return csr


def check_device_id(device: str) -> str:
    """`device` itself.  Raises: Invalid when no device may be called so."""
    if device in RESERVED_IDS:
        raise Invalid(f"device id {device!r} is reserved; choose another", code="reserved_id")
    try:
        return names.check(names.DEVICE_ID, device, "device id")
    except ValueError as error:
        raise Invalid(str(error), code="bad_device_id") from error


def is_broker_node(certificate: x509.Certificate) -> bool:
    """Whether a certificate of the fleet's CA is a broker node's, and good now."""
    return common_name(certificate) == BROKER_NODE_CN and dt.datetime.now(dt.timezone.utc) < certificate.not_valid_after_utc


def serial_hex(certificate: x509.Certificate) -> str:
    return f"{certificate.serial_number:x}"


def _good(path: Path, key: Path, by: Ca) -> x509.Certificate | None:
    """The certificate, if that CA issued it, it lasts, and it belongs to the key: a server that was killed between two writes has
    others.
    """
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        matches = _public_pem(key) == _spki(certificate.public_key())
    except (OSError, ValueError):
        return None
    left = certificate.not_valid_after_utc - dt.datetime.now(dt.timezone.utc)
    lasts = left >= dt.timedelta(days=RENEW_SERVER_BEFORE_DAYS)
    return certificate if matches and lasts and by.issued(certificate) else None


def _crossed(folder: Path) -> list[str]:
    """The cross certificates of earlier replacements, the oldest first."""
    try:
        data = (folder / "crossed.pem").read_bytes()
    except FileNotFoundError:
        return []
    return [pem_of(one).decode() for one in x509.load_pem_x509_certificates(data)]


def _public_pem(path: Path) -> bytes:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    return _spki(key.public_key())


def _spki(key: object) -> bytes:
    data: bytes = key.public_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return data
