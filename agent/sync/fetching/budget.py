"""The bytes per second and the hours of the day that all downloads of this device share."""

from __future__ import annotations

import datetime as dt
import heapq
import itertools
import threading
import time
from collections.abc import Callable

from agent.contract.assignment import Window
from agent.sync.gates import windows
from agent.sync.ports import Clock, Stop
from agent.sync.problems import Stopped

BURST_S = 1.0
"""What was not used may be saved up, for this many seconds of the limit. Longer bursts disturb a camera on the same link."""

STOP_ASKED_S = 0.25
"""How often someone who waits asks whether to give up."""


class Budget:
    """Thread-safe. Without a limit and without hours it costs one comparison."""

    def __init__(
        self,
        clock: Clock,
        *,
        limit_bytes_per_s: int = 0,
        window: Window | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """`limit_bytes_per_s` 0: no limit. `pause` waits for seconds."""
        self._clock = clock
        self._limit = limit_bytes_per_s
        self._window = window
        self._pause = pause
        self._lock = threading.Lock()
        self._queue: list[tuple[int, int]] = []
        self._tickets = itertools.count()
        self._saved = float(limit_bytes_per_s) * BURST_S
        self._filled = clock.monotonic()

    @property
    def waiting(self) -> int:
        """How many wait for their bytes."""
        return len(self._queue)

    def wait_for(self, count: int, priority: int, stop: Stop) -> float:
        """Returns when `count` bytes may pass, a smaller priority first; the seconds that it took.  Raises: Stopped."""
        if self._limit <= 0:
            return 0.0
        began = self._clock.monotonic()
        ticket = (priority, next(self._tickets))
        with self._lock:
            heapq.heappush(self._queue, ticket)
        try:
            while (left_s := self._try(ticket, count)) > 0:
                if stop():
                    raise Stopped
                self._pause(min(left_s, STOP_ASKED_S))
        finally:
            with self._lock:
                self._queue.remove(ticket)
                heapq.heapify(self._queue)
        return self._clock.monotonic() - began

    def _try(self, ticket: tuple[int, int], count: int) -> float:
        """Seconds to wait before asking again; 0 when the bytes may pass. What is saved up may go below zero once for one that
        asks for more than ever is: everybody else waits for that.
        """
        with self._lock:
            now = self._clock.monotonic()
            self._saved = min(self._limit * BURST_S, self._saved + (now - self._filled) * self._limit)
            self._filled = now
            needed = min(count, self._limit * BURST_S)
            if self._queue[0] == ticket and self._saved >= needed - 1e-6:
                self._saved -= count
                return 0.0
            return max((needed - self._saved) / self._limit, 0.01)

    def open(self) -> bool:
        """Whether this is an hour for downloads."""
        if self._window is None:
            return True
        return windows.is_open(self._window, dt.datetime.fromtimestamp(self._clock.wall()).astimezone())

    def wait_open(self, stop: Stop) -> None:
        """Returns in an hour for downloads.  Raises: Stopped."""
        while not self.open():
            if stop():
                raise Stopped
            self._pause(STOP_ASKED_S)


def hours(text: str) -> Window | None:
    """`22:00-06:00` as a window of every day; None for an empty text."""
    if not text:
        return None
    start, end = (int(hour) * 60 + int(minute) for hour, minute in (moment.split(":") for moment in text.split("-")))
    return Window(start_minute=start, end_minute=end)
