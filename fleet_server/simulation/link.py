"""One simulated device's connection to the broker: an agent's link, driven by an asyncio loop that has thousands of them.

paho's client does the protocol. Only what it cannot do without blocking, connecting with its TLS handshake, happens in a thread of a
small pool; everything else here belongs to the loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Protocol, cast

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.contract import topics
from agent.contract.codec import encode
from agent.contract.reports import Presence
from fleet_server.simulation.papers import Address, Papers, SharedContext

KEEPALIVE_S = 60
CONNECT_TIMEOUT_S = 30.0
CONNACK_TIMEOUT_S = 15.0
IN_FLIGHT = 10
FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 120.0
STEADY_AFTER_S = 10.0
ASKED_AGAIN_S = (5.0, 15.0, 40.0, 600.0)
"""These are an agent's (agent/sync/fleet/link.py)."""


class Hears(Protocol):
    """Who is told what happens to the link, in the loop's thread."""

    def linked(self) -> None: ...

    def unlinked(self) -> None: ...

    def poked(self, payload: bytes, alone: bool) -> None: ...

    def acknowledged(self, mid: int) -> None: ...


class Link:
    """Connects between `start` and `stop`, and again whenever the connection is lost. Made in the loop's thread."""

    def __init__(
        self, address: Address, papers: Papers, context: SharedContext, loop: asyncio.AbstractEventLoop, pool: Executor, hears: Hears,
        *, speed: float, jitter: Callable[[], float], wall: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """`pool` runs what blocks. After an outage it waits as an agent does, `speed` times as fast. `wall` is what the device
        takes for the time.
        """
        self._address, self._papers, self._context, self._loop, self._pool = address, papers, context, loop, pool
        self._hears, self._speed, self._jitter, self._wall = hears, speed, jitter, wall
        self._thread = threading.get_ident()
        self._client: mqtt.Client | None = None
        self._protocol = MQTTProtocolVersion.MQTTv5
        self._wanted = self._muted = self._connecting = self._write_pending = self._writing = False
        self._lost_at = self._up_at = 0.0
        self.session = 0
        self.connected = False
        self.connections = 0
        """How often the broker took it."""
        self.problem = ""
        """Why it did not, the last time."""

    def start(self) -> None:
        self._wanted, self._lost_at = True, self._loop.time()
        self._connect()

    def stop(self) -> None:
        """Ends the connection at once, without a goodbye."""
        self._wanted = False
        if self._client is not None and self._client.socket() is not None:
            self.break_off()

    def publish(self, topic: str, payload: bytes) -> int | None:
        """What `acknowledged` will name the message by; None when there is no link."""
        if not self.connected or self._client is None:
            return None
        return self._client.publish(topic, payload, qos=1).mid

    def goodbye(self) -> None:
        """Says that the device leaves, as an agent that is stopped does, and ends the connection."""
        self._wanted = False
        if self.connected and self._client is not None:
            self.publish(topics.up(self._papers.device, "presence"), self._presence(online=False))
            self._client.disconnect()
            self._client.loop_write()

    def mute(self) -> None:
        """From now on nothing is sent, nor read, and the connection stays as long as the broker lets it."""
        self._muted = True
        if self._client is not None and (sock := self._client.socket()) is not None:
            self._loop.remove_reader(sock.fileno())
            self._loop.remove_writer(sock.fileno())

    def break_off(self) -> None:
        """Lets the connection break as a network does: without a word, so that the broker sends the last will."""
        if self._client is not None and (sock := self._client.socket()) is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(cast("ssl.SSLSocket", sock), socket.SHUT_RDWR)  # an SSLSocket's own would forget its TLS
            self._client.loop_read()

    def keep_alive(self) -> None:
        """To be called a few times in KEEPALIVE_S."""
        if self.connected and not self._muted and self._client is not None:
            self._client.loop_misc()

    # -- connecting --------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        if not self._wanted or self._connecting or self._muted:
            return
        self._connecting = True
        self.session = max(self.session + 1, int(self._wall() * 1000))
        if self._client is None or self._client.protocol != self._protocol:
            self._client = self._make_client()
        client = self._client
        client.will_set(topics.up(self._papers.device, "presence"), self._presence(online=False), qos=1)
        self._pool.submit(self._reconnect, client)

    def _reconnect(self, client: mqtt.Client) -> None:
        """In a thread of the pool."""
        problem = ""
        try:
            client.reconnect()
        except Exception as error:  # noqa: BLE001 - paho raises anything for what is no broker
            problem = f"{type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._reached, problem)

    def _reached(self, problem: str) -> None:
        self._connecting = False
        sock = self._client.socket() if self._client is not None else None
        if problem or sock is None:
            self.problem = problem or self.problem or "the broker ended the connection"
            self._again()
        elif not self._wanted:
            sock.close()
        else:
            self._loop.add_reader(sock.fileno(), self._read)
            self._loop.call_later(CONNACK_TIMEOUT_S, self._give_up, sock)
            self._write()
            self._read()

    def _give_up(self, sock: object) -> None:
        """Ends a connection that the broker has not accepted by now."""
        if not self.connected and self._client is not None and self._client.socket() is sock:
            self.problem = "the broker did not answer"
            self.break_off()

    def _make_client(self) -> mqtt.Client:
        five = self._protocol == MQTTProtocolVersion.MQTTv5
        options: dict[str, Any] = {} if five else {"clean_session": True}
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2, self._papers.device, protocol=self._protocol, reconnect_on_failure=False, **options
        )
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.tls_set_context(cast("ssl.SSLContext", self._context.of(self._papers)))  # as much of one as it asks for
        client.max_inflight_messages_set(IN_FLIGHT)
        client.on_connect, client.on_disconnect = self._on_connect, self._on_disconnect
        client.on_message, client.on_publish = self._on_message, self._on_publish
        client.on_socket_close = self._on_close
        client.on_socket_register_write = self._on_writable_wanted
        where = (self._address.broker_host, self._address.broker_port, KEEPALIVE_S)
        if five:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = 0
            client.connect_async(*where, clean_start=True, properties=properties)
        else:
            client.connect_async(*where)
        return client

    def _presence(self, *, online: bool) -> bytes:
        return encode(Presence(device=self._papers.device, session=self.session, online=online))

    def _again(self) -> None:
        """Connects again after a time that grows with the outage, as an agent does."""
        if self._wanted and not self._muted:
            outage_s = (self._loop.time() - self._lost_at) * self._speed
            delay_s = min(LONGEST_DELAY_S, max(FIRST_DELAY_S, outage_s)) * self._jitter() / self._speed
            self._loop.call_later(max(0.05, delay_s), self._connect)

    # -- reading and writing -----------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """All that is there: the system does not know of what is decrypted and not read."""
        client = self._client
        if client is None or (sock := client.socket()) is None:
            return
        client.loop_read()
        while client.socket() is sock and isinstance(sock, ssl.SSLSocket) and sock.pending():
            client.loop_read()

    def _on_writable_wanted(self, *_: Any) -> None:
        if threading.get_ident() != self._thread or self._write_pending:
            return  # `_reached` writes what was said while connecting
        self._write_pending = True
        self._loop.call_soon(self._write)

    def _write(self) -> None:
        self._write_pending = False
        client = self._client
        if client is None or self._muted or client.socket() is None:
            return
        client.loop_write()
        sock = client.socket()
        if sock is not None and client.want_write() != self._writing:
            self._writing = not self._writing
            if self._writing:
                self._loop.add_writer(sock.fileno(), self._write)
            else:
                self._loop.remove_writer(sock.fileno())

    def _on_close(self, _client: mqtt.Client, _data: Any, sock: Any) -> None:
        if not self._connecting:
            self._writing = False
            self._loop.remove_reader(sock.fileno())
            self._loop.remove_writer(sock.fileno())

    # -- what paho tells ---------------------------------------------------------------------------------------------------

    def _on_connect(self, client: mqtt.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self.problem = str(reason)
            return
        self.connected, self._up_at = True, self._loop.time()
        self.connections += 1
        self._ask_for_pokes(client, self.connections, 1)
        self._hears.linked()

    def _ask_for_pokes(self, client: mqtt.Client, connection: int, times: int) -> None:
        """As an agent does; again where a cluster may have taken the subscription away (agent/sync/fleet/protocol.py)."""
        if not self.connected or self._muted or connection != self.connections:
            return
        device, five = self._papers.device, self._protocol == MQTTProtocolVersion.MQTTv5
        qos = 1 if five else 0
        client.subscribe([(topics.down_poke(device), qos), (topics.POKE_ALL, qos), (topics.down_blocks(device, "+"), 0)])
        client.publish(topics.up(device, "presence"), self._presence(online=True), qos=1)
        if not five:
            again_s = ASKED_AGAIN_S[min(times, len(ASKED_AGAIN_S)) - 1]  # the broker's nodes are no faster than they are
            self._loop.call_later(again_s, self._ask_for_pokes, client, connection, times + 1)

    def _on_disconnect(self, _client: mqtt.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        was = self.connected
        self.connected = False
        if not was and self.connections == 0:  # a broker of MQTT 3.1.1 ends the connection at a CONNECT of MQTT 5
            five, three = MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311
            self._protocol = three if self._protocol == five else five
        now = self._loop.time()
        if was and now - self._up_at >= STEADY_AFTER_S / self._speed:
            self._lost_at = now
        if reason.value != MQTTErrorCode.MQTT_ERR_SUCCESS:
            self.problem = str(reason)
        if was:
            self._hears.unlinked()
        if not self._connecting:
            self._again()

    def _on_message(self, _client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        if not self._muted:
            self._hears.poked(bytes(message.payload), message.topic != topics.POKE_ALL)

    def _on_publish(self, _client: mqtt.Client, _data: Any, mid: int, _reason: Any, _properties: Any) -> None:
        self._hears.acknowledged(mid)
