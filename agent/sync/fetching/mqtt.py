"""Documents, blobs and new certificates over the broker, where its port is the only one that is open.

Parts are asked for in windows, the next one while the last is arriving; what does not come is asked for again. Slower than
HTTPS and a burden to the broker, so it is asked last.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator

from agent.contract import enrolment
from agent.contract.codec import encode
from agent.contract.reasons import Reason
from agent.contract.transfers import MIN_PART_BYTES, PART_BYTES, Ask, Kind, Part, Status, bitmap, decode_part
from agent.sync.fetching.sources import NotHere, Reader
from agent.sync.http import HttpStatus, TooLong
from agent.sync.problems import Problem

MQTT_PLACE = 40
WINDOW = 32
"""Parts that are asked for and not there yet: 2 MiB, what a link of 100 Mbit/s carries in 160 ms."""

SILENCE_S = 3.0
"""How long nothing may come before what is missing is asked for again: beyond any round trip, and the time that a busy broker
holds a message."""

IGNORED = 4 * WINDOW
"""How many parts that are there already, or of no use, may come one after the other: an ask that was repeated doubles a
window."""

MOST_OF_A_MESSAGE_BYTES = 1024
"""What a message has beside the bytes of its part, or that says why there is none."""

SILENCES = 6
"""So many silences in a row (SILENCE_S each) end a transfer. A broker that restarts is back by then."""


def sized(limit_bytes_per_s: int) -> dict[str, int]:
    """The window and the size of parts for a bandwidth limit (0: none): what is asked for comes at once, so it is a second's
    worth.
    """
    if limit_bytes_per_s <= 0:
        return {"window": WINDOW, "part_bytes": PART_BYTES}
    part = PART_BYTES
    while part > max(MIN_PART_BYTES, limit_bytes_per_s):
        part //= 2
    return {"window": max(1, min(WINDOW, limit_bytes_per_s // part)), "part_bytes": part}


class Transfers:
    """What is under way over one link. Thread-safe."""

    def __init__(
        self, send: Callable[[bytes], bool], connected: Callable[[], bool], *, window: int = WINDOW, part_bytes: int = PART_BYTES,
        silence_s: float = SILENCE_S,
    ) -> None:  # fmt: skip
        """`send` publishes an ask; false when there is no connection."""
        self._send = send
        self.connected = connected
        self._window = window
        self._part_bytes = part_bytes
        self._silence_s = silence_s
        self._lock = threading.Lock()
        self._open: dict[str, queue.Queue[Part]] = {}

    @property
    def active(self) -> bool:
        """Whether something is waited for."""
        return bool(self._open)

    @property
    def unread(self) -> int:
        """How many parts came that nobody has read yet."""
        with self._lock:
            return sum(waiting.qsize() for waiting in self._open.values())

    def received(self, id_: str, payload: bytes) -> None:
        """Hands on a message that came for a transfer. One that nobody asked for, or one too many, is dropped."""
        with self._lock:
            waiting = self._open.get(id_)
        asked_for = waiting is not None and len(payload) <= MOST_OF_A_MESSAGE_BYTES + self._part_bytes
        part = decode_part(payload) if asked_for else None
        if waiting is not None and part is not None:
            with contextlib.suppress(queue.Full):
                waiting.put_nowait(part)

    def whole(self, thing: Kind, name: str, *, limit_bytes: int, deadline_s: float, what: str, request: str = "") -> bytes:
        """All bytes of a thing. `what`: its name in messages.  Raises: HttpStatus 404 when there is none of that name;
        Problem.
        """
        end = time.monotonic() + deadline_s
        body = bytearray()
        for size, data in self.parts(thing, name, 0, None, request):
            if size > limit_bytes:
                raise TooLong(Reason.ENDLESS_DATA, f"{what}: {size} bytes, more than the {limit_bytes} allowed")
            body += data
            if time.monotonic() > end:
                raise Problem(Reason.SLOW_RETRIEVAL, f"{what}: not finished after {deadline_s:.0f} s")
        return bytes(body)

    def parts(
        self, thing: Kind, name: str, first: int, end: int | None, request: str = ""
    ) -> Generator[tuple[int, bytes], None, None]:
        """The size of the thing and the bytes of its parts from `first` to before `end` (None: to its end), in order.

        Raises: HttpStatus 404 when there is none of that name; Problem.
        """
        id_, waiting = uuid.uuid4().hex, queue.Queue[Part](4 * self._window)
        with self._lock:
            self._open[id_] = waiting
        try:
            yield from self._pull(id_, waiting, thing, name, first, end, request)
        finally:
            with self._lock:
                del self._open[id_]

    def _pull(
        self, id_: str, waiting: queue.Queue[Part], thing: Kind, name: str, first: int, end: int | None, request: str
    ) -> Iterator[tuple[int, bytes]]:
        arrived: dict[int, Part] = {}
        at = asked = first
        silences, ignored, known = 0, 0, end is not None
        while end is None or at < end:
            ahead = (
                min(end, at + self._window) if end is not None else at + 1
            )  # of an unknown size the first part tells how many there are
            if ahead > asked and (asked - at <= self._window // 2 or ahead == end):
                self._ask(id_, thing, name, range(asked, ahead), request)
                asked = ahead
            try:
                part = waiting.get(timeout=self._silence_s)
            except queue.Empty:
                silences += 1
                if silences > SILENCES:
                    raise Problem(
                        Reason.DOWNLOAD_FAILED,
                        f"the broker brought nothing of {thing} {name} for {silences * self._silence_s:.0f} s",
                    ) from None
                self._ask(id_, thing, name, [number for number in range(at, asked) if number not in arrived], request)
                continue
            _raise_for(part, thing, name)
            if not at <= part.number < asked or part.number in arrived or not self._whole(part):
                if (ignored := ignored + 1) > IGNORED:
                    raise Problem(Reason.DOWNLOAD_FAILED, f"the broker brings what nobody asked for instead of {thing} {name}")
                continue
            silences = ignored = 0
            arrived[part.number] = part
            if not known:
                end, known = first + max(1, -(-part.size_bytes // self._part_bytes) - first), True
            while at in arrived:
                found = arrived.pop(at)
                at += 1
                yield found.size_bytes, found.data

    def _whole(self, part: Part) -> bool:
        left = part.size_bytes - part.number * self._part_bytes
        return len(part.data) == max(0, min(self._part_bytes, left))

    def _ask(self, id_: str, thing: Kind, name: str, numbers: Iterable[int], request: str) -> None:
        wanted = list(numbers)
        ask = Ask(
            id=id_, thing=thing, name=name, first=wanted[0], wanted=bitmap(wanted[0], wanted), part_bytes=self._part_bytes,
            request=request,
        )  # fmt: skip
        if not self._send(encode(ask)):
            raise Problem(Reason.DOWNLOAD_FAILED, "the broker is not connected")

    @property
    def part_bytes(self) -> int:
        return self._part_bytes


class MqttBlobs:
    """Blobs over the broker."""

    name = "the broker"
    metered = True
    place = MQTT_PLACE
    final = False  # whoever has the broker may put any bytes into its mouth: they say nothing about the release

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers

    @contextlib.contextmanager
    def open(self, sha256: str) -> Iterator[Reader]:
        if not self._transfers.connected():
            raise Problem(Reason.DOWNLOAD_FAILED, "the broker is not connected")

        @contextlib.contextmanager
        def read(start: int, end: int) -> Iterator[tuple[int, Iterator[bytes]]]:
            size = self._transfers.part_bytes
            parts = self._transfers.parts("blob", sha256, start // size, -(-end // size))
            with contextlib.closing(parts):
                yield start, self._cut(parts, start % size, end - start, sha256)

        yield read

    def _cut(self, parts: Iterator[tuple[int, bytes]], skip: int, count: int, sha256: str) -> Iterator[bytes]:
        try:
            for _, data in parts:
                piece = data[skip : skip + count]
                skip, count = 0, count - len(piece)
                yield piece
                if not piece or count <= 0:
                    return
        except HttpStatus as problem:
            raise NotHere(f"the fleet server has no blob {sha256}") from problem


class MqttDocuments:
    """The fleet's documents over the broker, for the trust client."""

    server_time: float | None = None
    _KINDS: tuple[tuple[str, Kind], ...] = ((enrolment.METADATA_PATH, "metadata"), (enrolment.TARGETS_PATH, "target"))

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers

    def url(self, path: str) -> str:
        return f"mqtt:{path}"

    def get(self, url: str, *, limit_bytes: int, deadline_s: float) -> bytes:
        path = url.removeprefix("mqtt:")
        thing, name = next(
            ((kind, path.removeprefix(prefix)) for prefix, kind in self._KINDS if path.startswith(prefix)), ("record", "")
        )
        return self._transfers.whole(thing, name, limit_bytes=limit_bytes, deadline_s=deadline_s, what=url)

    def close(self) -> None:
        return


def _raise_for(part: Part, thing: Kind, name: str) -> None:
    if part.status is Status.NOT_FOUND:
        raise HttpStatus(404, f"the fleet server has no {thing} {name!r}")
    if part.status is Status.REFUSED:
        text = part.data[:512].decode(errors="replace")
        raise Problem(Reason.DOWNLOAD_FAILED, f"the fleet server refuses {thing} {name!r}: {text}")
