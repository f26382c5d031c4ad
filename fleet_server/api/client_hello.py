"""What a client says in the first message of TLS, before anything is secret: which protocols it would speak (ALPN). Pure.

RFC 8446, 4.1.2 (ClientHello) and 5.1 (records); RFC 7301 (ALPN). Whoever connects can send anything here, so every length is
checked against what is there, and what cannot be read offers nothing.
"""

from __future__ import annotations

HANDSHAKE_RECORD = 22
CLIENT_HELLO = 1
ALPN = 16
MAX_BYTES = 16 * 1024
"""The largest first message that is waited for. A browser's with keys of two kinds has 2 KiB."""


class _Short(Exception):
    """The bytes end before what they announce."""


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        if self._at + count > len(self._data):
            raise _Short
        found = self._data[self._at : self._at + count]
        self._at += count
        return found

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> bytes:
        """Bytes behind their own length, which is a number of `size` bytes."""
        return self.take(self.number(size))

    @property
    def left(self) -> bool:
        return self._at < len(self._data)


def offered(data: bytes) -> frozenset[str] | None:
    """The protocols offered by the client whose first bytes are `data`; None while it has not said all of it. Empty when it
    offers none, or what it says is no ClientHello.
    """
    try:
        message = _message(data)
    except _Short:
        return None if len(data) < MAX_BYTES else frozenset()
    if message is None:
        return frozenset()
    try:
        return _protocols(_Reader(message))
    except _Short:
        return frozenset()


def _message(data: bytes) -> bytes | None:
    """The first handshake message, which may come in several records; None when it is no ClientHello.  Raises: _Short."""
    records, message = _Reader(data), b""
    while True:
        if records.number(1) != HANDSHAKE_RECORD or records.number(1) != 3:
            return None
        records.take(1)
        message += records.vector(2)
        if message and message[0] != CLIENT_HELLO:
            return None
        if len(message) >= 4 and len(message) >= 4 + int.from_bytes(message[1:4], "big"):
            return message[4 : 4 + int.from_bytes(message[1:4], "big")]


def _protocols(hello: _Reader) -> frozenset[str]:
    """Raises: _Short."""
    hello.take(2 + 32)  # version, random
    hello.vector(1)  # session id
    hello.vector(2)  # cipher suites
    hello.vector(1)  # compression
    if not hello.left:
        return frozenset()
    extensions = _Reader(hello.vector(2))
    while extensions.left:
        kind, body = extensions.number(2), extensions.vector(2)
        if kind == ALPN:
            names, found = _Reader(_Reader(body).vector(2)), set()
            while names.left:
                found.add(names.vector(1).decode("ascii", errors="replace"))
            return frozenset(found)
    return frozenset()
