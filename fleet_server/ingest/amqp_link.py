"""The server's link to a RabbitMQ cluster: stores what devices say, in batches, and publishes what they are sent.

Devices speak MQTT to any node; what they report waits in replicated queues (`routing`), each read by one process at a time, in order. A
message is acknowledged after it is stored. When this process or its node dies, what was not acknowledged is delivered again, to it or to
another one, and what was stored by then is recognised (counters, sessions, event ids). When the database stores nothing, the queues
keep what comes; when they are full devices are refused, and keep it themselves.

One that floods is paused: what comes of it is dropped until it is off the broker, and while the pause lasts.
"""

from __future__ import annotations

import collections
import logging
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pika
from pika.adapters.select_connection import SelectConnection
from pika.channel import Channel

from agent.contract import topics
from agent.contract.addresses import split
from agent.contract.reports import MAX_REPORT_BYTES
from fleet_server.devices import pki
from fleet_server.ingest import topology
from fleet_server.ingest.amqp_connection import AmqpConnection, parameters
from fleet_server.ingest.amqp_publisher import AmqpPublisher
from fleet_server.ingest.flood import FloodWatch
from fleet_server.ingest.intake import Dropped, Intake, Message
from fleet_server.ingest.partitions import Partition, Partitions
from fleet_server.ingest.reported import Changes
from fleet_server.ingest.transfers import TransferAnswers
from fleet_server.sections import RabbitSettings

_log = logging.getLogger(__name__)

BATCH = 1024
FEW, REST_S, REST_SHARE = 64, 0.05, 4.0  # as MqttLink rests after a batch of few
RETRY_S = 1.0
LARGEST_BYTES = 2 * MAX_REPORT_BYTES  # nothing that counts is larger: base64 and the signature around it


class Received(msgspec.Struct):
    """A message with what acknowledges it; without a message it does not count and is only acknowledged."""

    partition: Partition
    channel: Channel
    tag: int
    message: Message | None


