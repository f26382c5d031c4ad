"""Throws one device off a RabbitMQ cluster, whichever node it is connected to, and leaves everybody else's connection alone.

The nodes agree on who has a client id, and whoever connects with one that is taken gets it: the connection that had it is closed. So
this server connects with the device's client id, by its own certificate, and leaves at once. The device may try again, and is refused
when the node asks this server (`authorization`).
"""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Sequence

from fleet_server.devices import pki
from fleet_server.ingest.amqp_connection import Node

_log = logging.getLogger(__name__)

WITHIN_S = 3.0
CONNACK, ACCEPTED = 0x20, 0
DISCONNECT = b"\xe0\x00"
AGAIN_S = 1.5
"""A device whose log-in was allowed just before it was shut out may be connected only after it was thrown off: it is thrown off again."""

RETRY_MIN_S, RETRY_MAX_S = 0.5, 30.0
ENOUGH_S = 1.0  # a paused device is not thrown off more often than this


def evict(device: str, authority: pki.Authority, nodes: Sequence[Node]) -> None:
    """Returns when the cluster has given the device's client id to this server.  Raises: OSError when no node does it."""
    context = ssl.create_default_context(cafile=str(authority.trusted_path))
    context.load_cert_chain(authority.client_cert, authority.client_key)
    problem: OSError = ConnectionError("no node is named")
    for host, port in nodes:
        try:
            _take_over(device, context, host, port)
        except OSError as error:  # noqa: PERF203 - a few nodes
            problem = error
        else:
            return
    raise problem


def _take_over(device: str, context: ssl.SSLContext, host: str, port: int) -> None:
    with (
        socket.create_connection((host, port), timeout=WITHIN_S) as plain,
        context.wrap_socket(plain, server_hostname=host) as tls,
    ):
        tls.settimeout(WITHIN_S)
        tls.sendall(_connect(device))
        said = tls.recv(4)
        if said[:1] != bytes([CONNACK]) or said[3:] != bytes([ACCEPTED]):
            raise ConnectionError(
                f"{host}:{port} does not let this server take the client id of {device}: {said.hex() or 'closed'}"
            )
        tls.sendall(DISCONNECT)


def _connect(client_id: str) -> bytes:
    """A CONNECT of MQTT 3.1.1 with a clean session."""
    name = client_id.encode()
    body = b"\x00\x04MQTT\x04\x02\x00\x05" + struct.pack(">H", len(name)) + name
    return bytes([0x10, len(body)]) + body


class ClusterDoor:
    """Who is let into the cluster. For any thread; a thread of its own, between `start` and `stop`, does what takes time."""

    def __init__(self, evict: Callable[[str], None], on_pause: Callable[[str, float], None]) -> None:
        """`evict` throws a device off, or raises OSError; `on_pause` is told of each pause and its seconds."""
        self._evict, self._on_pause = evict, on_pause
        self._paused: dict[str, float] = {}
        self._evicted: dict[str, float] = {}
        self._shut: set[str] = set()
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._numbers = itertools.count()
        self._due: list[tuple[float, int, str, float]] = []  # when, number, device, how long to wait after it failed
        self._thread = threading.Thread(target=self._run, name="door", daemon=True)
        self.problem = ""
        """Why a device that is shut out may still be connected."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._work.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout=2 * WITHIN_S)

    def is_paused(self, device: str) -> bool:
        until = self._paused.get(device)
        return until is not None and time.monotonic() < until

    def shut_out(self, device: str) -> None:
        """Throws the device off for good; the database says by now that it may not come in."""
        self._shut.add(device)
        self._try(device, 0.0)
        self._work.put(lambda: self._plan(device, AGAIN_S, 0.0))

    def admit(self, device: str) -> None:
        """Lets a device in that has the id of one that was shut out."""
        self._shut.discard(device)

    def pause(self, device: str, seconds: float) -> None:
        """Shuts the device out for a while. Returns at once."""
        self._paused[device] = time.monotonic() + seconds
        self._work.put(lambda: self._begin_pause(device, seconds))

    def keep_out(self, device: str, seconds: float) -> None:
        """Another process has paused the device, and throws it off."""
        self._paused[device] = max(time.monotonic() + seconds, self._paused.get(device, 0.0))

    def again(self, device: str) -> None:
        """A paused device is still heard: it is thrown off once more, if that was not just done. Returns at once."""
        if time.monotonic() - self._evicted.get(device, 0.0) > ENOUGH_S:
            self._evicted[device] = time.monotonic()
            self._work.put(lambda: self._try(device, 0.0))

    def _begin_pause(self, device: str, seconds: float) -> None:
        _log.warning("%s sends too much: it is shut out for %.0f s", device, seconds)
        self._try(device, 0.0)
        try:
            self._on_pause(device, seconds)
        except Exception:  # noqa: BLE001 - the thread must go on
            _log.exception("that %s is paused cannot be noted", device)

    def _try(self, device: str, waited_s: float) -> None:
        self._evicted[device] = time.monotonic()
        try:
            self._evict(device)
        except OSError as error:
            self.problem = f"{device} is shut out and may still be connected: {error}"
            if waited_s == 0.0:
                _log.error("%s cannot be thrown off the broker now; trying again: %s", device, error)
            wait_s = min(RETRY_MAX_S, max(RETRY_MIN_S, 2 * waited_s))
            self._work.put(lambda: self._plan(device, wait_s, wait_s))
        else:
            self.problem = ""

    def _plan(self, device: str, seconds: float, waited_s: float) -> None:
        heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), device, waited_s))

    def _run(self) -> None:
        while True:
            try:
                work = self._work.get(timeout=max(0.0, self._due[0][0] - time.monotonic()) if self._due else None)
            except queue.Empty:
                _, _, device, waited_s = heapq.heappop(self._due)
                if device in self._shut or self.is_paused(device):
                    self._try(device, waited_s)
                continue
            if work is None:
                return
            work()
