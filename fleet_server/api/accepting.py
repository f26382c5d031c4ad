"""Takes connections from a listening socket: counts them before anything is read, and spends nothing on who says nothing.

A connection costs one descriptor until its first byte comes; only then TLS begins. Handshakes begin in turns of the addresses,
one at a time, so that whoever connects without end waits for himself.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import socket
import ssl
from collections import deque
from collections.abc import Callable
from typing import Protocol

from fleet_server.api.connections import Answer, Connection, Connections, address_of

_log = logging.getLogger(__name__)

FIRST_BYTE_S = 10.0  # between connecting and the first byte, and again until TLS is established
AT_ONCE = 64  # connections taken before everything else has its turn
FULL_S = 0.05  # until a listener without room looks again
NO_DESCRIPTOR_S = 1.0  # until it does when the process has no descriptor left
UNREAD_MS = 60_000
"""After so long without a byte acknowledged the system ends a connection whose client does not read what it asked for."""
LOW_DESCRIPTORS = 1024
"""Connections get higher ones where the process may have them: select(), which the MQTT library waits with, knows no others."""


class Protocoled(Protocol):
    """A protocol that can be told which connection it serves."""

    connection: Connection
    room: Connections


class Acceptor:
    """Accepts for one listener, in the event loop that made it. Stops as an asyncio server does."""

    def __init__(
        self, sock: socket.socket, make: Callable[[], Protocoled], context: ssl.SSLContext | None, connections: Connections
    ) -> None:
        self._socket, self._make, self._context, self._connections = sock, make, context, connections
        self._loop = asyncio.get_running_loop()
        self._ready: dict[str, deque[Callable[[], None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: set[Connection] = set()
        self._next: tuple[socket.socket, str] | None = None
        """Somebody for whom there was no room yet; everybody else waits in the system's queue."""
        self._open = True
        sock.setblocking(False)
        self._listen()

    def close(self) -> None:
        self._open = False
        self._loop.remove_reader(self._socket.fileno())
        if self._next is not None:
            self._next[0].close()
        for connection in list(self._waiting):
            connection.end()

    def hand(self, sock: socket.socket) -> None:
        """Takes a connection that was accepted elsewhere, if there is room for it. In this loop."""
        try:
            address = address_of(sock.getpeername()[0])
        except OSError:  # it has gone
            sock.close()
            return
        if self._open and self._connections.ask(address) is Answer.COME:
            self._take(_high(sock), address)
        else:
            sock.close()

    def secure(self, context: ssl.SSLContext) -> None:
        """Who connects from now on does so by these certificates. In this loop."""
        self._context = context

    async def wait_closed(self) -> None:
        """Returns at once: connections are counted elsewhere."""

    # -- accepting ---------------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        if self._open:
            self._loop.add_reader(self._socket.fileno(), self._accept)

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._loop.call_later(seconds, self._listen)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            try:
                sock, address = self._next or self._accepted()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                _log.error("no connection can be taken now: %s", error)
                self._pause(NO_DESCRIPTOR_S)
                return
            answer = self._connections.ask(address)
            self._next = (sock, address) if answer is Answer.LATER else None
            if answer is Answer.COME:
                self._take(sock, address)
            elif answer is Answer.REFUSED:
                sock.close()
            else:
                self._pause(FULL_S)
                return

    def _accepted(self) -> tuple[socket.socket, str]:
        sock, peer = self._socket.accept()
        return _high(sock), address_of(peer[0])

    def _take(self, sock: socket.socket, address: str) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError, AttributeError):  # the client has gone already, as reading says; or this is no Linux
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MS)

        def gone(why: str | None = None) -> None:
            if connection in self._waiting:
                self._waiting.remove(connection)
                self._loop.remove_reader(sock.fileno())
                timer.cancel()
                sock.close()
                self._connections.remove(connection)
                if why is not None:
                    self._connections.ended[why] += 1

        def heard() -> None:
            self._loop.remove_reader(sock.fileno())
            self._queue(address, begin)

        def begin() -> None:
            if connection in self._waiting:
                self._waiting.remove(connection)
                timer.cancel()
                self._serve(sock, connection)

        connection = Connection(address, self._loop.time(), gone)
        timer = self._loop.call_later(FIRST_BYTE_S, gone, "handshake")
        self._waiting.add(connection)
        self._connections.add(connection)
        self._loop.add_reader(sock.fileno(), heard)

    # -- handshakes --------------------------------------------------------------------------------------------------------

    def _queue(self, address: str, begin: Callable[[], None]) -> None:
        if not self._ready:
            self._loop.call_soon(self._turn)
        self._ready.setdefault(address, deque()).append(begin)

    def _turn(self) -> None:
        address = next(iter(self._ready))
        waiting = self._ready.pop(address)
        waiting.popleft()()
        if waiting:
            self._ready[address] = waiting  # behind all others
        if self._ready:
            self._loop.call_soon(self._turn)

    def _serve(self, sock: socket.socket, connection: Connection) -> None:
        def made() -> asyncio.Protocol:
            protocol = self._make()
            protocol.connection, protocol.room = connection, self._connections
            return protocol  # type: ignore[return-value]

        async def serve() -> None:
            seconds = FIRST_BYTE_S if self._context is not None else None
            try:
                await self._loop.connect_accepted_socket(made, sock, ssl=self._context, ssl_handshake_timeout=seconds)
            except (OSError, asyncio.CancelledError) as error:  # no TLS, a wrong certificate, too slow, or it made room
                self._connections.remove(connection)
                if isinstance(error, ConnectionAbortedError | TimeoutError):
                    self._connections.ended["handshake"] += 1

        task = self._loop.create_task(serve())
        connection.end = task.cancel  # until the protocol has it
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _high(sock: socket.socket) -> socket.socket:
    """The same connection under a high descriptor; as it is where the process may have none."""
    try:
        high = fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, LOW_DESCRIPTORS)
    except OSError:
        return sock
    sock.close()
    return socket.socket(fileno=high)
