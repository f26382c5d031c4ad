"""How a device joins a fleet: one string to paste, one HTTPS exchange. Nothing is trusted on first use.

The string is `edge://TOKEN@HOST:PORT/?ca=SHA256`. The device fetches the fleet's CA certificate from
`https://HOST:PORT/enrolment/ca` without trusting the connection, compares its hash with the string's, and only then sends the
token and a certificate request over a connection that this CA verifies. The private key never leaves the device.
"""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import parse_qs, urlsplit

import msgspec

from agent.contract import names
from agent.contract.addresses import Addresses
from agent.contract.codec import FORMAT, Document, require_format
from agent.contract.reports import Hardware

SCHEME = "edge"
CA_PATH = "/enrolment/ca"  # GET: the CA certificate, PEM
ENROL_PATH = "/enrolment"  # POST EnrolmentRequest: EnrolmentResponse
TOKEN = re.compile(r"[A-Za-z0-9_-]{16,128}")
MAX_RESPONSE_BYTES = 1024 * 1024

# On the device listener (mutual TLS; the certificate says which device asks):
METADATA_PATH = "/metadata/"  # GET: TUF metadata, <version>.<role>.json and timestamp.json
TARGETS_PATH = "/targets/"  # GET: TUF targets, <directory>/<sha256>.<name>
BLOBS_PATH = "/blobs/"  # GET with Range: file contents by sha256
RECORD_PATH = "/record"  # GET: the caller's DeviceRecord in a DSSE envelope
RENEW_PATH = "/renew"  # POST RenewalRequest: EnrolmentResponse


class EnrolmentString(msgspec.Struct, frozen=True):
    """What an operator gives a device. The token works once (or as often as it was made for) and expires."""

    host: str
    port: int
    token: str
    ca_sha256: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{SCHEME}://{self.token}@{host}:{self.port}/?ca={self.ca_sha256}"

    @property
    def base_url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> EnrolmentString:
        """Raises: ValueError that says which part is missing, without repeating the token."""
        try:
            parts = urlsplit(text.strip())
            host, port, token = parts.hostname, parts.port, parts.username
        except ValueError as error:
            raise ValueError(f"not an enrolment string: {error}") from None
        if parts.scheme != SCHEME or not host or not port:
            raise ValueError(f"not an enrolment string: expected {SCHEME}://TOKEN@HOST:PORT/?ca=SHA256")
        if not token or not TOKEN.fullmatch(token):
            raise ValueError("the enrolment string has no valid token before the @")
        ca = parse_qs(parts.query).get("ca", [""])[0].lower()
        if not names.SHA256.fullmatch(ca):
            raise ValueError("the enrolment string has no CA fingerprint: expected ?ca= and 64 hex digits")
        return cls(host, port, token, ca)


class EnrolmentRequest(Document, frozen=True, kw_only=True):
    """`device` is the wished id; None lets the server choose one. `csr_pem` is signed by the device's new key."""

    token: str
    csr_pem: str
    device: str | None = None
    hardware: Hardware | None = None
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "enrolment request")
        if self.device is not None:
            names.check(names.DEVICE_ID, self.device, "device id")


class RenewalRequest(Document, frozen=True, kw_only=True):
    """A new certificate for the device that asks, known by the certificate it still has. `authorities`: the CAs that it believes,
    each by the sha256 of its certificate; it gets one of the newest of them. Empty of a device that knows of one CA only.
    """

    csr_pem: str
    authorities: tuple[str, ...] = ()
    format: int = FORMAT


RENEWAL_PAYLOAD_TYPE = "application/vnd.edge-agent.renewal+json"
"""The DSSE payload type of a SignedRenewal."""

MAX_CERTIFICATE_BYTES = 16 * 1024


class SignedRenewal(Document, frozen=True, kw_only=True):
    """A RenewalRequest over the broker, where no connection says who asks: signed with the device's key, as its reports are.

    `replaces` is the serial number (hex) of the certificate that the device has. Once that has ended, whoever kept the request
    can do nothing with it.
    """

    device: str
    replaces: str
    csr_pem: str
    authorities: tuple[str, ...] = ()
    kind: Literal["renewal"] = "renewal"
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "renewal")
        names.check(names.DEVICE_ID, self.device, "device id")


class EnrolmentResponse(Document, frozen=True, kw_only=True):
    """What a device keeps beside its key. `tuf_root` is the trusted root, kept from enrolment and updated only through TUF.

    `addresses` is where the fleet server is reached; `device_url`, `broker_host` and `broker_port` say it for agents that read
    nothing else, and know nothing of one port for everything.
    """

    fleet: str
    device: str
    certificate_pem: str
    ca_pem: str
    device_url: str
    broker_host: str
    broker_port: int
    tuf_root: str
    addresses: Addresses | None = None
    kind: Literal["enrolment"] = "enrolment"
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "enrolment response")
        names.check(names.DEVICE_ID, self.device, "device id")
