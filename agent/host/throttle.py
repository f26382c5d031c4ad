"""Whether this machine has time and cool air for work that nobody waits for."""

from __future__ import annotations

import os
import time
from pathlib import Path

THERMAL = Path("/sys/class/thermal")
LOOK_S = 1.0  # temperatures move in seconds, and reading a zone may ask a slow chip


class Throttle:
    """`max_load` is the load average of the last minute per core, `max_celsius` that of the hottest zone; 0: not asked. Any
    thread may ask.
    """

    def __init__(self, max_load: float, max_celsius: float, thermal: Path = THERMAL) -> None:
        self._max_load = max_load
        self._max_celsius = max_celsius
        self._thermal = thermal
        self._looked_s = float("-inf")
        self._reason: str | None = None

    def reason(self) -> str | None:
        """Why such work has to wait; None when it need not."""
        now = time.monotonic()
        if now - self._looked_s >= LOOK_S:
            self._looked_s = now
            self._reason = self._look()
        return self._reason

    def _look(self) -> str | None:
        load = os.getloadavg()[0] / (os.cpu_count() or 1)
        if 0 < self._max_load < load:
            return f"the load is {load:.2f} per core, above {self._max_load:g}"
        hottest = self.celsius() if self._max_celsius > 0 else None
        if hottest is not None and hottest > self._max_celsius:
            return f"the device has {hottest:.0f} °C, above {self._max_celsius:g}"
        return None

    def celsius(self) -> float | None:
        """The temperature of the hottest zone; None where there is none that can be read."""
        found = [_celsius(zone) for zone in self._thermal.glob("thermal_zone*/temp")]
        return max((value for value in found if value is not None), default=None)


def _celsius(zone: Path) -> float | None:
    try:
        return int(zone.read_text()) / 1000
    except (OSError, ValueError):
        return None  # it is switched off
