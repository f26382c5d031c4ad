"""Where devices reach their fleet server: names and ports as they are seen from outside, whatever the server listens on.

A server says it when a device enrols and renews its certificate, and in the signed assignment, so that a server that moves is
followed. Being told an address makes no device use it: the fleet server has to answer there first (`agent.sync.addresses`).
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from agent.contract.codec import Document

MQTT = "mqtt"
"""The protocol (ALPN) that a device offers the broker, by which one port can serve the broker and HTTPS."""

DEVICES = "edge-devices"
"""The protocol (ALPN) that a device with a certificate offers the fleet server, beside HTTP/1.1."""

_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}))*\.?")


class Addresses(Document, frozen=True, kw_only=True):
    """`device_url` is `https://HOST:PORT`, `broker` is `HOST:PORT` (MQTT over TLS). `since`: when the server began to say so, in
    seconds since the epoch (UTC); of two the one with the greater number is the newer. Devices that hear of it all at once turn
    to it within `spread_s` seconds, each at a moment of its own.
    """

    device_url: str
    broker: str
    since: float = 0.0
    spread_s: float = 0.0

    def __post_init__(self) -> None:
        check_url(self.device_url)
        split(self.broker)

    @property
    def broker_host(self) -> str:
        return split(self.broker)[0]

    @property
    def broker_port(self) -> int:
        return split(self.broker)[1]

    def is_same_place(self, other: Addresses) -> bool:
        return (self.device_url, self.broker) == (other.device_url, other.broker)


def check_host(text: str, what: str = "the host") -> str:
    """`text` itself: a host name, an IPv4 or an IPv6 address, as others reach it.  Raises: ValueError that says what it is
    instead.
    """
    say = f"{what} is {text!r}; expected a name or an address such as fleet.example.org or 192.0.2.10"
    if "://" in text or "/" in text:
        raise ValueError(f"{say}, not a URL")
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        pass
    else:
        if address.is_unspecified:
            raise ValueError(f"{say}; {text} is what a server listens on, and nobody can connect to it")
        if "%" in text:
            raise ValueError(f"{say}; an address with a zone (%) means something on one machine only")
        return text
    if text.startswith("[") or (text.count(":") == 1 and text.rpartition(":")[2].isdigit()):
        raise ValueError(f"{say}, without a port or brackets")
    if not _NAME.fullmatch(text) or re.fullmatch(r"[0-9.]+", text):
        raise ValueError(say)
    return text


def join(host: str, port: int) -> str:
    """`HOST:PORT`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split(text: str, what: str = "the address") -> tuple[str, int]:
    """Host (without brackets) and port of `HOST:PORT`.  Raises: ValueError."""
    say = f"{what} is {text!r}; expected HOST:PORT, such as fleet.example.org:443 or [2001:db8::1]:443"
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or not 1 <= int(port[:6]) <= 65535:
        raise ValueError(say)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if ":" not in host:
            raise ValueError(say)
    elif ":" in host:
        raise ValueError(say)
    return check_host(host, what), int(port)


def check_url(text: str, what: str = "the address") -> tuple[str, int]:
    """Host and port of `https://HOST[:PORT]`.  Raises: ValueError; also when there is anything else in it."""
    say = f"{what} is {text!r}; expected https://HOST or https://HOST:PORT and nothing behind it"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{say} ({error})") from None
    beside = parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc
    if parts.scheme != "https" or not host or beside or port == 0:
        raise ValueError(say)
    return check_host(host, what), port or 443
