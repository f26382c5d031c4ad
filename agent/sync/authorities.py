"""Which certificate authorities (CAs) this device believes. Decides only; `fleet/authorities.py` acts.

Rules:
 1. the CAs to believe stand in the signed assignment, whose version never goes down; a server that never replaced its CA says
    nothing, and the CA of enrolment counts;
 2. a CA that is new to this device is believed when one that it believes already certified its key, directly or by way of further
    cross certificates. A cross certificate has to be that of a CA: a device's certificate vouches for nobody;
 3. what is not named any more is believed no more, at once; but when nothing that is named can be believed, everything stays as
    it is;
 4. the dates of a CA are judged where connections are made, not here: the clock may be wrong.
"""

from __future__ import annotations

from collections.abc import Iterable

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.contract.authorities import Authorities

_BROKEN = (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm)

Certificates = tuple[x509.Certificate, ...]
"""Of CAs, the newest first."""


class NotBelieved(Exception):
    """None of the CAs that the fleet names can be believed. The message says why."""


def read(pem: bytes) -> Certificates:
    """The CAs in a file.  Raises: ValueError."""
    return tuple(x509.load_pem_x509_certificates(pem))


def pem(certificates: Iterable[x509.Certificate]) -> bytes:
    """What `read` reads, and TLS libraries as well."""
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates)


def fingerprint(certificate: x509.Certificate) -> str:
    """The sha256 of its DER bytes, in hex: what the fleet server calls a CA by."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def issuer_of(certificate: x509.Certificate, known: Certificates) -> int | None:
    """Which of `known` issued the certificate: its place, 0 for the newest; None for a stranger."""
    return next((place for place, one in enumerate(known) if _issued(certificate, one)), None)


def believed(known: Certificates, said: Authorities) -> Certificates:
    """The CAs to believe after the fleet named `said`.  Raises: NotBelieved; `known` stays then."""
    try:
        named = [x509.load_pem_x509_certificate(text.encode()) for text in said.certificates]
        crossed = [x509.load_pem_x509_certificate(text.encode()) for text in said.cross_certificates]
    except ValueError as error:
        raise NotBelieved(f"the fleet names a CA whose certificate cannot be read: {error}") from error
    vouched = _vouched(known, crossed)
    found = tuple(
        one for one in named if one in known or (_is_authority(one) and _issued(one, one) and _is_among(one, vouched))
    )
    if not found:
        named_as = ", ".join(fingerprint(one)[:16] for one in named)
        raise NotBelieved(f"no CA that this device believes has certified one that the fleet names now ({named_as})")
    return found


def _vouched(known: Certificates, crossed: list[x509.Certificate]) -> list[x509.Certificate]:
    """The cross certificates that lead to a known CA."""
    left = [one for one in crossed if _is_authority(one)]
    found: list[x509.Certificate] = []
    while more := [one for one in left if any(_issued(one, by) for by in (*known, *found))]:
        found += more
        left = [one for one in left if one not in more]
    return found


def _is_among(certificate: x509.Certificate, vouched: list[x509.Certificate]) -> bool:
    return any(one.subject == certificate.subject and one.public_key() == certificate.public_key() for one in vouched)


def _issued(certificate: x509.Certificate, by: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(by)
    except _BROKEN:
        return False
    return True


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        return basic.ca and isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
    except (*_BROKEN, x509.ExtensionNotFound, x509.DuplicateExtension):
        return False
