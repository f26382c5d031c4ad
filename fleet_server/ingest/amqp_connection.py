"""Keeps an AMQP connection to one node of a cluster, in a thread of its own, and goes to the next node when that goes."""

from __future__ import annotations

import contextlib
import logging
import ssl
import threading
import time
from collections.abc import Callable, Sequence

import pika
from pika.adapters.select_connection import SelectConnection
from pika.channel import Channel
from pika.credentials import ExternalCredentials

_log = logging.getLogger(__name__)
logging.getLogger("pika").setLevel(logging.CRITICAL)  # it tells each failure seven times; whoever connects here is told it once

HEARTBEAT_S = 10  # a node that says nothing for twice as long is given up
SOCKET_S, OPEN_S = 5.0, 10.0
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.05, 5.0
LIVED_WELL_S = 10.0  # after this long the next reconnect waits for the shortest time again
ENDS_S = 5.0

Node = tuple[str, int]
"""Host and port."""


def parameters(node: Node, vhost: str, context: ssl.SSLContext, name: str) -> pika.ConnectionParameters:
    """How to connect: who this is, the certificate says."""
    return pika.ConnectionParameters(
        host=node[0], port=node[1], virtual_host=vhost, credentials=ExternalCredentials(),
        ssl_options=pika.SSLOptions(context, node[0]), heartbeat=HEARTBEAT_S, socket_timeout=SOCKET_S, stack_timeout=OPEN_S,
        blocked_connection_timeout=None, connection_attempts=1, client_properties={"connection_name": name},
    )  # fmt: skip


class AmqpConnection:
    """Between `start` and `stop` there is a connection whenever a node lets there be one. `prepare` and the callbacks run in the
    thread; `call` is for any.
    """

    def __init__(
        self, name: str, nodes: Sequence[Node], vhost: str, context: ssl.SSLContext, *,
        prepare: Callable[[pika.ConnectionParameters], None], opened: Callable[[SelectConnection], None],
        lost: Callable[[str], None],
    ) -> None:  # fmt: skip
        """`prepare` is called before each connection and may raise what says why there can be none; `opened` gets each connection,
        `lost` why one ended or was not made.
        """
        self._name, self._nodes, self._vhost, self._context = name, list(nodes), vhost, context
        self._prepare, self._opened, self._lost = prepare, opened, lost
        self._connection: SelectConnection | None = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._why = ""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the connection, in order where the node answers."""
        self._stopping.set()
        self.call(self._end)
        if self._thread.ident is not None:
            self._thread.join(ENDS_S)

    def call(self, work: Callable[[], None]) -> None:
        """Has the work done in the thread soon; not at all when the present connection ends before."""
        with self._lock:
            if self._connection is not None:
                self._connection.ioloop.add_callback_threadsafe(work)

    def later(self, seconds: float, work: Callable[[], None]) -> None:
        """The same after a time. In the thread."""
        if self._connection is not None:
            self._connection.ioloop.call_later(seconds, work)

    def give_up(self, why: str) -> None:
        """Ends the present connection, which does not do what it is for; the next is made with another node. In the thread."""
        self._why = why
        if self._connection is not None and self._connection.is_open:
            _close(self._connection)

    def _end(self) -> None:
        connection = self._connection
        if connection is not None and not (connection.is_closing or connection.is_closed):
            with contextlib.suppress(Exception):  # half made: the thread ends it
                _close(connection)

    def _run(self) -> None:
        delay, turn = RECONNECT_MIN_S, 0
        while not self._stopping.is_set():
            node = self._nodes[turn % len(self._nodes)]
            began, self._why = time.monotonic(), ""
            try:
                found = parameters(node, self._vhost, self._context, self._name)
                self._prepare(found)
                self._converse(found)
            except Exception as error:  # noqa: BLE001 - the thread must live; pika raises what the node and the socket do
                self._why = self._why or str(error) or type(error).__name__
            if self._stopping.is_set():
                break
            self._lost(f"node {node[0]}:{node[1]}: {self._why}")
            turn += 1
            if time.monotonic() - began > LIVED_WELL_S:
                delay = RECONNECT_MIN_S
            self._stopping.wait(delay)
            delay = min(2 * delay, RECONNECT_MAX_S)

    def _converse(self, found: pika.ConnectionParameters) -> None:
        """One connection until it ends."""
        connection = SelectConnection(
            found, on_open_callback=self._opened, on_open_error_callback=self._ended, on_close_callback=self._ended
        )
        with self._lock:
            self._connection = connection
        try:
            if not self._stopping.is_set():
                connection.ioloop.start()
        finally:
            with self._lock:
                self._connection = None
            if not connection.is_closed:
                _abandon(connection)
            connection.ioloop.close()

    def _ended(self, connection: SelectConnection, why: BaseException | str) -> None:
        self._why = self._why or str(why) or type(why).__name__
        connection.ioloop.stop()


def close(channel: Channel) -> None:
    """Closes the channel, and leaves its consumers to end with it.

    The library cancels them first. With that the cluster turns to the next consumer, and gives it what came later before it takes
    back what this one has not acknowledged.
    """
    channel._cancelled.update(channel._consumers)  # noqa: SLF001 - there is no other way
    channel.close()


def _close(connection: SelectConnection) -> None:
    """The same for all channels of a connection."""
    for channel in connection._channels.values():  # noqa: SLF001
        channel._cancelled.update(channel._consumers)  # noqa: SLF001
    connection.close()


def _abandon(connection: SelectConnection) -> None:
    """Closes the socket of a connection whose loop is left by an error."""
    transport = getattr(connection, "_transport", None)
    with contextlib.suppress(Exception):
        if transport is not None:
            transport.abort()
