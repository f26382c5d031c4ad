"""The server's own MQTT client: stores what devices send, in batches, and publishes what they are sent.

A message is acknowledged to the broker after it is stored, so a crash of the server loses none: the broker keeps the session
and delivers again, and everything that is delivered twice is recognised (counters, sessions, event ids). When the database
stores nothing (a full disk), the batch waits here and is tried again, because a broker delivers again only after a reconnect.

The exception is a device with more than SHARE messages waiting: its are acknowledged on arrival. Otherwise they would fill the
broker's window of unacknowledged messages, and everybody else's would wait, or be lost, behind them. One that floods is paused:
what comes of it is acknowledged and dropped until it is off the broker, and while the pause lasts.

Nothing stays retained at the broker: what a device retains is seen here, and cleared there.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, get_args

import msgspec
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from agent.contract import topics
from fleet_server.devices import pki
from fleet_server.ingest.buffered_client import BufferedClient
from fleet_server.ingest.connection import Connection
from fleet_server.ingest.fair_queue import FairQueue, Room
from fleet_server.ingest.flood import FloodWatch
from fleet_server.ingest.intake import Dropped, Intake, Message
from fleet_server.ingest.reported import Changes
from fleet_server.ingest.transfers import TransferAnswers

_log = logging.getLogger(__name__)

BATCH = 1024  # one transaction for what came together: a commit costs as much as storing dozens of reports
FEW, REST_S, REST_SHARE = 64, 0.05, 4.0
"""After a batch of few the next one is let grow: for so many times as long as the batch took, and no longer than `REST_S`. So few
messages cost little, and the first one after a quiet time waits for nothing. After a larger one nothing rests: what the server leaves
of the processors, a device that floods takes.
"""
SHARE = 100  # small beside the window of unacknowledged messages that the broker's configuration allows
LIMIT, LIMIT_BYTES = 5000, 32 * 1024 * 1024  # of one device: an agent that was away for days sends 2000 messages, 16 MiB
CROWD_BYTES = 128 * 1024 * 1024  # of all devices together, beyond which nobody has more than its share
WINDOW = 65535
"""Messages that the broker may send before the first is acknowledged: all that MQTT can number. The broker drops what has room
neither there nor in its queue.
"""
RETRY_S = 1.0
SESSION_EXPIRY_S = 7 * 86400
CONTROL = "$CONTROL/dynamic-security/v1"
CONTROL_ANSWERS = f"{CONTROL}/response"
"""How the broker's plug-in is spoken to that knows who is shut out."""
KEEPALIVE_S = 30


class Received(msgspec.Struct):
    """A message with what acknowledges it: the number it has on this connection to the broker."""

    message: Message
    mid: int
    qos: int
    connection: int
    acknowledged: bool = False


