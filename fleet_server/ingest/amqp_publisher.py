"""Publishes to devices through a RabbitMQ cluster. What the cluster has not confirmed is published again on the next connection."""

from __future__ import annotations

import collections
import itertools
import logging
import threading
from collections.abc import Callable

import msgspec
import pika
from pika.adapters.select_connection import SelectConnection
from pika.channel import Channel
from pika.frame import Method

from fleet_server.ingest import routing
from fleet_server.ingest.amqp_connection import AmqpConnection

_log = logging.getLogger(__name__)

MOST = 20_000  # messages that wait for a connection or to be confirmed; each is a hint, and beyond that the oldest go
TRANSIENT, PERSISTENT = 1, 2
"""MQTT delivers a persistent message with the quality of service that the device subscribed with, and another with none."""


class Outgoing:
    """A message on its way."""

    def __init__(self, topic: str, payload: bytes, mode: int) -> None:
        self.topic, self.payload, self.mode = topic, payload, mode
        self._done = threading.Event()
        self._lost = False

    def wait_for_publish(self, timeout: float | None = None) -> None:
        """Raises: RuntimeError when the cluster does not confirm it in time."""
        if not self._done.wait(timeout) or self._lost:
            raise RuntimeError("the broker did not confirm a message")

    def end(self, *, lost: bool) -> None:
        """The cluster has it, or it is given up."""
        self._lost = lost
        self._done.set()


class Counts(msgspec.Struct):
    confirmed: int = 0
    dropped: int = 0


class AmqpPublisher:
    """What happens to the connection is told in its thread; `publish` and `send` are for any."""

    def __init__(self, connect: Callable[..., AmqpConnection], on_change: Callable[[bool, str], None]) -> None:
        """`connect` makes the connection from its callbacks; `on_change` is told whether there is one now, and why not."""
        self._connection = connect("edge-fleet-publish", opened=self._opened, lost=self._lost)
        self._on_change = on_change
        self._lock = threading.Lock()
        self._waiting: collections.deque[Outgoing] = collections.deque()
        self._sent: collections.OrderedDict[int, Outgoing] = collections.OrderedDict()
        self._channel: Channel | None = None
        self._number = 0
        self.counts = Counts()

    def start(self) -> None:
        self._connection.start()

    def stop(self) -> None:
        self._connection.stop()

    def publish(self, topic: str, payload: bytes) -> None:
        """Published now, or when there is a connection."""
        with self._lock:
            if len(self._waiting) + len(self._sent) >= MOST:
                self._drop()
            self._waiting.append(Outgoing(topic, payload, PERSISTENT))
        self._connection.call(self._flush)

    def send(self, topic: str, payload: bytes) -> Outgoing:
        """Published now, and delivered at most once.  Raises: RuntimeError when there is no connection."""
        message = Outgoing(topic, payload, TRANSIENT)
        with self._lock:
            if self._channel is None:
                raise RuntimeError("there is no connection to the broker")
            self._waiting.append(message)
        self._connection.call(self._flush)
        return message

    def _drop(self) -> None:
        if self.counts.dropped == 0:
            _log.error("more than %d messages wait for the broker; the oldest are dropped, devices look by themselves", MOST)
        self.counts.dropped += 1
        if self._waiting:
            self._waiting.popleft()
        else:
            self._sent.popitem(last=False)

    # -- in the connection's thread ----------------------------------------------------------------------------------------

    def _opened(self, connection: SelectConnection) -> None:
        connection.channel(on_open_callback=self._usable)

    def _usable(self, channel: Channel) -> None:
        channel.add_on_close_callback(lambda _channel, why: self._connection.give_up(f"the channel was closed: {why}"))
        channel.confirm_delivery(self._confirmed, lambda _frame: self._ready(channel))

    def _ready(self, channel: Channel) -> None:
        with self._lock:
            self._channel, self._number = channel, 0
        self._on_change(True, "")
        self._flush()

    def _lost(self, why: str) -> None:
        with self._lock:
            self._channel = None
            unconfirmed = [*self._sent.values(), *self._waiting]
            self._sent.clear()
            self._waiting = collections.deque(one for one in unconfirmed if one.mode == PERSISTENT)
        for one in unconfirmed:
            if one.mode == TRANSIENT:
                one.end(lost=True)
        self._on_change(False, why)

    def _flush(self) -> None:
        channel = self._channel
        while channel is not None and channel.is_open:
            with self._lock:
                if not self._waiting:
                    return
                message = self._waiting.popleft()
                self._number += 1
                self._sent[self._number] = message
            properties = pika.BasicProperties(delivery_mode=message.mode, content_type="application/json")
            channel.basic_publish(routing.TOPICS, routing.key_of(message.topic), message.payload, properties)

    def _confirmed(self, frame: Method) -> None:
        """The cluster has a message, or all up to it; or it refuses one, which it does when it is about to stop: a hint is lost then."""
        method = frame.method
        with self._lock:
            last = method.delivery_tag
            numbers = list(itertools.takewhile(lambda number: number <= last, self._sent)) if method.multiple else [last]
            found = [one for number in numbers if (one := self._sent.pop(number, None)) is not None]
            self.counts.confirmed += len(found)
        for one in found:
            one.end(lost=False)
