"""Tells a device that floods from one that has much to say. Pure.

A device may send what an agent has kept that was away for days, at once, and go on at a rate that none of ours comes near. Whoever
sends more is paused: nothing of it counts until the pause ends. Each further one within an hour is twice as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

BURST, BURST_BYTES = 2500, 32 * 1024 * 1024  # an agent's outbox holds 2000 messages, 16 MiB
RATE, RATE_BYTES = 100.0, 1024.0 * 1024  # per second; an agent sends a few in a minute, and asks for parts of files
PAUSE_S, LONGEST_PAUSE_S = 60.0, 3600.0
FORGIVEN_S = 3600.0


class _Sender(msgspec.Struct):
    seen: float
    messages: float = 0.0
    bytes: float = 0.0
    """What it sent beyond the rate."""
    paused_until: float = -math.inf
    pauses: int = 0


class FloodWatch:
    """What each device has sent lately. One thread calls `is_paused`; the rest is for any."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives seconds and never goes back."""
        self._clock = clock
        self._senders: dict[str, _Sender] = {}

    def is_paused(self, device: str, size_bytes: int) -> tuple[bool, float]:
        """Counts a message. Whether its sender is paused, and for how many seconds if the pause begins with it, else 0."""
        now = self._clock()
        sender = self._sender(device, now)
        if now < sender.paused_until:
            return True, 0.0
        passed = now - sender.seen
        sender.seen = now
        sender.messages = max(0.0, sender.messages - passed * RATE) + 1
        sender.bytes = max(0.0, sender.bytes - passed * RATE_BYTES) + size_bytes
        if sender.messages <= BURST and sender.bytes <= BURST_BYTES:
            return False, 0.0
        return True, self._pause(sender, now)

    def pause(self, device: str) -> float:
        """Pauses a device for another reason; for how many seconds, 0 when it is paused already."""
        now = self._clock()
        sender = self._sender(device, now)
        return 0.0 if now < sender.paused_until else self._pause(sender, now)

    def _sender(self, device: str, now: float) -> _Sender:
        return self._senders.get(device) or self._senders.setdefault(device, _Sender(now))

    def _pause(self, sender: _Sender, now: float) -> float:
        sender.pauses = 0 if now - sender.paused_until > FORGIVEN_S else sender.pauses + 1
        pause_s = min(PAUSE_S * 2.0**sender.pauses, LONGEST_PAUSE_S)
        sender.paused_until, sender.messages, sender.bytes = now + pause_s, 0.0, 0.0
        return pause_s

    def paused(self) -> list[str]:
        """The devices that are paused now."""
        now = self._clock()
        return sorted(device for device, sender in list(self._senders.items()) if now < sender.paused_until)
