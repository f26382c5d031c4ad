"""The MQTT link: pokes come in, what is in the outbox goes out, presence says that this device is there.

It owns one thread. A broker that is away, slow or refuses delays reports and nothing else. paho keeps its session in memory
only, so the outbox stays the truth: a message leaves it when the broker has acknowledged it, and not before.
"""

from __future__ import annotations

import collections
import logging
import math
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, LogLevel, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from agent.contract import topics
from agent.contract.addresses import MQTT
from agent.contract.codec import encode
from agent.contract.reports import Presence
from agent.sync import refusals
from agent.sync.fleet.outbox import Item
from agent.sync.fleet.protocol import ProtocolChoice, asks_again_after_s, poke_qos
from agent.sync.proxy import DIRECT, Way

log = logging.getLogger(__name__)

KEEPALIVE_S = 60
CONNECT_TIMEOUT_S = 10.0
LOOP_S = 0.5
"""How long the loop sleeps when nothing arrives; also the longest a new message waits. Two wake-ups a second cost nothing
measurable."""

BUSY_LOOP_S = 0.02
"""The same while a transfer is under way, which asks for its next parts."""

CONNACK_TIMEOUT_S = 15.0
FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 120.0
STEADY_AFTER_S = 10.0
"""A connection that lasted this long ends an outage; one that is thrown out sooner belongs to it (two devices with one
identity, say)."""

IN_FLIGHT = 10
"""Below the receive maximum that brokers offer (mosquitto: 20)."""

SILENCE_S = 30.0
"""When nothing of what waits for the broker's word was acknowledged for so long, the connection is given up, and all of it sent
again on the next one. Else a broker that lost IN_FLIGHT messages, and kept the connection, would hear nothing of this device
any more."""

SESSION_TAKEN_OVER = 0x8E
"""Said by some brokers of MQTT 5; mosquitto 2.0 and all of 3.1.1 close the connection without a word."""

SESSION_EXPIRY_S = 0
"""No session at the broker: pokes are hints, and everything else is in our outbox."""


class Drain(Protocol):
    """Where outgoing messages come from."""

    def first(self, count: int, after: int = 0) -> list[Item]: ...

    def delivered(self, item: int) -> None: ...


class Broker(msgspec.Struct, frozen=True):
    """Where the broker is, and what proves who we are."""

    host: str
    port: int
    tls: Callable[[], ssl.SSLContext]
    """Made anew for each connection, so that a renewed certificate is used."""
    way: Way = DIRECT


