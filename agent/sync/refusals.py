"""Why the other side does not let this device in, or why this device does not believe the other side: in words, with what to
do. Pure.

With TLS 1.3 a server refuses a client's certificate after the handshake, so the reason stands in whatever is read first;
OpenSSL names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

CHECK_NETWORK = "check the network, the firewall, and that the fleet server runs"
ENROL_AGAIN = "ask an operator for an enrolment string, and enrol again: edge-agent enrol --force STRING"
ALLOW_RENEWAL = (
    "ask an operator to allow a late renewal (edge-fleet device allow-renewal {device}): this device then renews by itself; "
    "or enrol it again with --force"
)
SET_CLOCK = "set this device's clock (NTP, timedatectl), or wait for the fleet server's: `date` shows what it says"


class Refusal(msgspec.Struct, frozen=True):
    """`says`: what is the matter; `advice`: what to do."""

    says: str
    advice: str


_TLS: tuple[tuple[tuple[str, ...], Refusal], ...] = (
    # what the other side says of our certificate
    (("alert certificate expired",), Refusal("this device's certificate has ended, by the other side's clock", ALLOW_RENEWAL)),
    (("alert certificate revoked",), Refusal("this device's certificate was revoked: an operator shut the device out", ENROL_AGAIN)),
    (
        ("alert unknown ca", "alert certificate unknown", "alert bad certificate"),
        Refusal("the other side does not know who issued this device's certificate: another fleet, or one with a new CA", ENROL_AGAIN),
    ),
    (
        ("remote end closed connection without response",),
        Refusal(
            "the fleet server closed the connection without an answer, as it does when it does not know who issued this device's "
            "certificate, or while it is restarted",
            "try again in a minute; if it stays so, " + ENROL_AGAIN,
        ),
    ),
    (
        ("alert certificate required", "peer did not return a certificate"),
        Refusal("the other side saw no certificate of this device", "check the files in the identity folder; enrol again with --force"),
    ),
    # what we say of theirs
    (
        ("certificate is not yet valid",),
        Refusal("the other side's certificate is not valid yet, by this device's clock: it is behind", SET_CLOCK),
    ),
    (
        ("certificate has expired",),
        Refusal(
            "the other side's certificate has ended, by this device's clock: either that is ahead, or the server was not restarted in time",
            SET_CLOCK + "; a fleet server renews its own certificate when it starts",
        ),
    ),
    (
        ("hostname mismatch", "ip address mismatch", "doesn't match", "not valid for"),
        Refusal(
            "the other side's certificate is for another name than the one it was reached by",
            "add the name to `hosts` in the server's fleet.yaml and restart it, or enrol this device with the right address",
        ),
    ),
    (
        ("self-signed certificate", "self signed certificate", "unable to get local issuer", "unable to get issuer"),
        Refusal(
            "the other side shows a certificate of another CA than this fleet's: another server, or something on the way that opens TLS",
            "check the address and whether a proxy intercepts TLS; if the fleet has a new CA, enrol again with --force",
        ),
    ),
)  # fmt: skip

_CODES: Mapping[str, Refusal] = MappingProxyType({
    "expired": Refusal("this device's certificate has ended", ALLOW_RENEWAL),
    "revoked": Refusal("an operator shut this device out", ENROL_AGAIN),
    "unknown_device": Refusal("the fleet server does not know this device: it was deleted, or the server was restored", ENROL_AGAIN),
    "no_certificate": Refusal(
        "the fleet server saw no certificate of this device", "see whether a proxy on the way ends TLS; it must not"
    ),
})  # fmt: skip


def of_tls(text: str) -> Refusal | None:
    """What an error of TLS says about certificates; None when it is about something else."""
    lower = text.lower().replace("_", " ")
    return next((refusal for marks, refusal in _TLS if any(mark in lower for mark in marks)), None)


def of_status(status: int, code: str) -> Refusal | None:
    """What an answer of the device listener says; None when the device is not what it refuses."""
    if code in _CODES:
        return _CODES[code]
    if status in (401, 403):
        return Refusal("the fleet server knows this connection and refuses it", ENROL_AGAIN)
    return None


def in_words(text: str) -> str:
    """`text`, and before it what it means, where that is known."""
    refusal = of_tls(text)
    return f"{refusal.says} ({text})" if refusal is not None else text
