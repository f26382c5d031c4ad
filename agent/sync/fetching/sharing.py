"""Lends this device's blobs to its neighbours on the local network: complete, verified blobs by their hash, read only, and
nothing else.

Off by default. Plain HTTP, because whoever asks verifies what it gets, and a hash that nobody told you opens nothing.
Connections, their time and the bytes per second are bounded, so that neighbours cannot take this device away from its own work.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import IO

from agent.contract.enrolment import BLOBS_PATH
from agent.contract.names import SHA256
from agent.host.priority import lower, rest
from agent.store import Store
from agent.sync.fetching.budget import Budget
from agent.sync.fetching.folders import open_regular
from agent.sync.ports import Clock
from agent.sync.problems import Stopped

log = logging.getLogger(__name__)

CONNECTIONS = 8
SILENCE_S = 20.0
"""How long a neighbour may say nothing or take nothing."""

CHUNK_BYTES = 64 * 1024
_RANGE = re.compile(r"bytes=(\d{1,15})-(\d{0,15})")


class Sharing:
    """Runs between `start` and `stop` in threads of low priority."""

    def __init__(self, store: Store, clock: Clock, listen: str, limit_bytes_per_s: int) -> None:
        """`listen` is ADDRESS:PORT.  Raises: OSError when the port is taken."""
        host, _, port = listen.rpartition(":")
        self.store = store
        self.budget = Budget(clock, limit_bytes_per_s=limit_bytes_per_s)
        self.ending = threading.Event()
        self.slots = threading.BoundedSemaphore(CONNECTIONS)
        self._server = _Server((host.strip("[]"), int(port)), _Handler, self)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._run, name="sharing", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.ending.set()
        if self._thread.ident is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def _run(self) -> None:
        lower()
        self._server.serve_forever(poll_interval=0.2)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], sharing: Sharing) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.sharing = sharing
        super().__init__(address, handler)

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        if not self.sharing.slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.sharing.slots.release()

    def handle_error(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        del request
        log.debug("a neighbour at %s went away", client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "edge-agent"
    sys_version = ""
    timeout = SILENCE_S
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as the base class names it
        log.debug(format, *args)

    def do_GET(self) -> None:
        sha256 = self.path.removeprefix(BLOBS_PATH)
        if not self.path.startswith(BLOBS_PATH) or not SHA256.fullmatch(sha256):
            self._refuse(404)
            return
        try:
            file = open_regular(self.server.sharing.store.blob(sha256))
        except OSError:
            self._refuse(404)
            return
        with file:
            self._send(file)

    def _send(self, file: IO[bytes]) -> None:
        size = os.fstat(file.fileno()).st_size
        start, end = 0, size
        if match := _RANGE.fullmatch(self.headers.get("Range", "")):
            start, end = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
            if start >= end:
                self._refuse(416)
                return
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        sharing = self.server.sharing
        with contextlib.suppress(Stopped):
            while start < end:
                data = os.pread(file.fileno(), min(CHUNK_BYTES, end - start), start)
                if not data:
                    self.close_connection = True
                    return
                sharing.budget.wait_for(len(data), 0, sharing.ending.is_set)
                self.wfile.write(data)
                start += len(data)
                rest()
            return
        self.close_connection = True

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()
