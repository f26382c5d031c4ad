"""Answers, on their way out; and the end of the server, which makes every answer the last of its connection."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from agent.serving.answers import Answer
from agent.serving.transport import http
from agent.serving.transport.connection import Connection


class Stopping:
    """Whether, and since when, the loop is to end: `begun` once nobody new is let in, `over` once threads are to return."""

    def __init__(self) -> None:
        self.begun = False
        self.begun_s = 0.0  # a perf_counter
        self.over = False
        self.drained = threading.Event()  # nobody waits for an answer any more

    def begin(self) -> None:
        self.begun_s = time.perf_counter()
        self.begun = True


class Replies:
    """Sends answers. Any thread may call it, with a connection that it owns."""

    def __init__(self, close: Callable[[Connection], None], stopping: Stopping) -> None:
        self._close = close
        self._stopping = stopping

    def send(self, connection: Connection, answer: Answer) -> bool:
        """Sends an answer. True when the connection may be read from again; otherwise it is sending, draining, or closed."""
        if self._stopping.begun:
            connection.closing = True
        parts, size = http.encode(answer, connection.head, keep_alive=not connection.closing)
        if not connection.send(parts, size):
            self._close(connection)
            return False
        if connection.sending:
            return False
        connection.finished()
        if connection.closing:
            connection.end_output()
            return False
        return True

    def go_on(self, connection: Connection) -> bool:
        """Sends what the peer did not take before. True when all is sent and the connection may be read from again."""
        if not connection.flush():
            self._close(connection)
            return False
        if connection.sending:
            return False
        connection.finished()
        if connection.closing:
            connection.end_output()
            return False
        return True
