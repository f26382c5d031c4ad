"""uvicorn with what it does not have: who the client is, and limits to how long and how much a client talks before its request
is complete.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fleet_server.api.busy import Busy

BUSY = Busy()
CERTIFICATE = "client_certificate_der"
CONNECTION = "connection"  # in a request's state: a dictionary that all requests of its connection share
CROWDED_IDLE_S = 2  # how long a kept connection may be idle while more than half of all connections are taken
HEAD_WITHIN_S = 30.0  # also how long a kept connection may be idle; a device on a bad line needs a few seconds
MAX_HEAD_BYTES = 64 * 1024  # what h11 takes at most; httptools would take any number


class _Connection(Protocol):
    cycle: Any
    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop


class _Patience:
    """Ends a connection on which for HEAD_WITHIN_S no request was under way and none began.

    uvicorn waits for ever for the first request and for the rest of a head; each such connection keeps a file descriptor, and
    anybody may open them.
    """

    def __init__(self, connection: _Connection) -> None:
        self._connection, self._last = connection, connection.cycle
        self._timer = connection.loop.call_later(HEAD_WITHIN_S, self._check)

    def _check(self) -> None:
        cycle = self._connection.cycle
        if cycle is self._last and (cycle is None or cycle.response_complete):
            self._connection.transport.abort()
            return
        self._last = cycle
        self._timer = self._connection.loop.call_later(HEAD_WITHIN_S, self._check)

    def end(self) -> None:
        self._timer.cancel()


class OperatorProtocol(H11Protocol):
    """HTTP of the operators' listeners, on which a connection without requests is ended."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._patience = _Patience(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._patience.end()
        super().connection_lost(exc)


class ClientCertificateProtocol(HttpToolsProtocol):
    """Puts the DER bytes of the verified client certificate into `scope["state"]`. From the transport, never from a header."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        connection = transport.get_extra_info("ssl_object")
        certificate = connection.getpeercert(True) if connection is not None else None
        self.app_state = {**self.app_state, CERTIFICATE: certificate, CONNECTION: {}}
        self._limit, self.limit_concurrency = self.limit_concurrency, None  # uvicorn's own answer says not when to come again
        self._head_bytes: int | None = 0  # None while a body comes
        super().connection_made(transport)
        self._patience = _Patience(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._patience.end()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.abort()

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        app = self.app
        if self._is_crowded(self._limit):
            self.app = BUSY
        try:
            super().on_headers_complete()
        finally:
            self.app = app

    def on_response_complete(self) -> None:
        crowded = self._limit is not None and self._is_crowded(self._limit // 2)
        self.timeout_keep_alive = CROWDED_IDLE_S if crowded else self.config.timeout_keep_alive
        super().on_response_complete()

    def _is_crowded(self, limit: int | None) -> bool:
        return limit is not None and (len(self.connections) >= limit or len(self.tasks) >= limit)


NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME; Python's ssl has no name for it."""


def without_dates(config: uvicorn.Config) -> uvicorn.Config:
    """Lets TLS verify client certificates but for their dates, so that a device whose certificate has ended can be told so in
    words, or be let in to renew it. Whoever uses this checks the dates itself (`Inventory.authenticate`).
    """
    config.load()
    assert config.ssl is not None
    config.ssl.verify_flags |= NO_CHECK_TIME
    return config


class Listener(uvicorn.Server):
    """A uvicorn server that leaves signals to the program it runs in."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
