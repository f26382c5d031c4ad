"""Joining a fleet. What is sent to whom, and when it is trusted: `agent/contract/enrolment.py`."""

from __future__ import annotations

import re
import ssl
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent.contract.codec import ContractError, decode, encode
from agent.contract.enrolment import (
    CA_PATH,
    ENROL_PATH,
    MAX_RESPONSE_BYTES,
    EnrolmentRequest,
    EnrolmentResponse,
    EnrolmentString,
)
from agent.contract.reports import Hardware
from agent.host import clock as clocks
from agent.sync import identity as identities
from agent.sync.http import FleetHttp, HttpStatus
from agent.sync.identity import Identity
from agent.sync.ports import Clock
from agent.sync.problems import Problem
from agent.sync.proxy import DIRECT, ProxyFailed, Way, ignored

TIMEOUT_S = 15.0
_MAX_CA_BYTES = 64 * 1024


class EnrolmentFailed(Exception):
    """The device did not join; nothing was written. The message says what to do."""


def enrol(
    text: str,
    folder: Path,
    clock: Clock,
    *,
    device: str | None,
    hardware: Hardware | None,
    force: bool = False,
    way: Way = DIRECT,
) -> Identity:
    """Joins the fleet that the enrolment string `text` names and writes the identity to `folder`.  Raises: EnrolmentFailed."""
    try:
        string = EnrolmentString.parse(text)
    except ValueError as error:
        raise EnrolmentFailed(str(error)) from None
    if not force and (folder / "fleet.json").exists():
        raise EnrolmentFailed(f"this device is enrolled already ({folder}); --force replaces its identity")
    ca = fetch_ca(string, way)
    key = ec.generate_private_key(ec.SECP256R1())
    response = _ask(
        string,
        ca,
        EnrolmentRequest(token=string.token, csr_pem=make_csr(key, device or "device"), device=device, hardware=hardware),
        clock,
        way,
    )
    _check(response, ca, key, clock)
    try:
        identities.write(folder, response, key, clock.wall())
    except OSError as error:
        raise EnrolmentFailed(
            f"the identity could not be written to {folder}: {error.strerror}; the token is used up"
        ) from error
    return identities.load(folder)


def fetch_ca(string: EnrolmentString, way: Way = DIRECT) -> str:
    """The fleet's CA certificate (PEM), proved by the fingerprint in the string and by nothing else.  Raises:
    EnrolmentFailed.
    """
    pem = _fetch_unverified(string, way)
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise EnrolmentFailed(
            f"{string.base_url}{CA_PATH} did not answer with a certificate: is this a fleet server?"
        ) from None
    actual = certificate.fingerprint(hashes.SHA256()).hex()
    if string.ca_sha256 != actual:
        raise EnrolmentFailed(
            f"the fleet server's CA has fingerprint {actual}, the enrolment string says {string.ca_sha256}: either the string is for "
            "another server, or somebody is between. Nothing was sent; ask for a new string"
        )
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _fetch_unverified(string: EnrolmentString, way: Way) -> bytes:
    """GET without trusting the connection. Written on http.client so that no pool ever holds an unverified connection."""
    import http.client

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = http.client.HTTPSConnection(string.host, string.port, timeout=TIMEOUT_S, context=context)
    try:
        plain = way.connect(string.host, string.port, TIMEOUT_S)
        connection.sock = context.wrap_socket(plain, server_hostname=string.host)
        connection.request("GET", CA_PATH)
        response = connection.getresponse()
        body = response.read(_MAX_CA_BYTES)
    except ProxyFailed as error:
        raise EnrolmentFailed(f"{string.base_url} cannot be reached: {error}") from error
    except (OSError, http.client.HTTPException) as error:
        unused = (
            ""
            if way.proxy or not ignored()
            else f"; {ignored()} is set and not obeyed: name the proxy in agent.yaml (sync.proxy)"
        )
        raise EnrolmentFailed(
            f"{string.base_url} cannot be reached: {error}; check the address, the network and the firewall{unused}"
        ) from error
    finally:
        connection.close()
    if response.status != 200:
        raise EnrolmentFailed(
            f"{string.base_url}{CA_PATH} answered {response.status}: is this a fleet server's enrolment address?"
        )
    return body


def make_csr(key: ec.EllipticCurvePrivateKey, name: str) -> str:
    """A certificate request. The server decides the name; the request proves that we hold the key."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return csr.public_bytes(serialization.Encoding.PEM).decode()


def _ask(string: EnrolmentString, ca: str, request: EnrolmentRequest, clock: Clock, way: Way) -> EnrolmentResponse:
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
        file.write(ca)
        file.flush()
        http = FleetHttp(string.base_url, clock, ca=Path(file.name), way=way)
        try:
            answer = http.post(ENROL_PATH, encode(request), limit_bytes=MAX_RESPONSE_BYTES)
        except HttpStatus as error:
            raise EnrolmentFailed(f"the fleet server refused: {error.message}") from error
        except Problem as error:
            raise EnrolmentFailed(_explain_tls(error.message, ca, clock)) from error
        finally:
            http.close()
    try:
        return decode(answer, EnrolmentResponse, limit_bytes=MAX_RESPONSE_BYTES)
    except ContractError as error:
        raise EnrolmentFailed(f"the fleet server's answer is not understood: {error}") from error


def _explain_tls(message: str, ca: str, clock: Clock) -> str:
    """A clock in 1970 shows first as a certificate that is not yet valid."""
    now, certificate = clock.wall(), x509.load_pem_x509_certificate(ca.encode())
    if now < certificate.not_valid_before_utc.timestamp() or re.search("not yet valid", message):
        return f"{message}; this device's clock says {clocks.text(now)}: set it and try again"
    return message


def _check(response: EnrolmentResponse, ca: str, key: ec.EllipticCurvePrivateKey, clock: Clock) -> None:
    """What came back must work before it replaces anything.  Raises: EnrolmentFailed."""
    try:
        certificate = x509.load_pem_x509_certificate(response.certificate_pem.encode())
        authority = x509.load_pem_x509_certificate(ca.encode())
        kept = x509.load_pem_x509_certificate(response.ca_pem.encode())
        certificate.verify_directly_issued_by(authority)
    except Exception as error:
        raise EnrolmentFailed(f"the fleet server sent a certificate that its CA did not issue: {error}") from error
    if kept.fingerprint(hashes.SHA256()) != authority.fingerprint(hashes.SHA256()):
        raise EnrolmentFailed("the fleet server sent another CA than the one in the enrolment string: nothing was kept")
    if certificate.public_key() != key.public_key() or identities.common_name(certificate) != response.device:
        raise EnrolmentFailed("the fleet server sent a certificate for another key or name: nothing was kept")
    begins = certificate.not_valid_before_utc.timestamp()
    if clock.wall() < begins:
        raise EnrolmentFailed(
            f"the new certificate is valid from {clocks.text(begins)}, and this device's clock says {clocks.text(clock.wall())}: "
            "set the clock and enrol again (the token may be used up)"
        )
