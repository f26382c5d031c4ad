"""What the server's link to its broker is, whichever broker that is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from fleet_server.ingest.flood import FloodWatch


class Link(Protocol):
    """Stores what devices say and publishes what they are sent, between `start` and `stop`. For any thread."""

    connected: threading.Event
    """Set while messages of devices arrive; where they are only published, while that can be done."""
    flood: FloodWatch
    on_connected: Callable[[], None]
    """Called at each new connection. Must not block for long."""
    on_flood: Callable[[str, float], None]
    """Told once that a device floods, and for how many seconds it is paused. Must not block."""
    on_arrived: Callable[[set[str]], None]
    """Told which devices are there anew, by a broker that keeps no poke for them."""

    @property
    def problem(self) -> str:
        """Why it is not connected, if that is known."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """`retain`: the broker keeps it for who subscribes later, if it keeps anything."""

    def renew(self) -> None:
        """Shows the broker the certificate that is on the disk, from the next connection on."""

    def heard_since(self) -> float:
        """Since when messages of devices arrive; now while they do not."""
