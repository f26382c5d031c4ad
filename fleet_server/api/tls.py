"""uvicorn with what it does not have: who the client is, limits to how many connections there are, and to how long and how much
a client talks before its request is complete.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import uvicorn
from anyio.to_thread import current_default_thread_limiter
from uvicorn.config import create_ssl_context
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fleet_server.api.accepting import Acceptor
from fleet_server.api.busy import Busy
from fleet_server.api.connections import Connection, Connections

BUSY = Busy()
CERTIFICATE = "client_certificate_der"
CONNECTION = "connection"  # in a request's state: a dictionary that all requests of its connection share
CROWDED_IDLE_S = 2  # how long a kept connection may be idle while more than half of all connections are taken
HEAD_WITHIN_S = 30.0  # also how long a kept connection may be idle; a device on a bad line needs a few seconds
MAX_HEAD_BYTES = 64 * 1024  # what h11 takes at most; httptools would take any number
CROWDED_S = 5.0  # for which a device that has all its connections keeps a further one, unread
THREADS = 12  # of each listener, for requests that read the database: it answers no faster to more
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Of TLS 1.2: with forward secrecy, and without CBC, whose padding has been attacked again and again. TLS 1.3 has no others."""


class _Served(Protocol):
    """What both of uvicorn's protocols have."""

    cycle: Any
    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    connection: Connection
    room: Connections


class _Patience:
    """Ends a connection on which for HEAD_WITHIN_S no request was under way and none began.

    uvicorn waits for ever for the first request and for the rest of a head; each such connection keeps a file descriptor, and
    anybody may open them.
    """

    def __init__(self, served: _Served) -> None:
        self._served, self._last = served, served.cycle
        self._timer = served.loop.call_later(HEAD_WITHIN_S, self._check)

    def _check(self) -> None:
        cycle = self._served.cycle
        if cycle is self._last and (cycle is None or cycle.response_complete):
            self._served.transport.abort()
            return
        self._last = cycle
        self._timer = self._served.loop.call_later(HEAD_WITHIN_S, self._check)

    def end(self) -> None:
        self._timer.cancel()


def _began(served: _Served) -> _Patience:
    """Says how the connection is ended from now on, and when it may be."""

    def waits() -> bool:
        cycle = served.cycle
        return cycle is None or bool(cycle.response_complete or cycle.more_body)

    served.connection.end, served.connection.waits = served.transport.abort, waits
    served.connection.since = served.loop.time()
    return _Patience(served)


