"""Ends a download that trickles. A limit on the silence between two packets does not: a byte every 19 s passes it."""

from __future__ import annotations

from agent.contract.reasons import Reason
from agent.sync.ports import Clock
from agent.sync.problems import Problem

GRACE_S = 60.0
"""Added to the time a blob may take, so that a small one survives a slow handshake."""

RATE_WINDOW_S = 30.0
"""Throughput is judged over this long: mobile links stall for 10 to 20 s when they change cells."""


class MinimumSpeed:
    """Judges one source while it sends. Time in which this device did not read, because of its own limit, does not count."""

    def __init__(self, clock: Clock, min_bytes_per_s: int, bytes_to_go: int) -> None:
        self._clock = clock
        self._min = min_bytes_per_s
        self._excused_s = 0.0
        self._received = 0
        self._end = self._now() + GRACE_S + bytes_to_go / min_bytes_per_s
        self._window: tuple[float, int] | None = None

    def excuse(self, seconds: float) -> None:
        """Leaves out seconds for which this device made the source wait."""
        self._excused_s += seconds

    def check(self, count: int) -> None:
        """Notes that `count` more bytes came.  Raises: Problem when the last window was slower than allowed, or the whole takes
        too long.
        """
        now = self._now()
        self._received += count
        if self._window is None:
            self._window = (now, self._received)
        elif now - self._window[0] >= RATE_WINDOW_S:
            rate = (self._received - self._window[1]) / (now - self._window[0])
            if rate < self._min:
                raise Problem(
                    Reason.SLOW_RETRIEVAL, f"the download runs at {rate:.0f} bytes/s, at least {self._min} are demanded"
                )
            self._window = (now, self._received)
        if now > self._end:
            raise Problem(Reason.SLOW_RETRIEVAL, "the download took longer than its size allows")

    def _now(self) -> float:
        return self._clock.monotonic() - self._excused_s
