"""Makes the exchanges and queues of `routing` in a RabbitMQ cluster, or finds that they are there, and says how they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import msgspec
import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import AMQPError, ChannelClosedByBroker

from fleet_server.ingest import routing
from fleet_server.ingest.routing import Queue
from fleet_server.sections import RabbitSettings

NOT_FOUND, LOCKED, DIFFERS = 404, 405, 406


class TopologyError(Exception):
    """The cluster cannot be used as it is; the message says what to do."""


class TopologyDiffers(TopologyError):
    """The cluster's queues are others than fleet.yaml says; that does not pass by itself."""


class Depth(msgspec.Struct, frozen=True):
    """How many messages wait in a queue, and how many consumers take them; those that wait for their turn are not counted."""

    messages: int
    consumers: int


def queues_of(settings: RabbitSettings) -> tuple[Queue, ...]:
    return routing.queues(settings.partitions, messages=settings.queue_messages, size_bytes=settings.queue_bytes)


def declare(nodes: Sequence[pika.ConnectionParameters], queues: Sequence[Queue]) -> None:
    """Makes what is missing, by the first of the nodes.

    A queue gets its replicas when it is made, from the nodes that are there then; so the first time all of them have to be there.

    Raises: TopologyError, AMQPError, OSError.
    """
    with pika.BlockingConnection(nodes[0]) as connection:
        if any(depth_of(connection, queue.name) is None for queue in queues):
            _all_together(connection, nodes)
        more = routing.partition(sum(queue.name.startswith(f"{routing.REPORTS}.") for queue in queues))
        if depth_of(connection, more) is not None:
            raise TopologyDiffers(
                f"the cluster has a queue {more}, so fleet.yaml had more broker.rabbitmq.partitions before: set it to that number again. What "
                "is in the queue would never be stored"
            )
        channel = connection.channel()
        channel.exchange_declare(routing.TOPICS, "topic", passive=True)
        try:
            channel.exchange_declare(routing.REPORTS, "x-consistent-hash", durable=True)
        except ChannelClosedByBroker as error:
            raise _differs(f"exchange {routing.REPORTS}", error) from error
        for queue in queues:
            _declare_queue(channel, queue)
        for key in routing.report_keys():  # last: nothing is shared out before all queues are there
            channel.exchange_bind(routing.REPORTS, routing.TOPICS, key)


def _declare_queue(channel: BlockingChannel, queue: Queue) -> None:
    try:
        channel.queue_declare(queue.name, durable=True, arguments=queue.arguments)
    except ChannelClosedByBroker as error:
        raise _differs(f"queue {queue.name}", error) from error
    for exchange, key in queue.bound:
        channel.queue_bind(queue.name, exchange, key)


def _differs(what: str, error: ChannelClosedByBroker) -> TopologyDiffers | ChannelClosedByBroker:
    if error.reply_code != DIFFERS:
        return error
    return TopologyDiffers(
        f"the {what} of the cluster is another than broker.rabbitmq in fleet.yaml says: put the setting back, or stop the server when the "
        f"queue is empty and delete it (rabbitmqctl delete_queue). RabbitMQ says: {error.reply_text}"
    )


def _all_together(first: pika.BlockingConnection, nodes: Sequence[pika.ConnectionParameters]) -> None:
    """`first` is a connection to the first of the nodes.  Raises: TopologyError unless every node answers, and all are of one cluster:
    all know of a queue that one of them has.
    """
    with _channel(first) as channel:
        probe = channel.queue_declare("", exclusive=True).method.queue
        for node in nodes[1:]:
            where = f"{node.host}:{node.port}"
            try:
                knows = _knows(node, probe)
            except (AMQPError, OSError) as error:
                raise TopologyError(
                    f"the queues are made when all {len(nodes)} nodes are there, so that each gets its replicas; {where} is not: {error_text(error)}"
                ) from error
            if not knows:
                raise TopologyError(
                    f"{nodes[0].host}:{nodes[0].port} and {where} are not of one cluster: join them (rabbitmqctl join_cluster), or begin anew: "
                    "start one, and the others when it is up"
                )


def _knows(node: pika.ConnectionParameters, probe: str) -> bool:
    """Whether the node knows of a queue that belongs to another connection.  Raises: AMQPError, OSError."""
    with pika.BlockingConnection(node) as connection, _channel(connection) as channel:
        try:
            channel.queue_declare(probe, passive=True)
        except ChannelClosedByBroker as error:
            return bool(error.reply_code == LOCKED)
    return True


def depth_of(connection: pika.BlockingConnection, queue: str) -> Depth | None:
    """None when there is no such queue.  Raises: AMQPError."""
    with _channel(connection) as channel:
        try:
            found = channel.queue_declare(queue, passive=True).method
        except ChannelClosedByBroker as error:
            if error.reply_code == NOT_FOUND:
                return None
            raise
        return Depth(int(found.message_count), int(found.consumer_count))


@contextlib.contextmanager
def _channel(connection: pika.BlockingConnection) -> Iterator[BlockingChannel]:
    channel = connection.channel()
    try:
        yield channel
    finally:
        if channel.is_open:
            channel.close()


def error_text(error: BaseException) -> str:
    """In words: those of the library often have none of their own."""
    return str(error) or type(error).__name__
