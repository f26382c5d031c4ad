"""One certificate authority (CA): its certificate and key, and what it signs. ECDSA P-256 throughout."""

from __future__ import annotations

import datetime as dt
import hashlib
import ipaddress
from collections.abc import Iterable

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fleet_server.errors import Unavailable

CA_DAYS = 3650
CLOCK_SKEW = dt.timedelta(hours=24)  # boards without a clock chip come up in the past; a certificate must hold there too
MAX_NAME_CHARS = 64  # of a common name


class Ca:
    """`key` may be missing where nothing is signed."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey | None) -> None:
        self.certificate, self._key = certificate, key
        self.pem = pem_of(certificate)
        self.fingerprint = hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()
        """The sha256 of the certificate's DER bytes: what an enrolment string names."""
        self._listed = dt.datetime.min.replace(tzinfo=dt.timezone.utc)  # when the last revocation list says it was written

    @classmethod
    def create(cls, name: str) -> Ca:
        """A new CA of that name."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _authority_builder(_named(name), _named(name), key.public_key(), key.public_key()).sign(
            key, hashes.SHA256()
        )
        return cls(certificate, key)

    @classmethod
    def read(cls, certificate: bytes, key: bytes | None) -> Ca:
        """Raises: ValueError."""
        loaded = serialization.load_pem_private_key(key, None) if key is not None else None
        assert loaded is None or isinstance(loaded, ec.EllipticCurvePrivateKey)
        return cls(x509.load_pem_x509_certificate(certificate), loaded)

    @property
    def key(self) -> ec.EllipticCurvePrivateKey:
        """Processes that certify nobody have none.  Raises: Unavailable."""
        if self._key is None:
            raise Unavailable("the CA's key is not here, so this process certifies nobody", code="no_key")
        return self._key

    @property
    def key_pem(self) -> bytes:
        return key_pem(self.key)

    @property
    def ends(self) -> float:
        """When its certificate ends, in seconds since the epoch."""
        return self.certificate.not_valid_after_utc.timestamp()

    def issued(self, certificate: x509.Certificate) -> bool:
        """Whether this CA signed the certificate."""
        try:
            certificate.verify_directly_issued_by(self.certificate)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            return False
        return True

    def issue(
        self, cn: str, key: ec.EllipticCurvePublicKey, days: float, *usages: x509.ObjectIdentifier, alternatives: Iterable[str] = ()
    ) -> x509.Certificate:  # fmt: skip
        """A certificate that can sign no others, for these usages. `alternatives`: further names and addresses of a server."""
        now = _now()
        builder = x509.CertificateBuilder().subject_name(_named(cn)).issuer_name(self.certificate.subject).public_key(key)
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - CLOCK_SKEW).not_valid_after(now + dt.timedelta(days=days))
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(sign_certificates=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = builder.add_extension(authority, critical=False)
        if names := sorted(alternatives):
            builder = builder.add_extension(x509.SubjectAlternativeName([_alternative(one) for one in names]), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def cross_certify(self, other: Ca) -> x509.Certificate:
        """What lets whoever believes this CA believe the other one."""
        subject, key = other.certificate.subject, other.certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return _authority_builder(subject, self.certificate.subject, key, self.key.public_key()).sign(self.key, hashes.SHA256())

    def revocation_list(self, serials: Iterable[int]) -> bytes:
        """The list of revoked certificates, PEM. It is read from the server's own disk only, so it need not expire. A running
        broker that reads it again goes by the newest of all it has read, to the second.
        """
        now = _now()
        self._listed = listed = max(now, self._listed + dt.timedelta(seconds=1))
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.certificate.subject)
        builder = builder.last_update(listed - CLOCK_SKEW).next_update(
            max(self.certificate.not_valid_after_utc, listed + dt.timedelta(1))
        )
        for serial in serials:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def common_name(certificate: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """The one CN of a certificate, or of the request for one; empty when there is not one."""
    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if len(found) == 1 else ""


def pem_of(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )  # fmt: skip


def _now() -> dt.datetime:
    return dt.datetime.now(dt.timezone.utc)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _authority_builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, by: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = _now()
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - CLOCK_SKEW)
    builder = builder.not_valid_after(now + dt.timedelta(days=CA_DAYS))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(sign_certificates=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    return builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by), critical=False)


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
