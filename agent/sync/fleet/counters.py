"""Numbers that only grow, across restarts, reboots and a lost disk."""

from __future__ import annotations

import threading
from pathlib import Path

from agent.common import files
from agent.contract.codec import ContractError, decode, encode
from agent.sync.ports import Clock


class Counter:
    """A number larger than every one before it. It follows the clock (milliseconds since the epoch), so that a device whose
    disk was replaced goes on above what the fleet has seen; and it grows by one where the clock does not.
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self.value = _read(path)

    def next(self) -> int:
        """The next value, durable before it is returned.  Raises: OSError."""
        with self._lock:
            value = max(self.value + 1, int(self._clock.wall() * 1000))
            files.write(self._path, encode({"value": value}), mode=0o600)
            self.value = value
            return value


def _read(path: Path) -> int:
    try:
        return decode(path.read_bytes(), dict[str, int], limit_bytes=1024).get("value", 0)
    except (FileNotFoundError, ContractError):
        return 0
