"""Follows a fleet server that moves: asks whether it answers at an address that the fleet named, or, while it does not at the present
one, at the earlier ones, and has everything go where it does. What is better is decided in `agent/sync/addresses.py`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from agent.contract.addresses import Addresses
from agent.sync import addresses
from agent.sync.addresses import Known, Ways
from agent.sync.ports import Clock

log = logging.getLogger(__name__)

LOST_S = 20.0
"""The broker's absence that makes a device ask elsewhere, and up to twice as long, each device at its own moment: a server that is
restarted is back sooner.
"""

FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 900.0
LONGEST_SPREAD_S = 600.0
NEVER = float("inf")


class Mover:
    """Owns what is known of addresses. Asks in a thread of its own, which sleeps while there is nothing to ask."""

    def __init__(
        self, folder: Path, known: Known, clock: Clock, place: float, ask: Callable[[Addresses], Ways], moved: Callable[[Known], None]
    ) -> None:  # fmt: skip
        """`folder` is that of the identity. `place`, from 0 to 1, is this device's moment when a whole fleet hears of an address.
        `moved` is told after it was made durable that another address is in use.
        """
        self._folder, self._clock, self._place = folder, clock, place
        self._lost_s = LOST_S * (1 + place)
        self._ask, self._moved = ask, moved
        self._lock = threading.Lock()
        self.known = known
        self._lost_at: float | None = clock.monotonic()
        self._awaited_from = clock.monotonic()
        self._rest_until = float("-inf")  # after asking in vain
        self._fruitless = 0
        self._woken, self._stop = threading.Event(), threading.Event()

    def told(self, said: Addresses | None) -> None:
        """The fleet named an address; by a document that is signed, or over a connection that its CA vouches for."""
        if said is None:
            return
        with self._lock:
            known = addresses.hear(self.known, said)
            if known is self.known:
                return
            self._keep(known)
            spread_s = min(LONGEST_SPREAD_S, max(0.0, said.spread_s))
            self._awaited_from = self._clock.monotonic() + spread_s * self._place
            self._begin_anew()
        if known.awaited is not None:
            log.info(
                "the fleet server is to be found at %s, broker %s: going there once it answers", said.device_url, said.broker
            )
        self._woken.set()

    def connected(self, connected: bool) -> None:
        """Whether there is a connection to the broker."""
        with self._lock:
            if connected is (self._lost_at is None):
                return
            self._lost_at = None if connected else self._clock.monotonic()
            self._begin_anew()
        self._woken.set()

    def run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                rest_s = self._due_at() - self._clock.monotonic()
            self._woken.wait(None if rest_s == NEVER else max(0.0, rest_s))
            self._woken.clear()
            if not self._stop.is_set():
                self.turn()

    def stop(self) -> None:
        self._stop.set()
        self._woken.set()

    def turn(self) -> None:
        """Asks what is due, and goes there if it is better."""
        with self._lock:
            now, known = self._clock.monotonic(), self.known
            if now < self._due_at():
                return
            lost = self._lost_at is not None and now - self._lost_at >= self._lost_s
        better = self._better(known, addresses.to_ask(known, lost=lost))
        with self._lock:
            if self.known is not known:  # the fleet named another one meanwhile
                return
            if better is None:
                pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(self._fruitless, 16))
                self._rest_until = self._clock.monotonic() + pause_s * (0.75 + 0.5 * self._place)
                self._fruitless += 1
                return
            self._keep(moved := addresses.gone_to(known, better, self._clock.wall()))
            self._lost_at = self._clock.monotonic() if self._lost_at is not None else None
            self._begin_anew()
        self._moved(moved)

    def _due_at(self) -> float:
        at = NEVER if self.known.awaited is None else self._awaited_from
        if self._lost_at is not None and self.known.others:
            at = min(at, self._lost_at + self._lost_s)
        return max(at, self._rest_until)

    def _begin_anew(self) -> None:
        self._fruitless, self._rest_until = 0, float("-inf")

    def _better(self, known: Known, candidates: tuple[Addresses, ...]) -> Addresses | None:
        here = self._ask(known.used)
        for one in candidates:
            if self._stop.is_set():
                return None
            there = self._ask(one)
            if addresses.is_better(known, one, there, here):
                return one
            log.info("the fleet server answers at %s by %s, here by %s: staying", one.device_url, _words(there), _words(here))
        return None

    def _keep(self, known: Known) -> None:
        self.known = known
        try:
            addresses.write(self._folder, known)
        except OSError as error:
            log.warning("the fleet server's addresses could not be kept: %s", error)


def _words(ways: Ways) -> str:
    return " and ".join(sorted(ways)) or "nothing"