class AmqpLink:
    """Runs two connections and a worker that stores, each in a thread of its own, between `start` and `stop`."""

    def __init__(
        self, settings: RabbitSettings, authority: pki.Authority, intake: Intake, on_models: Callable[[set[str]], None],
        transfers: TransferAnswers | None = None, *, stores: bool = True,
    ) -> None:  # fmt: skip
        """`transfers` answers the devices that ask for documents and blobs. Without `stores` it only publishes."""
        self._settings, self._authority, self._intake, self._on_models = settings, authority, intake, on_models
        self._transfers, self._stores = transfers, stores
        self._nodes = [split(node.amqp) for node in settings.nodes]
        self._context = ssl.create_default_context(cafile=str(authority.trusted_path))
        self.renew()
        self._queues = topology.queues_of(settings)
        self.flood = FloodWatch(time.monotonic)
        self.on_flood: Callable[[str, float], None] = lambda _device, _pause_s: None
        self.on_paused: Callable[[str], None] = lambda _device: None
        """Told that something came of a device that is paused: it is still connected, or what it sent was still on its way."""
        self.on_arrived: Callable[[set[str]], None] = lambda _devices: None
        self.on_connected: Callable[[], None] = lambda: None
        self.connected = threading.Event()
        self.problem = ""
        self.hopeless = False
        """Whether a person must do something before it can connect."""
        self._connected_at = 0.0
        self._up = {"reading": not stores, "publishing": False}
        self._publisher = AmqpPublisher(self._connection, lambda up, why: self._is_up("publishing", up, why))
        self._reader = self._connection("edge-fleet-ingest", opened=self._opened, lost=self._lost)
        self.partitions = Partitions(settings.partitions, self._reader, self._take, self._asked)
        self._waiting: collections.deque[Received] = collections.deque()
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._worker = threading.Thread(target=self._work, name="ingest", daemon=True)

    def _connection(self, name: str, **callbacks: Any) -> AmqpConnection:
        return AmqpConnection(name, self._nodes, self._settings.vhost, self._context, prepare=self._prepare, **callbacks)

    def _prepare(self, node: pika.ConnectionParameters) -> None:
        """Makes the queues before anything goes through them."""
        others = [one for one in self._nodes if one != (node.host, node.port)]
        rest = [parameters(one, self._settings.vhost, self._context, "edge-fleet-topology") for one in others]
        try:
            topology.declare([node, *rest], self._queues)
        except topology.TopologyDiffers:
            self.hopeless = True
            raise

    def renew(self) -> None:
        self._context.load_verify_locations(self._authority.trusted_path)
        self._context.load_cert_chain(self._authority.client_cert, self._authority.client_key)

    def start(self) -> None:
        self._publisher.start()
        if self._stores:
            self._worker.start()
            self._reader.start()
        if self._transfers is not None:
            self._transfers.start(self._publisher.send)

    def stop(self) -> None:
        if self._transfers is not None:
            self._transfers.stop()
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        if self._worker.ident is not None:
            self._worker.join(timeout=10)  # what it has stored is acknowledged before the connection ends
        if self._stores:
            self._reader.stop()
        self._publisher.stop()

    def heard_since(self) -> float:
        return self._connected_at if self.connected.is_set() else time.time()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Nothing is kept for who subscribes later, as nodes do not share what they keep: see `on_arrived`."""
        del retain
        self._publisher.publish(topic, payload)

    # -- the connections ---------------------------------------------------------------------------------------------------

    def _opened(self, connection: SelectConnection) -> None:
        self.partitions.open(connection, lambda: self._is_up("reading", True))

    def _lost(self, why: str) -> None:
        self.partitions.closed()
        self._is_up("reading", False, why)

    def _is_up(self, what: str, up: bool, why: str = "") -> None:
        with self._changed:
            self._up[what] = up
            now, before = all(self._up.values()), self.connected.is_set()
            first, self.problem = not self.problem, why or self.problem
        if now and not before:
            _log.info("connected to the broker")
            self._connected_at, self.problem = time.time(), ""
            self.connected.set()
            try:
                self.on_connected()
            except Exception:  # noqa: BLE001 - the thread must go on
                _log.exception("what follows a connection to the broker failed")
        elif before and not now:
            _log.warning("lost the broker (%s); connecting again", why)
            self.connected.clear()
        elif why and first:  # an outage is a line, not one for each attempt
            _log.warning("the broker cannot be used: %s", why)

    # -- from devices ------------------------------------------------------------------------------------------------------

    def _asked(self, message: Message) -> None:
        where = topics.parse_up(message.topic)
        if where is not None and self._transfers is not None and not self._is_flood(where[0], message):
            self._transfers.ask(where[0], message.payload)

    def _take(self, partition: Partition, channel: Channel, tag: int, message: Message) -> None:
        where = topics.parse_up(message.topic)
        counts: Message | None = message
        if where is not None and self._is_flood(where[0], message):
            counts = None
        elif len(message.payload) > LARGEST_BYTES:
            said = f"a message of {len(message.payload)} bytes; at most {LARGEST_BYTES} are read"
            self._intake.drop(message.topic, Dropped("too_large", said))
            counts = None
        with self._changed:
            self._waiting.append(Received(partition, channel, tag, counts))
            if len(self._waiting) == 1:
                self._changed.notify_all()

    def _is_flood(self, device: str, message: Message) -> bool:
        """Whether the message is one too many; it is dropped then."""
        paused, begins_s = self.flood.is_paused(device, len(message.payload))
        if paused:
            self._intake.drop(message.topic, Dropped("flood", f"{device!r} sends too much; it is paused"))
        if begins_s:
            self.on_flood(device, begins_s)
        elif paused:
            self.on_paused(device)
        return paused

    def _work(self) -> None:
        while not self._stopping.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping.is_set())
                batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            began = time.monotonic()
            self.store(batch)
            if len(batch) < FEW:
                self._stopping.wait(min(REST_S, REST_SHARE * (time.monotonic() - began)))

    def store(self, batch: list[Received]) -> None:
        """Stores a batch, however often that must be tried, acknowledges it, and lets the rollouts be judged that it concerns.
        Until `stop`, or until the cluster delivers the batch to another.
        """
        batch = [item for item in batch if item.channel.is_open]
        changes = self._stored(batch)
        if changes is None:
            return
        self._acknowledge(batch)
        if changes.arrived:
            self.on_arrived(changes.arrived)
        try:
            if changes.models:
                self._on_models(changes.models)
        except Exception:  # noqa: BLE001 - the thread must go on
            _log.exception("rollouts could not be judged; the next tick tries again")

    def _stored(self, batch: list[Received]) -> Changes | None:
        """What the intake made of the batch; None when it is not stored, and not this process's to store any more."""
        failures = 0
        while True:
            messages = [item.message for item in batch if item.message is not None]
            if not messages:
                return Changes()
            try:
                return self._intake.store(messages)
            except Exception:  # noqa: BLE001 - the database fails as a whole, the messages are not to blame
                failures += 1
                if failures == 1:
                    _log.exception("%d messages cannot be stored; trying until they can", len(batch))
            if self._stopping.wait(RETRY_S) or not any(item.channel.is_open for item in batch):
                return None

    def _acknowledge(self, batch: list[Received]) -> None:
        """Messages of a channel are stored in the order they came in, so the last one speaks for all before it."""
        last: dict[int, Received] = {}
        counts: collections.Counter[int] = collections.Counter()
        for item in batch:
            last[id(item.channel)] = item
            counts[id(item.channel)] += 1
        for key, item in last.items():
            self._reader.call(lambda item=item, count=counts[key]: self._done(item, count))  # type: ignore[misc]

    def _done(self, item: Received, count: int) -> None:
        self.partitions.done(item.partition, item.channel, item.tag, count)