class MqttLink:
    """Runs two threads between `start` and `stop`: the connection's, and the worker that stores."""

    def __init__(
        self,
        authority: pki.Authority,
        host: str,
        port: int,
        intake: Intake,
        on_models: Callable[[set[str]], None],
        transfers: TransferAnswers | None = None,
    ) -> None:
        """`transfers` answers the devices that ask for documents and blobs."""
        self._transfers = transfers
        self._intake, self._on_models = intake, on_models
        self._waiting: FairQueue[Received] = FairQueue(
            share=SHARE, limit=LIMIT, limit_bytes=LIMIT_BYTES, crowd_bytes=CROWD_BYTES
        )
        self.flood = FloodWatch(time.monotonic)
        self.on_flood: Callable[[str, float], None] = lambda _device, _pause_s: None
        """Told once that a device floods, and for how many seconds it is paused. Must not block."""
        self.on_answer: Callable[[bytes], None] = lambda _payload: None
        """Given what the broker's own control answers. Must not block."""
        self.on_arrived: Callable[[set[str]], None] = lambda _devices: None
        """Not called: this broker keeps the last poke to all for whoever comes."""
        self.problem = ""
        self._retained: set[str] = set()
        self._stopping = threading.Event()
        self._worker = threading.Thread(target=self._work, name="ingest", daemon=True)
        self._number = 0  # of the present connection
        self.connected = threading.Event()
        """Set while the subscription is acknowledged: messages of devices arrive."""
        self.on_connected: Callable[[], None] = lambda: None
        self._connected_at = 0.0
        self._retains = True
        self._client = self._make_client(authority)
        self._connection = Connection(self._client, self._clear_retained)
        self._address = (host, port)

    def _make_client(self, authority: pki.Authority) -> BufferedClient:
        client = BufferedClient(CallbackAPIVersion.VERSION2, pki.SERVER_CN, protocol=mqtt.MQTTv5, manual_ack=True)
        self._authority, self._context = authority, ssl.create_default_context(cafile=str(authority.trusted_path))
        self.renew()
        client.tls_set_context(self._context)
        client.on_connect, client.on_disconnect = self._on_connect, self._on_disconnect
        client.on_subscribe, client.on_message = self._on_subscribe, self._on_message
        return client

    def renew(self) -> None:
        """Shows the broker the certificate that is on the disk, and believes the CAs there, from the next connection on. A CA that
        is believed no more is forgotten with this process only: the broker is the server's own, and shows no certificate of it.
        """
        self._context.load_verify_locations(self._authority.trusted_path)
        self._context.load_cert_chain(self._authority.client_cert, self._authority.client_key)

    def start(self) -> None:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = SESSION_EXPIRY_S
        properties.ReceiveMaximum = WINDOW
        self._client.connect_async(*self._address, keepalive=KEEPALIVE_S, clean_start=False, properties=properties)
        self._worker.start()
        self._connection.start()
        if self._transfers is not None:
            self._transfers.start(lambda topic, payload: self._client.publish(topic, payload, qos=0))

    def stop(self) -> None:
        if self._transfers is not None:
            self._transfers.stop()
        self._connection.stop()
        self._stopping.set()
        self._waiting.close()
        if self._worker.ident is not None:
            self._worker.join(timeout=10)

    def heard_since(self) -> float:
        """Since when messages of devices arrive; now while they do not."""
        return self._connected_at if self.connected.is_set() else time.time()

    # -- towards devices ---------------------------------------------------------------------------------------------------

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """`retain`: the broker keeps it for who subscribes later, if it keeps anything."""
        self._client.publish(topic, payload, qos=1, retain=retain and self._retains)

    def command(self, payload: bytes) -> None:
        """Tells the broker itself something; `on_answer` gets what it says to that."""
        self._client.publish(CONTROL, payload, qos=1)

    def clear(self, device: str) -> None:
        """Clears whatever the broker retains of a device."""
        for what in get_args(topics.Upward):
            self._client.publish(topics.up(device, what), b"", qos=1, retain=True)

    def _clear_retained(self) -> None:
        while self._retained and self.connected.is_set():
            self._client.publish(self._retained.pop(), b"", qos=0, retain=True)

    # -- from devices ------------------------------------------------------------------------------------------------------

    def _on_connect(self, client: mqtt.Client, _data: Any, _flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            _log.error("the broker refuses the server: %s", reason)
            return
        self._number += 1
        self._retains = getattr(properties, "RetainAvailable", 1) != 0
        # Not what is published here (noLocal), and what is retained says so also when it is new.
        own = SubscribeOptions(qos=1, noLocal=True, retainAsPublished=True)
        client.subscribe([(topics.UP_FILTER, own), (CONTROL_ANSWERS, SubscribeOptions(qos=1))])

    def _on_subscribe(self, _client: mqtt.Client, _data: Any, _mid: int, reasons: Any, _properties: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            _log.error("the broker refuses the subscription to %s: %s", topics.UP_FILTER, reasons)
            return
        _log.info("connected to the broker")
        self._connected_at = time.time()
        self.connected.set()
        try:
            self.on_connected()
        except Exception:  # noqa: BLE001 - the thread must go on
            _log.exception("what follows a connection to the broker failed")

    def _on_disconnect(self, _client: mqtt.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if self.connected.is_set() and reason.is_failure:
            _log.warning("lost the broker (%s); connecting again", reason)
        self.connected.clear()

    def _on_message(self, _client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""
        item = Received(Message(topic, bytes(message.payload)), message.mid, message.qos, self._number)
        if topic == CONTROL_ANSWERS:
            self._acknowledge(item)
            self.on_answer(item.message.payload)
            return
        if message.retain and item.message.payload:
            self._retained.add(topic)
        where = topics.parse_up(topic)
        if where is not None and self._is_flood(where[0], item):
            return
        if where is not None and where[1] == "blocks":
            self._acknowledge(item)
            if self._transfers is not None:
                self._transfers.ask(where[0], item.message.payload)
            return
        room = self._waiting.put(where[0] if where else "", item, len(item.message.payload))
        if room is Room.FULL:
            self._intake.drop(topic, Dropped("flood", f"more than {LIMIT} messages or {LIMIT_BYTES} bytes of one device wait"))
        if room is not Room.WAITS:
            self._acknowledge(item)

    def _is_flood(self, device: str, item: Received) -> bool:
        """Whether the message is one too many; it is dropped then."""
        paused, begins_s = self.flood.is_paused(device, len(item.message.payload))
        if paused:
            self._acknowledge(item)
            self._intake.drop(item.message.topic, Dropped("flood", f"{device!r} sends too much; it is paused"))
        if begins_s:
            self.on_flood(device, begins_s)
        return paused

    def _work(self) -> None:
        while batch := self._waiting.take(BATCH):
            began = time.monotonic()
            self.store(batch)
            if len(batch) < FEW:
                self._stopping.wait(min(REST_S, REST_SHARE * (time.monotonic() - began)))

    def store(self, batch: list[Received]) -> None:
        """Stores a batch, however often that must be tried, acknowledges it, and lets the rollouts be judged that it concerns.
        Until `stop`.
        """
        changes = self._stored(batch)
        if changes is None:
            return
        for item in batch:
            self._acknowledge(item)
        try:
            if changes.models:
                self._on_models(changes.models)
        except Exception:  # noqa: BLE001 - the thread must go on
            _log.exception("rollouts could not be judged; the next tick tries again")

    def _stored(self, batch: list[Received]) -> Changes | None:
        """What the intake made of the batch, tried until it can be stored; None when the server stops before."""
        failures = 0
        while True:
            try:
                return self._intake.store([item.message for item in batch])
            except Exception:  # noqa: BLE001 - the database fails as a whole, the messages are not to blame
                failures += 1
                if failures == 1:
                    _log.exception("%d messages cannot be stored; trying until they can", len(batch))
            if self._stopping.wait(RETRY_S):
                return None

    def _acknowledge(self, item: Received) -> None:
        """Once, and only on the connection it came on: on another one the number means another message."""
        if not item.acknowledged and item.connection == self._number:
            self._client.ack(item.mid, item.qos)
        item.acknowledged = True
