"""Asks the server the way a client does: a watchdog that is fed by anything less would say that a stuck server is well."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from agent.common import systemd
from agent.host import unix

log = logging.getLogger(__name__)

REQUEST = b"GET /v2/health/live HTTP/1.1\r\nhost: self\r\nconnection: close\r\n\r\n"
TIMEOUT_S = 5.0


def answers(address: str | bytes, timeout_s: float = TIMEOUT_S) -> bool:
    """Whether the server at the Unix socket `address` says that it lives."""
    try:
        with unix.connect(address, timeout_s) as client:
            client.sendall(REQUEST)
            answer = client.recv(64)
            while client.recv(1024):
                pass
    except OSError:
        return False
    return answer.startswith(b"HTTP/1.1 200 ")


class Watchdog:
    """Pings systemd as long as the server answers. Does nothing where systemd does not watch."""

    def __init__(self, check: Callable[[], bool]) -> None:
        self._check = check
        self._interval_s = systemd.watchdog_interval_s(os.environ)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog")

    def start(self) -> None:
        if self._interval_s is not None:
            self._thread.start()

    def stop(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(self._interval_s):
            if self._check():
                systemd.notify("WATCHDOG=1")
            else:
                log.error("the server does not answer on its own socket: the watchdog is not pinged")