class OperatorProtocol(H11Protocol):
    """HTTP of the operators' listeners, on which a connection without requests is ended."""

    connection: Connection
    room: Connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._patience = _began(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._patience.end()
        self.room.remove(self.connection)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.connection.since = self.loop.time()
        super().data_received(data)

    def on_response_complete(self) -> None:
        self.connection.since = self.loop.time()
        super().on_response_complete()


class ClientCertificateProtocol(HttpToolsProtocol):
    """Puts the DER bytes of the verified client certificate into `scope["state"]`. From the transport, never from a header."""

    connection: Connection
    room: Connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        tls = transport.get_extra_info("ssl_object")
        certificate = tls.getpeercert(True) if tls is not None else None
        self.app_state = {**self.app_state, CERTIFICATE: certificate, CONNECTION: {}}
        self._head_bytes: int | None = 0  # None while a body comes
        super().connection_made(transport)
        self._patience = _began(self)
        if tls is not None and not self.room.identify(self.connection, _named(tls.getpeercert())):
            transport.pause_reading()  # were it ended at once, it would be back with another handshake
            seconds = random.uniform(CROWDED_S, 3 * CROWDED_S)  # noqa: S311 - not all at the same moment
            self.loop.call_later(seconds, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._patience.end()
        self.room.remove(self.connection)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.connection.since = self.loop.time()
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
        if len(self.tasks) >= self.room.limits.total // 2:  # more requests would only wait for each other
            self.app = BUSY
        try:
            super().on_headers_complete()
        finally:
            self.app = app

    def on_response_complete(self) -> None:
        self.connection.since = self.loop.time()
        crowded = len(self.room) > self.room.limits.total // 2
        self.timeout_keep_alive = CROWDED_IDLE_S if crowded else self.config.timeout_keep_alive
        super().on_response_complete()


def _named(certificate: dict[str, Any]) -> str:
    """Whom a verified certificate names: the device."""
    names = [value for part in certificate["subject"] for key, value in part if key == "commonName"]
    return str(names[0]) if names else ""


NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME; Python's ssl has no name for it."""


def secured(config: uvicorn.Config) -> uvicorn.Config:
    """TLS 1.2 and newer, with suites that are not known to be weak.

    Client certificates are verified but for their dates, so that a device whose certificate has ended can be told so in words,
    or be let in to renew it. Whoever asks for certificates checks the dates itself (`Inventory.authenticate`).
    """
    config.load()
    if config.ssl is not None:
        _harden(config.ssl)
    return config


def _harden(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    if context.verify_mode is ssl.CERT_REQUIRED:
        context.verify_flags |= NO_CHECK_TIME


def _anew(config: uvicorn.Config) -> ssl.SSLContext | None:
    """The context of a configuration from what is on the disk now: one that has believed a CA cannot be made to forget it."""
    if config.ssl is None or config.ssl_certfile is None:
        return None
    context = create_ssl_context(
        certfile=config.ssl_certfile, keyfile=config.ssl_keyfile, password=config.ssl_keyfile_password, ssl_version=config.ssl_version,
        cert_reqs=config.ssl_cert_reqs, ca_certs=config.ssl_ca_certs, ciphers=config.ssl_ciphers,
    )  # fmt: skip
    _harden(context)
    return context


class Listener(uvicorn.Server):
    """A uvicorn server with a thread, an event loop and a bounded number of connections of its own, so that listeners keep each
    other from nothing. It leaves signals to the program it runs in.
    """

    def __init__(self, config: uvicorn.Config, room: Connections, name: str) -> None:
        super().__init__(secured(config))
        self.name, self.room = name, room
        self.host, self.port = config.host, config.port
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but that an Acceptor takes the connections."""
        await self.lifespan.startup()
        current_default_thread_limiter().total_tokens = THREADS
        self._loop = loop = asyncio.get_running_loop()
        config, make = self.config, self.config.http_protocol_class

        def protocol() -> Any:
            return make(config=config, server_state=self.server_state, app_state=self.lifespan.state, _loop=loop)  # type: ignore[call-arg]

        self.servers = [Acceptor(sock, protocol, config.ssl, self.room) for sock in sockets or []]  # type: ignore[misc]
        self.started = True

    def renew(self) -> None:
        """Shows whoever connects from now on the certificate that is on the disk, and believes the CAs there. For any thread."""
        context = _anew(self.config)
        if context is not None and self._loop is not None and not self.should_exit:
            self._loop.call_soon_threadsafe(self._secure, context)

    def _secure(self, context: ssl.SSLContext) -> None:
        self.config.ssl = context
        for acceptor in self.servers:
            assert isinstance(acceptor, Acceptor)
            acceptor.secure(context)

    def hand(self, sock: socket.socket) -> None:
        """Takes a connection that was accepted elsewhere and of which nothing was read. For any thread."""
        if self._loop is None or self.should_exit:
            sock.close()
            return
        try:
            self._loop.call_soon_threadsafe(self._take, sock)
        except RuntimeError:  # it has ended
            sock.close()

    def _take(self, sock: socket.socket) -> None:
        for acceptor in self.servers:
            assert isinstance(acceptor, Acceptor)
            acceptor.hand(sock)

    async def run_aside(self, sock: socket.socket) -> None:
        """Serves in a thread of its own; returns when that ends, and raises what ended it."""
        loop = asyncio.get_running_loop()
        ended = loop.create_future()

        def tell(error: BaseException | None) -> None:
            if not ended.done():
                ended.set_exception(error) if error is not None else ended.set_result(None)

        def work() -> None:
            error: BaseException | None = None
            try:
                self.run(sockets=[sock])
            except BaseException as raised:  # noqa: BLE001 - whatever ends a listener ends the server
                error = raised
            with contextlib.suppress(RuntimeError):  # the program ended before
                loop.call_soon_threadsafe(tell, error)

        threading.Thread(target=work, name=f"listener-{self.name}", daemon=True).start()
        await asyncio.shield(ended)
