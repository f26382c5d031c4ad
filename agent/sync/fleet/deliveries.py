"""Which of this device's state reports have reached the broker: the proof that a device can still be heard."""

from __future__ import annotations

import threading

from agent.sync.ports import Clock

REMEMBERED = 16
"""Reports on their way whose time is kept. The outbox holds one, the link a handful in flight."""


class Deliveries:
    """Thread-safe. Times are of the monotonic clock; nothing is remembered over a restart, after which the next report
    tells.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._begun: dict[int, float] = {}
        self._told: float | None = None
        self._heard: float | None = None

    def put(self, item: int, begun: float) -> None:
        """A report that says how things stood at `begun` is in the outbox as `item`."""
        with self._lock:
            self._begun[item] = begun
            while len(self._begun) > REMEMBERED:
                del self._begun[next(iter(self._begun))]

    def delivered(self, item: int) -> None:
        """The broker acknowledged the message."""
        with self._lock:
            begun = self._begun.pop(item, None)
            if begun is not None:
                self._told = begun if self._told is None else max(self._told, begun)
                self._heard = self._clock.monotonic()

    def since(self, moment: float) -> bool:
        """Whether the broker has a report that was begun after `moment`."""
        with self._lock:
            return self._told is not None and self._told > moment

    def lately(self, within_s: float) -> bool:
        """Whether a report was acknowledged in the last `within_s` seconds."""
        with self._lock:
            return self._heard is not None and self._clock.monotonic() - self._heard <= within_s
