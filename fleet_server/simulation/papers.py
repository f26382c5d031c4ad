"""What a simulated device proves itself with, and how thousands share one TLS context."""

from __future__ import annotations

import ssl
import threading
from pathlib import Path
from typing import Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """The fleet that devices belong to: what an enrolment tells them. `ca` is a file."""

    fleet: str
    device_url: str
    broker_host: str
    broker_port: int
    ca: Path
    root: bytes


class Papers(msgspec.Struct, frozen=True):
    """One device's identity. `file` has certificate and key in PEM."""

    device: str
    key: ec.EllipticCurvePrivateKey
    file: Path


def request(key: ec.EllipticCurvePrivateKey, device: str) -> x509.CertificateSigningRequest:
    """A certificate request, as a device makes one."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())


class SharedContext:
    """One `ssl.SSLContext` for devices with certificates of their own.

    OpenSSL copies a context's certificate into each connection when that is made, so the context may be given the next one right
    after it. With a context for each, as agents have, a simulated device takes 17 KB more, of 57.
    """

    check_hostname = True
    """As an `ssl.SSLContext` has it: the MQTT library asks."""

    def __init__(self, ca: Path) -> None:
        self._context = ssl.create_default_context(cafile=str(ca))
        self._lock = threading.Lock()

    def of(self, papers: Papers) -> _OfOne:
        """What the MQTT library takes for the device's own context."""
        return _OfOne(self, papers)

    def wrap(self, papers: Papers, sock: Any, options: dict[str, Any]) -> ssl.SSLSocket:
        """For any thread.  Raises: OSError."""
        with self._lock:
            self._context.load_cert_chain(papers.file)
            return self._context.wrap_socket(sock, **options)


class _OfOne:
    check_hostname = True

    def __init__(self, shared: SharedContext, papers: Papers) -> None:
        self._shared, self._papers = shared, papers

    def wrap_socket(self, sock: Any, **options: Any) -> ssl.SSLSocket:
        return self._shared.wrap(self._papers, sock, options)
