"""One port for everything: each connection goes where the first message of its TLS says (ALPN), before anything of it is read.

    mqtt           → the broker
    edge-devices   → the devices' listener, which demands their certificate
    anything else  → the operators' listener: the page, the REST API, enrolment

The handshake is then made with that listener or broker itself, so each demands the certificates that it always demands, and
nothing here has a key. HTTPS connections are handed on as sockets, so that their listener sees the client's address; the broker is
another process, so its bytes are copied.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from agent.contract.addresses import DEVICES, MQTT
from fleet_server.api.accepting import UNREAD_MS
from fleet_server.api.client_hello import MAX_BYTES, offered

_log = logging.getLogger(__name__)

HELLO_WITHIN_S = 10.0
LOOK_AGAIN_S = 0.05
"""Between looks at a first message that has not come whole: its bytes stay in the socket, so the system would say at once that
there are some.
"""
WAITING = 512
"""Connections that have not said where they go; a further one takes the place of the oldest."""
BUFFER_BYTES = 256 * 1024
"""Of one direction, before the other side is no longer read."""
READ_BYTES = 64 * 1024
AT_ONCE = 64
PAUSE_S = 0.5
"""After the process had no descriptor for another connection."""
BROKER_WITHIN_S = 5.0


class HttpsListener(Protocol):
    """Takes a connection whose TLS has not begun. For any thread."""

    def hand(self, sock: socket.socket) -> None: ...


class SharedPort:
    """Listens at one port, in a thread of its own while `run_aside` runs."""

    name = "shared"

    def __init__(
        self, host: str, port: int, operators: HttpsListener, devices: HttpsListener, broker: tuple[str, int], most: int
    ) -> None:
        """`broker` is where this machine reaches it; at most so many connections to it at once (`most`)."""
        self.host, self.port = host, port
        self.started = False
        self.routed: Counter[str] = Counter()
        """Connections by where they went: `operators`, `devices`, `broker`; `silent` went nowhere, `full` found no room."""
        self._https = {"operators": operators, "devices": devices}
        self._broker, self._most = broker, most
        self._stop: Callable[[], object] = lambda: None
        self._waiting: dict[socket.socket, asyncio.TimerHandle] = {}
        self._pairs: set[_Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending = threading.Event()

    @property
    def to_broker(self) -> int:
        """How many connections to the broker go through here now."""
        return len(self._pairs)

    @property
    def should_exit(self) -> bool:
        return self._ending.is_set()

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        if value:
            self._ending.set()
            with contextlib.suppress(RuntimeError):  # it has ended already
                self._stop()

    async def run_aside(self, sock: socket.socket) -> None:
        """Serves until `should_exit` is set.  Raises what ended it."""
        loop = asyncio.get_running_loop()
        ended = loop.create_future()

        def work() -> None:
            error: BaseException | None = None
            try:
                asyncio.run(self._serve(sock))
            except BaseException as raised:  # noqa: BLE001 - whatever ends it ends the server
                error = raised
            with contextlib.suppress(RuntimeError):  # the program ended before
                loop.call_soon_threadsafe(
                    lambda: None if ended.done() else ended.set_exception(error) if error else ended.set_result(None)
                )

        threading.Thread(target=work, name="listener-shared", daemon=True).start()
        await asyncio.shield(ended)

    async def _serve(self, sock: socket.socket) -> None:
        self._loop, stop = asyncio.get_running_loop(), asyncio.Event()
        loop = self._loop
        self._stop = lambda: loop.call_soon_threadsafe(stop.set)
        if self._ending.is_set():
            stop.set()
        sock.setblocking(False)
        self._listen(sock)
        self.started = True
        try:
            await stop.wait()
        finally:
            loop.remove_reader(sock.fileno())
            sock.close()
            for waiting in list(self._waiting):
                self._forget(waiting).close()
            for pair in list(self._pairs):
                pair.end()
            for task in list(self._tasks):
                task.cancel()

    # -- accepting ---------------------------------------------------------------------------------------------------------

    def _listen(self, sock: socket.socket) -> None:
        if not self._ending.is_set():
            self._loop.add_reader(sock.fileno(), self._accept, sock)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(AT_ONCE):
            try:
                sock, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                _log.error("no connection can be taken at the shared port now: %s", error)
                self._loop.remove_reader(listening.fileno())
                self._loop.call_later(PAUSE_S, self._listen, listening)
                return
            sock.setblocking(False)
            with contextlib.suppress(OSError, AttributeError):  # the client has gone already; or this is no Linux
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MS)
            if len(self._waiting) >= WAITING:
                self._give_up(next(iter(self._waiting)))
            self._waiting[sock] = self._loop.call_later(HELLO_WITHIN_S, self._give_up, sock)
            self._loop.add_reader(sock.fileno(), self._look, sock)

    def _forget(self, sock: socket.socket) -> socket.socket:
        self._loop.remove_reader(sock.fileno())
        self._waiting.pop(sock).cancel()
        return sock

    def _give_up(self, sock: socket.socket) -> None:
        self.routed["silent"] += 1
        self._forget(sock).close()

    def _look(self, sock: socket.socket) -> None:
        if sock not in self._waiting:
            return
        try:
            said = sock.recv(MAX_BYTES, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            said = b""
        if not said:
            self._give_up(sock)
            return
        protocols = offered(said)
        if protocols is None:
            self._loop.remove_reader(sock.fileno())
            self._loop.call_later(LOOK_AGAIN_S, self._look, sock)
            return
        self._route(self._forget(sock), protocols)

    def _route(self, sock: socket.socket, protocols: frozenset[str]) -> None:
        if MQTT not in protocols:
            goal = "devices" if DEVICES in protocols else "operators"
            self.routed[goal] += 1
            self._https[goal].hand(sock)
            return
        if len(self._pairs) + len(self._tasks) >= self._most:
            self.routed["full"] += 1
            sock.close()
            return
        self.routed["broker"] += 1
        task = self._loop.create_task(self._join(sock))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _join(self, sock: socket.socket) -> None:
        """Connects a client to the broker, for as long as both stay."""
        try:
            pair = _Pair(self._pairs)
            await asyncio.wait_for(self._loop.create_connection(lambda: pair.broker, *self._broker), BROKER_WITHIN_S)
            await self._loop.connect_accepted_socket(lambda: pair.client, sock)
        except (OSError, asyncio.TimeoutError) as error:
            _log.warning("a connection to the broker by the shared port failed: %s", error)
            sock.close()
            pair.end()


class _Half(asyncio.BufferedProtocol):
    """One end of a pair: what it receives the other one sends."""

    def __init__(self, pair: _Pair) -> None:
        self._pair = pair
        self.transport: asyncio.Transport | None = None
        self.other: _Half

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(BUFFER_BYTES)
        if self.other.transport is None:
            transport.pause_reading()
        else:
            with contextlib.suppress(RuntimeError):
                self.other.transport.resume_reading()

    def get_buffer(self, _sizehint: int) -> memoryview:
        return _SCRATCH

    def buffer_updated(self, count: int) -> None:
        if self.other.transport is not None:
            self.other.transport.write(bytes(_SCRATCH[:count]))

    def pause_writing(self) -> None:
        if self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other.transport is not None:
            self.other.transport.resume_reading()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, _error: Exception | None) -> None:
        self._pair.end()


_SCRATCH = memoryview(bytearray(READ_BYTES))
"""Where every connection of the one thread receives: nothing stays in it between two calls."""


class _Pair:
    """A client and the broker. When one of them goes, so does the other, once what it said has been sent."""

    def __init__(self, pairs: set[_Pair]) -> None:
        self.client, self.broker = _Half(self), _Half(self)
        self.client.other, self.broker.other = self.broker, self.client
        self._pairs = pairs
        pairs.add(self)

    def end(self) -> None:
        self._pairs.discard(self)
        for half in (self.client, self.broker):
            if half.transport is not None:
                half.transport.close()
