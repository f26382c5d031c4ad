"""The fleet's own certificate authority: who is a device, who is the server.

ECDSA P-256 throughout. A device's certificate says its id in the CN and may only be used as a client.
"""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.common import files
from agent.contract import names
from fleet_server.errors import Invalid, Unavailable

SERVER_CN = "fleet-server"
RESERVED_IDS = frozenset({SERVER_CN, "all"})
"""Names with a meaning on the broker; no device may be called so."""

CA_DAYS = 3650
SERVER_DAYS = 730
RENEW_SERVER_BEFORE_DAYS = 60
MAX_CSR_BYTES = 16 * 1024
CLOCK_SKEW = dt.timedelta(hours=24)  # boards without a clock chip come up in the past; a certificate must hold there too


class Authority:
    """The CA in `folder`: ca.crt, ca.key, server.crt/key (both HTTPS listeners and the broker), client.crt/key (our own MQTT
    client).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca_path, self._ca_key_path = folder / "ca.crt", folder / "ca.key"
        self.server_cert, self.server_key = folder / "server.crt", folder / "server.key"
        self.client_cert, self.client_key = folder / "client.crt", folder / "client.key"
        self.crl = folder / "crl.pem"
        self.ca_pem = self.ca_path.read_bytes()
        self.ca = x509.load_pem_x509_certificate(self.ca_pem)
        self._listed = dt.datetime.min.replace(tzinfo=dt.timezone.utc)  # when the last revocation list says it was written

    @functools.cached_property
    def _key(self) -> ec.EllipticCurvePrivateKey:
        """Processes that certify nobody have none.  Raises: Unavailable."""
        try:
            key = serialization.load_pem_private_key(self._ca_key_path.read_bytes(), None)
        except FileNotFoundError:
            raise Unavailable(f"{self._ca_key_path} is not here, so this process certifies nobody", code="no_key") from None
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key

    @classmethod
    def create(cls, folder: Path, fleet: str, hosts: tuple[str, ...]) -> Authority:
        """Makes a new CA with everything the server itself needs."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{fleet} fleet CA")])
        now = _now()
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - CLOCK_SKEW)
        builder = builder.not_valid_after(now + dt.timedelta(days=CA_DAYS))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(sign_certificates=True), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        files.write(folder / "ca.key", key_pem(key), mode=0o600)
        files.write(folder / "ca.crt", builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        authority = cls(folder)
        authority.renew_own(hosts, force=True)
        authority.write_crl([])
        return authority

    @property
    def fingerprint(self) -> str:
        """The sha256 of the CA certificate's DER bytes: what an enrolment string names."""
        return hashlib.sha256(self.ca.public_bytes(serialization.Encoding.DER)).hexdigest()

    def renew_own(self, hosts: tuple[str, ...], *, force: bool = False) -> bool:
        """Issues the server's own certificates again when they end soon or do not name every host. Whether it did."""
        wanted = {*hosts, "localhost", "127.0.0.1", "::1"}
        if not force and not self._own_is_stale(wanted):
            return False
        key = ec.generate_private_key(ec.SECP256R1())
        server = self._issue(hosts[0][:64], key.public_key(), SERVER_DAYS, ExtendedKeyUsageOID.SERVER_AUTH, alternatives=wanted)
        files.write(self.server_key, key_pem(key), mode=0o600)
        files.write(self.server_cert, pem_of(server))
        key = ec.generate_private_key(ec.SECP256R1())
        client = self._issue(SERVER_CN, key.public_key(), SERVER_DAYS, ExtendedKeyUsageOID.CLIENT_AUTH)
        files.write(self.client_key, key_pem(key), mode=0o600)
        files.write(self.client_cert, pem_of(client))
        return True

    def _own_is_stale(self, wanted: set[str]) -> bool:
        try:
            certificate = x509.load_pem_x509_certificate(self.server_cert.read_bytes())
        except (OSError, ValueError):
            return True
        sans = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        named = {str(san.value) for san in sans}
        left = certificate.not_valid_after_utc - _now()
        key_matches = self.server_key.is_file() and _public_pem(self.server_key) == _spki(certificate.public_key())
        return not wanted <= named or left < dt.timedelta(days=RENEW_SERVER_BEFORE_DAYS) or not key_matches

    def issue_device(self, device: str, csr: x509.CertificateSigningRequest, lifetime_s: float) -> x509.Certificate:
        """A client certificate for `device` with the key of `csr`; nothing else of the request is used."""
        days = lifetime_s / 86400
        return self._issue(device, csr.public_key(), days, ExtendedKeyUsageOID.CLIENT_AUTH)  # type: ignore[arg-type]

    def _issue(
        self,
        cn: str,
        key: ec.EllipticCurvePublicKey,
        days: float,
        usage: x509.ObjectIdentifier,
        *,
        alternatives: set[str] | None = None,
    ) -> x509.Certificate:
        now = _now()
        builder = x509.CertificateBuilder().subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cn)]))
        builder = builder.issuer_name(self.ca.subject).public_key(key).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - CLOCK_SKEW).not_valid_after(now + dt.timedelta(days=days))
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(sign_certificates=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(authority, critical=False)
        if alternatives:
            sans = x509.SubjectAlternativeName([_alternative(host) for host in sorted(alternatives)])
            builder = builder.add_extension(sans, critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def write_crl(self, serials: list[int]) -> None:
        """Writes the list of revoked certificates that the broker checks. It is read from this disk only, so it need not
        expire. A running broker that reads it again goes by the newest of all it has read, to the second.
        """
        now = _now()
        self._listed = listed = max(now, self._listed + dt.timedelta(seconds=1))
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.ca.subject)
        builder = builder.last_update(listed - CLOCK_SKEW).next_update(self.ca.not_valid_after_utc)
        for serial in serials:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
            builder = builder.add_revoked_certificate(entry)
        files.write(self.crl, builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


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


def common_name(certificate: x509.Certificate | x509.CertificateSigningRequest) -> str | None:
    """The one CN of a certificate, or of the request for one."""
    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if len(found) == 1 else None


def serial_hex(certificate: x509.Certificate) -> str:
    return f"{certificate.serial_number:x}"


def _now() -> dt.datetime:
    return dt.datetime.now(dt.timezone.utc)


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates, key_cert_sign=sign_certificates, crl_sign=sign_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def pem_of(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )  # fmt: skip


def _public_pem(path: Path) -> bytes:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    return _spki(key.public_key())


def _spki(key: object) -> bytes:
    data: bytes = key.public_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return data
