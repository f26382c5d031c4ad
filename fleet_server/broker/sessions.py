"""Makes the broker forget what it keeps of one device: its connection, subscriptions, and messages that wait for it.

The broker takes whoever shows a certificate of a device for that device, and a clean start in its name ends all it had. The
certificate for that is made here, lasts minutes, and is in no database, so that nothing but the broker would take it.
"""

from __future__ import annotations

import os
import socket
import ssl
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fleet_server.devices import pki

WITHIN_S = 3.0
LASTS_S = 300.0
CONNECT = b"\x10\x0d\x00\x04MQTT\x05\x02\x00\x05\x00\x00\x00"  # MQTT 5, clean start, the client id is the certificate's name
DISCONNECT = b"\xe0\x00"
CONNACK = 0x20


def forget(device: str, authority: pki.Authority, host: str, port: int) -> None:
    """Raises: OSError when the broker cannot be reached or refuses."""
    context = ssl.create_default_context(cafile=str(authority.trusted_path))
    _certify(context, device, authority)
    with (
        socket.create_connection((host, port), timeout=WITHIN_S) as sock,
        context.wrap_socket(sock, server_hostname=host) as tls,
    ):
        tls.sendall(CONNECT)
        answer = tls.recv(4)
        if len(answer) < 4 or answer[0] != CONNACK or answer[3] != 0:
            raise ConnectionError(f"the broker answers {answer!r}")
        tls.sendall(DISCONNECT)


def _certify(context: ssl.SSLContext, device: str, authority: pki.Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    pem = pki.pem_of(authority.issue_device(device, request, LASTS_S)) + pki.key_pem(key)
    fd, path = tempfile.mkstemp(dir=authority.folder)  # ssl takes files only; the folder is the server's own
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(pem)
        context.load_cert_chain(path)
    finally:
        Path(path).unlink()
