"""The report queues that this process reads, and giving some of them to others.

Every process has one consumer in each queue, and the cluster lets one consumer of each work: the one that waited longest. When a process
dies, its queues go to others by themselves. So that one which came later gets its share, a process that works on more queues than its
share lets go of one at a time: it takes nothing more of it, acknowledges what it has stored, closes the channel, and waits behind the
others.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import pika
from pika.adapters.select_connection import SelectConnection
from pika.channel import Channel

from fleet_server.ingest import routing
from fleet_server.ingest.amqp_connection import AmqpConnection, close
from fleet_server.ingest.intake import Message

_log = logging.getLogger(__name__)

PREFETCH = 256
"""Messages of one queue that this process has and did not acknowledge yet: enough for a batch, and bounded, as each may have a MiB."""
SHARES_S, BACK_AFTER_S = 2.0, 0.5
IN_VAIN_S, REST_S = 10.0, 30.0
"""A queue that was left and is back after less than IN_VAIN_S found nobody else: the cluster counts consumers of a node that died for a
while. Then none is left for REST_S.
"""


class Partition:
    """One queue's consumer. All of it belongs to the connection's thread, but for `channel`, which others may look at."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.channel: Channel | None = None
        self.works = False
        """Whether something was delivered since it was opened: it is this process that works on the queue."""
        self.in_hand = 0
        """Messages that are being stored, or wait for that."""
        self.leaving = False
        self.left_at = -math.inf


Take = Callable[[Partition, Channel, int, Message], None]


class Partitions:
    """For one connection at a time; in its thread."""

    def __init__(self, count: int, connection: AmqpConnection, take: Take, on_asked: Callable[[Message], None]) -> None:
        """`take` gets each report with what acknowledges it; `on_asked` what devices ask for."""
        self._all = [Partition(number) for number in range(count)]
        self._connection, self._take, self._on_asked = connection, take, on_asked
        self._present: SelectConnection | None = None
        self._on_ready: Callable[[], None] = lambda: None
        self._missing: set[str] = set()
        self._rests_until = -math.inf

    @property
    def worked_on(self) -> list[int]:
        """The queues that this process works on, as far as it can tell: those of which something came."""
        return [one.number for one in self._all if one.works and not one.leaving]

    def open(self, connection: SelectConnection, on_ready: Callable[[], None]) -> None:
        """Begins to read every queue; `on_ready` is called once when all are read, or waited for."""
        self._present, self._on_ready = connection, on_ready
        self._missing = {routing.ASKS, *(routing.partition(one.number) for one in self._all)}
        for one in self._all:
            self._open(one)
        connection.channel(on_open_callback=self._read_asks)
        self._connection.later(SHARES_S, lambda: self._count(connection))

    def closed(self) -> None:
        """The connection is gone, and with it what was not acknowledged."""
        self._present = None
        for one in self._all:
            one.channel, one.works, one.in_hand, one.leaving = None, False, 0, False

    def done(self, partition: Partition, channel: Channel, tag: int, count: int) -> None:
        """So many messages up to this one are stored, or do not count."""
        present = partition.channel
        if present is None or present is not channel or not present.is_open:
            return
        present.basic_ack(tag, multiple=True)
        partition.in_hand -= count
        self._leave(partition)

    # -- reading -----------------------------------------------------------------------------------------------------------

    def _open(self, one: Partition) -> None:
        if self._present is not None and self._present.is_open:
            self._present.channel(on_open_callback=lambda channel: self._read(one, channel))

    def _read(self, one: Partition, channel: Channel) -> None:
        one.channel, one.works, one.in_hand, one.leaving = channel, False, 0, False
        queue = routing.partition(one.number)
        channel.add_on_close_callback(lambda _channel, why: self._channel_closed(one, why))
        channel.add_on_cancel_callback(lambda _frame: self._connection.give_up(f"{queue} cannot be read now"))
        channel.basic_qos(prefetch_count=PREFETCH)
        channel.basic_consume(
            queue, lambda *got: self._received(one, *got), callback=lambda _frame: self._reads(queue)
        )  # fmt: skip

    def _read_asks(self, channel: Channel) -> None:
        channel.add_on_close_callback(lambda _channel, why: self._connection.give_up(f"{routing.ASKS} cannot be read: {why}"))
        channel.add_on_cancel_callback(lambda _frame: self._connection.give_up(f"{routing.ASKS} cannot be read now"))
        channel.basic_qos(prefetch_count=PREFETCH)
        channel.basic_consume(routing.ASKS, self._asked, callback=lambda _frame: self._reads(routing.ASKS))

    def _reads(self, queue: str) -> None:
        if self._missing:
            self._missing.discard(queue)
            if not self._missing:
                self._on_ready()

    def _received(self, one: Partition, channel: Channel, method: Any, _properties: pika.BasicProperties, body: bytes) -> None:
        if one.leaving or one.channel is not channel:
            return  # it is delivered to the next
        if not one.works and time.monotonic() - one.left_at < IN_VAIN_S:
            self._rests_until = time.monotonic() + REST_S
        one.works = True
        one.in_hand += 1
        self._take(one, channel, method.delivery_tag, Message(routing.topic_of(method.routing_key), body))

    def _asked(self, channel: Channel, method: Any, _properties: pika.BasicProperties, body: bytes) -> None:
        channel.basic_ack(method.delivery_tag)
        self._on_asked(Message(routing.topic_of(method.routing_key), body))

    def _channel_closed(self, one: Partition, why: Exception) -> None:
        expected = one.leaving
        one.channel, one.works, one.in_hand, one.leaving = None, False, 0, False
        if expected:
            one.left_at = time.monotonic()
            self._connection.later(BACK_AFTER_S, lambda: self._open(one))
        else:
            self._connection.give_up(f"{routing.partition(one.number)} cannot be read: {why}")

    # -- shares ------------------------------------------------------------------------------------------------------------

    def _count(self, connection: SelectConnection) -> None:
        """Asks how many processes read: each reads what devices ask for. Of a queue's consumers the cluster counts only the one that
        works.
        """
        if connection is not self._present:
            return
        self._connection.later(SHARES_S, lambda: self._count(connection))
        mine = self.worked_on
        channel = next((one.channel for one in self._all if one.channel is not None and one.channel.is_open), None)
        if len(mine) > 1 and channel is not None and time.monotonic() > self._rests_until:
            channel.queue_declare(routing.ASKS, passive=True, callback=lambda frame: self._share(frame.method.consumer_count))

    def _share(self, processes: int) -> None:
        mine = self.worked_on
        if len(mine) > math.ceil(len(self._all) / max(1, processes)):
            one = self._all[mine[-1]]
            _log.info("%d processes store reports: this one leaves queue %d to another", processes, one.number)
            one.leaving = True
            self._leave(one)

    @staticmethod
    def _leave(one: Partition) -> None:
        if one.leaving and one.in_hand <= 0 and one.channel is not None and one.channel.is_open:
            close(one.channel)