class _Client(mqtt.Client):
    """Connects by the way it is given."""

    def __init__(self, way: Way, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._way = way

    def _create_socket_connection(self) -> socket.socket:
        return self._way.connect(self._host, self._port, self._connect_timeout)


class Link:
    """Keeps connected for as long as it runs."""

    def __init__(
        self,
        device: str,
        broker: Broker,
        outbox: Drain,
        next_session: Callable[[], int],
        on_poke: Callable[[bytes, bool], None],
        on_change: Callable[[bool], None] = lambda _: None,
        jitter: Callable[[], float] = random.random,
        on_delivered: Callable[[int], None] = lambda _: None,
        on_blocks: Callable[[str, bytes], None] = lambda _id, _payload: None,
        busy: Callable[[], bool] = lambda: False,
        on_taken_over: Callable[[bool], None] = lambda _certain: None,
    ) -> None:
        """`on_poke` gets what a poke says, and whether it was for this device alone. `on_taken_over`: the broker ended an
        accepted connection and took the next one at once, as it does when another connection with the same identity takes the
        place of this one; that is certain when the argument is true. `on_blocks` gets the parts of transfers by their id;
        `busy` says whether one is under way.
        """
        self.on_delivered = on_delivered
        self.on_blocks = on_blocks
        self.busy = busy
        self.on_taken_over = on_taken_over
        self.thrown_out = False
        """The broker ended the last connection, and nothing has failed since."""
        self.asks: collections.deque[bytes] = collections.deque()
        self.device = device
        self.broker = broker
        self.outbox = outbox
        self._next_session = next_session
        self.on_poke = on_poke
        self._on_change = on_change
        self._jitter = jitter
        self.stopping = threading.Event()
        self._woken = threading.Event()
        self._thread: threading.Thread | None = None
        self.protocol = ProtocolChoice()
        self.session = 0
        self.connected = False
        self._connected_to = ""
        self.problem: str | None = None

    def ask(self, payload: bytes) -> bool:
        """Asks for parts of something (agent.contract.transfers), at most once. False without a connection. Any thread may."""
        if not self.connected:
            return False
        self.asks.append(payload)
        return True

    def move(self, host: str, port: int) -> None:
        """Goes to another broker; the present one is left in order. Any thread may."""
        self.broker, self.protocol = msgspec.structs.replace(self.broker, host=host, port=port), ProtocolChoice()
        self._woken.set()

    @property
    def running(self) -> bool:
        """Whether its thread is there."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="mqtt-link", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Says goodbye if connected, and ends. A connection attempt under way is abandoned."""
        self.stopping.set()
        self._woken.set()
        if self._thread:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        lost_at = time.monotonic()
        while not self.stopping.is_set():
            lasted_s = self._connect_once()
            if lasted_s >= STEADY_AFTER_S:
                lost_at = time.monotonic()
            if self._woken.wait(delay_s(time.monotonic() - lost_at, self._jitter())):
                self._woken.clear()
                lost_at = time.monotonic()

    def _connect_once(self) -> float:
        """One connection from beginning to end. Gives how long it lasted, in seconds."""
        try:
            self.session = self._next_session()
            conversation = _Conversation(self, self.protocol.present)
            return conversation.run()
        except OSError as error:  # includes every TLS error
            self.thrown_out = False
            self.say(f"cannot be reached: {refusals.in_words(str(error))}")
            return 0.0
        except Exception as error:
            # Something that is no broker can make the MQTT library raise anything; this thread must live.
            log.exception("the connection to the broker failed in a way that was not foreseen")
            self.say(f"failed: {type(error).__name__}: {error}")
            return 0.0
        finally:
            self.set_connected(connected=False)

    def set_connected(self, *, connected: bool) -> None:
        if connected != self.connected:
            self.connected = connected
            if connected:
                self.problem, self._connected_to = None, f"{self.broker.host}:{self.broker.port}"
            log.info("%s the broker %s", "connected to" if connected else "lost", self._connected_to)
            self._on_change(connected)

    def say(self, problem: str) -> None:
        """Why there is no connection. Logged when it is news: an outage is a line, not one for each attempt."""
        text = f"broker {self.broker.host}:{self.broker.port} {problem}"
        if text != self.problem:
            log.warning("%s", text)
        self.problem = text


class _Conversation:
    """One connection. Everything runs in the link's thread, callbacks of paho included."""

    def __init__(self, link: Link, protocol: MQTTProtocolVersion) -> None:
        self._link = link
        self._broker = link.broker
        self._protocol = protocol
        self._sent: dict[int, int] = {}  # paho's message id → outbox id
        self._moved = 0.0  # when one of them was acknowledged, or the first of them sent
        self._after = 0
        self._accepted = False
        self._asked, self._ask_at = 0, math.inf  # how often for pokes, and when next
        self._told = False  # that another connection took its place
        self._refused: str | None = None
        self._error = ""  # of the socket, in the words of who noticed it
        self._clean_stop = False
        self._client = self._make_client()

    def run(self) -> float:
        """Raises: OSError when the connection cannot be made."""
        link = self._link
        started = time.monotonic()
        self._client.connect(self._broker.host, self._broker.port, KEEPALIVE_S, **self._connect_options())
        accepted_at = 0.0
        while not link.stopping.is_set():
            if link.broker is not self._broker:
                log.info("the broker is somewhere else now: leaving this one")
                break
            if self._client.loop(BUSY_LOOP_S if link.busy() else LOOP_S) != MQTTErrorCode.MQTT_ERR_SUCCESS:
                link.thrown_out = self._accepted and not self._told
                break
            if self._accepted:
                accepted_at = accepted_at or time.monotonic()
                if time.monotonic() >= self._ask_at:
                    self._ask_for_pokes()
                self._drain()
                if self._is_ignored():
                    log.warning("the broker acknowledges nothing: connecting anew")
                    break
                while link.asks:
                    self._client.publish(topics.up(link.device, "blocks"), link.asks.popleft(), qos=0)
            elif self._refused or time.monotonic() - started > CONNACK_TIMEOUT_S:
                break
        self._end()
        if not self._accepted:
            link.thrown_out = False
            link.say(f"refused the connection: {self._refused or refusals.in_words(self._error) or 'no answer'}")
            link.protocol.refused()
            return 0.0
        return time.monotonic() - accepted_at

    def _make_client(self) -> mqtt.Client:
        link = self._link
        options: dict[str, Any] = {} if self._protocol == MQTTProtocolVersion.MQTTv5 else {"clean_session": True}
        client = _Client(
            self._broker.way,
            CallbackAPIVersion.VERSION2,
            client_id=link.device,
            protocol=self._protocol,
            reconnect_on_failure=False,
            **options,
        )
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.tls_set_context(self._broker.tls())
        client.max_inflight_messages_set(IN_FLIGHT)
        client.will_set(topics.up(link.device, "presence"), self._presence(online=False), qos=1)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_log = self._on_log
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        return client

    def _connect_options(self) -> dict[str, Any]:
        if self._protocol != MQTTProtocolVersion.MQTTv5:
            return {}
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = SESSION_EXPIRY_S
        return {"clean_start": True, "properties": properties}

    def _presence(self, *, online: bool) -> bytes:
        return encode(Presence(device=self._link.device, session=self._link.session, online=online))

    def _on_connect(self, _client: mqtt.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        if reason.is_failure:
            self._refused = str(reason)
            return
        self._accepted = True
        self._link.protocol.accepted()
        if self._link.thrown_out:
            self._link.thrown_out = False
            self._link.on_taken_over(False)
        self._link.asks.clear()
        self._ask_for_pokes()
        self._link.set_connected(connected=True)

    def _ask_for_pokes(self) -> None:
        """And says that the device is there, so that it is poked with what it may have missed."""
        device, qos = self._link.device, poke_qos(self._protocol)
        self._client.subscribe([(topics.down_poke(device), qos), (topics.POKE_ALL, qos), (topics.down_blocks(device, "+"), 0)])
        self._client.publish(topics.up(device, "presence"), self._presence(online=True), qos=1)
        self._asked += 1
        self._ask_at = time.monotonic() + asks_again_after_s(self._protocol, self._asked)

    def _on_log(self, _client: mqtt.Client, _data: Any, level: int, text: str) -> None:
        """The library tells what went wrong with the socket here and nowhere else."""
        if level == LogLevel.MQTT_LOG_ERR and not self._error:
            self._error = text  # the first one; others follow from it

    def _on_disconnect(self, _client: mqtt.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        if reason.value == SESSION_TAKEN_OVER:
            self._told = True
            self._link.on_taken_over(True)

    def _on_message(self, _client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        before, _, transfer = message.topic.rpartition("/")
        if f"{before}/" == topics.down_blocks(self._link.device, ""):
            self._link.on_blocks(transfer, bytes(message.payload))
            return
        self._link.on_poke(bytes(message.payload), message.topic != topics.POKE_ALL)

    def _on_publish(self, _client: mqtt.Client, _data: Any, mid: int, reason: ReasonCode, _properties: Any) -> None:
        item = self._sent.pop(mid, None)
        if item is None:
            return
        self._moved = time.monotonic()
        if reason.is_failure:
            # It will be refused again in the same words; keeping it would block everything behind it.
            log.warning("the broker refused a message (%s): see the broker's access list", reason)
        else:
            self._link.on_delivered(item)
        self._link.outbox.delivered(item)

    def _drain(self) -> None:
        free = IN_FLIGHT - len(self._sent)
        if free <= 0:
            return
        link = self._link
        for item in link.outbox.first(free, self._after):
            info = self._client.publish(topics.up(link.device, item.kind), item.payload, qos=1)
            if not self._sent:
                self._moved = time.monotonic()
            self._sent[info.mid] = item.id
            self._after = item.id

    def _is_ignored(self) -> bool:
        return bool(self._sent) and not self._client.want_write() and time.monotonic() - self._moved > SILENCE_S

    def _end(self) -> None:
        """An orderly goodbye replaces the last will, which a broker only sends for a connection that broke."""
        leaving = self._link.stopping.is_set() or self._link.broker is not self._broker
        if self._accepted and leaving:
            self._client.publish(topics.up(self._link.device, "presence"), self._presence(online=False), qos=1)
            for _ in range(4):
                if self._client.loop(LOOP_S / 2) != MQTTErrorCode.MQTT_ERR_SUCCESS or not self._client.want_write():
                    break
        self._client.disconnect()
        self._client.loop(0.05)


def delay_s(outage_s: float, jitter: float) -> float:
    """How long to wait before the next attempt: up to as long as the outage has lasted, with full jitter (`jitter` from 0 to
    1).

    It grows like any exponential backoff, a fleet that lost its broker does not come back in step, and a device is back at the
    latest after twice the time that the broker was away.
    """
    return max(0.05, min(LONGEST_DELAY_S, max(FIRST_DELAY_S, outage_s)) * jitter)


def tls_context(ca: str, certificate: str, key: str) -> ssl.SSLContext:
    """TLS to the fleet's own CA with this device's certificate, and the word that it is for the broker.  Raises: OSError when a file cannot be used."""
    context = ssl.create_default_context(cafile=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols([MQTT])
    context.load_cert_chain(certificate, key)
    return context
