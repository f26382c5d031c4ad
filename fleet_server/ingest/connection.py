"""Keeps an MQTT client connected, in a thread of its own, whatever number its socket has.

paho's own loop waits with select(), which takes no descriptor from 1024 on: a server with many connections would lose its broker
at the next reconnect. This one waits with what the system has for many (epoll, kqueue).
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable

import paho.mqtt.client as mqtt

from fleet_server.ingest.buffered_client import BufferedClient

_log = logging.getLogger(__name__)

TURN_S = 1.0
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.05, 5.0  # the broker is on this machine, and is just being started
LIVED_WELL_S = 10.0  # after this long the next reconnect waits for the shortest time again
GOODBYE_S = 2.0


class Connection:
    """Connects a client that was told where to (`connect_async`), and again whenever the connection is lost, between `start` and
    `stop`. The client's callbacks run in this thread; `publish` and `ack` may be called from any.
    """

    def __init__(self, client: BufferedClient, every_turn: Callable[[], None] = lambda: None) -> None:
        """`every_turn` is called in this thread about once a second, and more often while there is traffic."""
        self._client, self._every_turn = client, every_turn
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mqtt", daemon=True)
        self._ends: tuple[socket.socket, socket.socket] | None = None
        """What is written to the second wakes whoever waits for the first."""
        client.on_socket_register_write = lambda *_: self._wake_up()  # otherwise `publish` writes in its caller's thread

    def start(self) -> None:
        self._ends = socket.socketpair()
        for end in self._ends:
            end.setblocking(False)
        self._thread.start()

    def stop(self) -> None:
        """Says goodbye, if there is a connection, and ends."""
        self._stopping.set()
        self._client.disconnect()
        self._wake_up()
        if self._ends is not None:
            self._thread.join(timeout=2 * GOODBYE_S)
            for end in self._ends:
                end.close()

    def _wake_up(self) -> None:
        if self._ends is not None:
            with contextlib.suppress(OSError):  # there is enough to wake it, or it has ended
                self._ends[1].send(b"\0")

    def _run(self) -> None:
        delay = RECONNECT_MIN_S
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                self._client.reconnect()
                self._converse()
            except OSError as error:  # includes every TLS error
                _log.debug("the broker cannot be reached: %s", error)
            except Exception:  # noqa: BLE001 - this thread must live
                _log.exception("the connection to the broker failed in a way that was not foreseen; connecting again")
            if time.monotonic() - began > LIVED_WELL_S:
                delay = RECONNECT_MIN_S
            self._stopping.wait(delay)
            delay = min(2 * delay, RECONNECT_MAX_S)

    def _converse(self) -> None:
        """One connection until it ends."""
        sock = self._client.socket()
        assert self._ends is not None
        if sock is None:
            return
        woken = self._ends[0]
        wanted, deadline = selectors.EVENT_READ, float("inf")
        with selectors.DefaultSelector() as selector:
            selector.register(woken, selectors.EVENT_READ)
            selector.register(sock, wanted)
            while self._client.socket() is sock and time.monotonic() < deadline:
                wants = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._client.want_write() else 0)
                if wants != wanted:
                    selector.modify(sock, wanted := wants)
                for key, events in selector.select(TURN_S):
                    if key.fileobj is woken:
                        woken.recv(4096)
                    elif events & selectors.EVENT_READ:
                        self._read(sock)
                if self._client.want_write():
                    self._client.loop_write()
                self._client.loop_misc()
                self._every_turn()
                if self._stopping.is_set() and deadline == float("inf"):
                    deadline = time.monotonic() + GOODBYE_S

    def _read(self, sock: mqtt.SocketLike) -> None:
        """All that was taken from the socket: the system does not know of what is decrypted and not read."""
        self._client.loop_read()
        while self._client.socket() is sock and (self._client.has_more or (isinstance(sock, ssl.SSLSocket) and sock.pending())):
            self._client.loop_read()
