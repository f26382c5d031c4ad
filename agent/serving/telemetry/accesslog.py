"""The access log: a line of JSON per request, written by a thread of its own. When writing cannot keep up, lines are lost, not
time.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from agent.config import ConfigError
from agent.serving.telemetry.observing import Seen

log = logging.getLogger(__name__)

MAX_WAITING = 10_000
JOURNAL = "journal"
WRITE_EVERY_S = 0.2


class AccessLog:
    """`target` is `journal` (standard error, which systemd keeps) or a file that is appended to, and opened anew when it was
    moved.

    Raises: ConfigError when the file cannot be written.
    """

    def __init__(self, target: str) -> None:
        self._path = None if target == JOURNAL else Path(target)
        self._file = self._open()
        self._waiting: deque[bytes] = deque()
        self._lost = 0
        self._news = threading.Event()
        self._ending = False
        self._to_unix_s = time.time() - time.perf_counter()
        self._thread = threading.Thread(target=self._write_all, name="access-log")
        self._thread.start()

    def see(self, seen: Seen) -> None:
        if len(self._waiting) >= MAX_WAITING:
            self._lost += 1
            return
        request, match = seen.request, seen.request.match
        self._waiting.append(msgspec.json.encode({
            "time": datetime.fromtimestamp(self._to_unix_s + request.arrived_s, timezone.utc).isoformat(timespec="milliseconds"),
            "who": seen.who,
            "route": seen.route,
            "model": match.model,
            "version": match.version,
            "id": seen.id or None,
            "status": seen.answer.status,
            "ms": round((seen.answered_s - request.arrived_s) * 1e3, 3),
            "bytes_in": seen.bytes_in,
            "bytes_out": seen.bytes_out,
        }) + b"\n")  # fmt: skip

    def close(self) -> None:
        self._ending = True
        self._news.set()
        self._thread.join()
        if self._path is not None:
            os.close(self._file)

    def _write_all(self) -> None:
        while True:
            self._news.wait(WRITE_EVERY_S)
            lines = [self._waiting.popleft() for _ in range(len(self._waiting))]
            if lost := self._lost:
                self._lost -= lost
                lines.append(msgspec.json.encode({"lost": lost}) + b"\n")
            if lines:
                self._write(b"".join(lines))
            elif self._ending:
                return

    def _write(self, data: bytes) -> None:
        try:
            if self._path is not None and self._moved():
                os.close(self._file)
                self._file = self._open()
            while data:
                data = data[os.write(self._file, data) :]
        except (OSError, ConfigError) as error:
            log.warning("the access log cannot be written: %s", error)

    def _moved(self) -> bool:
        assert self._path is not None
        here = os.fstat(self._file)
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return True
        return (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino)

    def _open(self) -> int:
        if self._path is None:
            return 2
        try:
            return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise ConfigError(f"serve.access_log: {str(self._path)!r} cannot be written: {error.strerror}") from error
