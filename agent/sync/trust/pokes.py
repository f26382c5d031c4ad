"""What pokes make due. Never trusted: whoever has the broker may send any, and any number of them.

Rules:
 1. a poke is kept until the follower takes it: the last one to all devices, and the last one to this device; one that comes
    later takes its place, so a flood costs the memory of two;
 2. pokes are taken HEARD_AT_ONCE at a time, then one each HEARD_EVERY_S: verifying what they carry costs some hundredths of a
    second;
 3. a look that a poke makes due comes within the spread that the poke names, at this device's own moment of it: a hash of its
    id, so that the devices of a fleet are spread evenly; a poke that cannot be believed spreads it over BAD_SPREAD_S at least;
 4. looks because of pokes are made LOOKS_AT_ONCE at a time, then one each LOOK_EVERY_S. Nothing that a broker says makes a
    device ask its server more often.
"""

from __future__ import annotations

import hashlib
import threading

from agent.contract.news import MAX_POKE_BYTES

HEARD_AT_ONCE, HEARD_EVERY_S = 20, 1.0
LOOKS_AT_ONCE, LOOK_EVERY_S = 10, 30.0
"""A rollout of several waves with gates that take seconds fits into the first looks; nobody brings out waves for minutes like
that."""

LONGEST_SPREAD_S = 3600.0
BAD_SPREAD_S = 60.0

NEVER = float("inf")


class Allowance:
    """So many at once, then one each `every_s`. Not thread-safe."""

    def __init__(self, at_once: int, every_s: float) -> None:
        self._at_once, self._every_s = at_once, every_s
        self._left, self._since = float(at_once), 0.0

    def at(self, now: float) -> float:
        """When the next one is allowed, `now` or later."""
        self._refill(now)
        return now if self._left >= 1.0 else now + (1.0 - self._left) * self._every_s

    def take(self, now: float) -> None:
        self._refill(now)
        self._left -= 1.0

    def _refill(self, now: float) -> None:
        self._left = min(self._at_once, self._left + max(0.0, now - self._since) / self._every_s)
        self._since = now


class Pokes:
    """What came and what it made due, by a clock that is given (seconds that never go back). `put` is for any thread, the rest
    for the follower's.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._waiting: dict[bool, bytes] = {}  # whether it was for this device alone → what it said
        self._hearing = Allowance(HEARD_AT_ONCE, HEARD_EVERY_S)
        self._looking = Allowance(LOOKS_AT_ONCE, LOOK_EVERY_S)
        self._look_at = NEVER
        self.quiet_until = float("-inf")
        """Until when the server, which is busy, asked not to be asked."""

    def put(self, payload: bytes, *, alone: bool) -> None:
        """A poke came. One that is too large is kept as one that says nothing readable."""
        with self._lock:
            self._waiting[alone] = payload if len(payload) <= MAX_POKE_BYTES else b"too large"

    def take(self, now: float) -> tuple[bytes, bool] | None:
        """A poke that may be read now, and whether it was for this device alone; those first."""
        with self._lock:
            if not self._waiting or self._hearing.at(now) > now:
                return None
            self._hearing.take(now)
            alone = max(self._waiting)
            return self._waiting.pop(alone), alone

    def want_look(self, now: float, spread_s: float) -> None:
        """Makes a look due, unless an earlier one is."""
        at = now + min(LONGEST_SPREAD_S, max(0.0, spread_s)) * place(self._device)
        self._look_at = min(self._look_at, max(at, self._looking.at(now), self.quiet_until))

    def look_due(self, now: float) -> bool:
        """Whether a look is due; it is taken for made."""
        if now < self._look_at:
            return False
        self._looking.take(now)
        self._look_at = NEVER
        return True

    def looked(self) -> None:
        """A look was made for another reason: what pokes wanted is done."""
        self._look_at = NEVER

    def next_at(self, now: float) -> float:
        """When something is due."""
        with self._lock:
            heard_at = self._hearing.at(now) if self._waiting else NEVER
        return min(heard_at, self._look_at)


def place(device: str) -> float:
    """The device's place in every spread, from 0 until before 1."""
    return int.from_bytes(hashlib.sha256(f"spread\0{device}".encode()).digest()[:4], "big") / 2**32
