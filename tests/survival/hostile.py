"""A broker that somebody took over: it holds the real broker's key, so devices believe that it is theirs, and it does with their
messages as it likes. Behind it the real broker goes on for whatever it lets pass.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import struct
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

PUBLISH, PUBACK = 3, 4
DUPLICATE = 0x08
HISTORY = 40
LONGEST_DELAY_S = 1.0
FORGERIES = 5
"""Per message that comes by."""

Send = Callable[[int, bytes], Awaitable[None]]


class HostileBroker:
    """Between one device and its broker, in a thread of its own. `manner` may be changed at any time."""

    def __init__(self, pki: Path, device: Path, broker_port: int, seed: int) -> None:
        self.manner = "honest"
        self.passed = 0
        """Messages that came by, whatever became of them."""
        self._dice = random.Random(seed)
        self._server_tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(pki / "ca.crt"))
        self._server_tls.load_cert_chain(pki / "server.crt", pki / "server.key")
        self._server_tls.verify_mode = ssl.CERT_REQUIRED
        self._client_tls = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        self._client_tls.load_cert_chain(device / "certificate.pem", device / "key.pem")
        self._broker_port = broker_port
        self._loop = asyncio.new_event_loop()
        self._connections: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> HostileBroker:  # noqa: PYI034 - typing.Self came with Python 3.11
        self._thread.start()
        self.port: int = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._meet, "127.0.0.1", 0, ssl=self._server_tls)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _close(self) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await self._between(reader, writer)
        writer.transport.abort()
        self._connections.discard(task)

    async def _between(self, device_in: asyncio.StreamReader, device_out: asyncio.StreamWriter) -> None:
        broker_in, broker_out = await asyncio.open_connection("127.0.0.1", self._broker_port, ssl=self._client_tls)
        down, up = _sender(device_out), _sender(broker_out)
        ways = (self._carry(device_in, up, down, upwards=True), self._carry(broker_in, down, up, upwards=False))
        tasks = [asyncio.ensure_future(way) for way in ways]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            broker_out.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, on: Send, back: Send, *, upwards: bool) -> None:
        """One direction: `on` is where its messages should go, `back` where they came from."""
        history: list[bytes] = []
        held: list[tuple[int, bytes]] = []
        while True:
            try:
                head, body = await asyncio.wait_for(_packet(reader), 0.3 if held else None)
            except asyncio.TimeoutError:
                await on(*held.pop())
                continue
            if self.manner == "silent":
                continue
            if head >> 4 != PUBLISH:
                await on(head, body)
                continue
            self.passed += 1
            history = [*history, _without_acknowledgement(head, body)][-HISTORY:]
            if self.manner == "reordering":
                held.append((head, body))
                if len(held) == 2:
                    await on(*held.pop())
                    await on(*held.pop())
            else:
                await self._publish(head, body, on, back, history, upwards=upwards)

    async def _publish(self, head: int, body: bytes, on: Send, back: Send, history: list[bytes], *, upwards: bool) -> None:
        manner = self.manner
        if manner == "losing":
            return
        if manner == "swallowing":
            if head & 0x06:
                await back(PUBACK << 4, _packet_id(body))
            return
        if manner == "delaying":
            await asyncio.sleep(self._dice.uniform(0, LONGEST_DELAY_S))
        await on(head, body)
        if manner == "duplicating":
            await on(head | DUPLICATE if head & 0x06 else head, body)
        elif manner == "replaying":
            for old in self._dice.sample(history, len(history)):
                await on(PUBLISH << 4, old)
        elif manner == "forging":
            for _ in range(FORGERIES):
                await on(PUBLISH << 4, self._forged(history, upwards=upwards))

    def _forged(self, history: list[bytes], *, upwards: bool) -> bytes:
        """Nobody's message: true ones with a few bytes changed, and wild ones on every topic that the receiver hears."""
        dice = self._dice
        topic, payload = _parts(dice.choice(history))
        if dice.random() < 0.5 and payload:
            changed = bytearray(payload)
            for _ in range(dice.choice((1, 3, 20))):
                changed[dice.randrange(len(changed))] = dice.randrange(256)
            return _message(topic, bytes(changed))
        device = b"v1/d/device/"
        topics = (
            [device + b"up/state", device + b"up/events", device + b"up/presence"]
            if upwards
            else [device + b"down/poke", b"v1/all/poke"]
        )
        wild = (b"", b"\x00" * 100_000, b"{" * 50_000, b'{"kind":"poke","assignment_version":99999999}', dice.randbytes(300))
        return _message(dice.choice(topics), dice.choice(wild))


# -- MQTT 5, as much as it takes -------------------------------------------------------------------------------------------------


async def _packet(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readexactly(1))[0]
    length = shift = 0
    while True:
        byte = (await reader.readexactly(1))[0]
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return head, await reader.readexactly(length)


def _sender(writer: asyncio.StreamWriter) -> Send:
    async def send(head: int, body: bytes) -> None:
        length, size = bytearray(), len(body)
        while True:
            size, low = divmod(size, 128)
            length.append(low | (0x80 if size else 0))
            if not size:
                break
        writer.write(bytes([head]) + bytes(length) + body)
        await writer.drain()

    return send


def _topic_end(body: bytes) -> int:
    return 2 + int.from_bytes(body[:2], "big")


def _packet_id(body: bytes) -> bytes:
    return body[_topic_end(body) :][:2]


def _without_acknowledgement(head: int, body: bytes) -> bytes:
    """The message as one that nobody acknowledges: without a packet id."""
    end = _topic_end(body)
    return body[:end] + body[end + 2 :] if head & 0x06 else body


def _parts(body: bytes) -> tuple[bytes, bytes]:
    """Topic and payload of a message without a packet id, whose properties are short."""
    end = _topic_end(body)
    return body[2:end], body[end + 1 + body[end] :]


def _message(topic: bytes, payload: bytes) -> bytes:
    return struct.pack(">H", len(topic)) + topic + b"\x00" + payload
