"""The thread that learns what the fleet wants: it asks at intervals, and hears what pokes carry, or asks because of them."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from agent.contract.codec import ContractError
from agent.contract.news import read_poke, unpack
from agent.contract.reasons import Reason
from agent.sync.problems import Problem
from agent.sync.trust.carried import NotCarried
from agent.sync.trust.client import Trust
from agent.sync.trust.desired import Desired
from agent.sync.trust.pokes import BAD_SPREAD_S, Pokes

log = logging.getLogger(__name__)

FIRST_RETRY_S = 5.0
OLDER = frozenset({Reason.METADATA_ROLLBACK, Reason.REPLAYED_ASSIGNMENT})


class Follower:
    """Knows what the fleet wants. `current` is the last verified word, also of an earlier process; `problem` why there is no
    newer.
    """

    def __init__(
        self,
        trust: Trust,
        interval_s: float,
        changed: Callable[[], None],
        looked: Callable[[], None] = lambda: None,
        jitter: Callable[[], float] = random.random,
        at_most_s: Callable[[], float] = lambda: float("inf"),
        imported: Callable[[], Desired | None] = lambda: None,
        networked: bool = True,
        device: str = "",
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`imported`: what a bundle that came meanwhile says, if it was accepted. Without `networked` nobody else is asked.
        `device` decides when this one looks of all that a poke reached.
        """
        self._monotonic = monotonic
        self._pokes = Pokes(device)
        self._asked = False
        self._look_at = float("-inf")
        self._look_by = float("inf")
        self._imported = imported
        self._networked = networked
        self._at_most_s = at_most_s
        self._trust = trust
        self._interval_s = interval_s
        self._changed = changed
        self._looked = looked
        self._jitter = jitter
        self._woken = threading.Event()
        self._stop = threading.Event()
        self._failures = 0
        self._wait_s = 0.0
        self.current = trust.remembered()
        self.problem: Problem | None = None

    def poked(self, payload: bytes, alone: bool) -> None:
        """A poke came, for this device `alone` or for all. For any thread; what it says is read in the follower's."""
        self._pokes.put(payload, alone=alone)
        self._woken.set()

    def look_soon(self) -> None:
        """Makes the next look due now. For what this machine knows itself, never for what a broker says."""
        self._asked = True
        self._woken.set()

    def look_by(self, at: float) -> None:
        """Makes a look due at that moment (monotonic) at the latest. As `look_soon`, for what this machine knows itself."""
        self._look_by = min(self._look_by, at)
        self._woken.set()

    def stop(self) -> None:
        self._stop.set()
        self._woken.set()

    def run(self) -> None:
        while not self._stop.is_set():
            self._woken.clear()
            self.turn()
            self._woken.wait(self.rest_s())

    def turn(self) -> None:
        """Does what is due."""
        while (poke := self._pokes.take(self._monotonic())) is not None:
            self._read(*poke)
        now = self._monotonic()
        if not (self._pokes.look_due(now) or self._asked or now >= min(self._look_at, self._look_by)):
            return
        self._asked = False
        if now >= self._look_by:
            self._look_by = float("inf")
        self._pokes.looked()
        self.look()
        try:
            self._looked()
        except Exception:
            log.exception("what follows a look at the fleet failed in a way that was not foreseen")
        now = self._monotonic()
        self._look_at = now + self.pause_s()
        self._pokes.quiet_until = self._look_at if self._wait_s else now

    def rest_s(self) -> float:
        """The seconds until something is due."""
        now = self._monotonic()
        return max(0.0, min(self._look_at, self._look_by, self._pokes.next_at(now)) - now)

    def _read(self, payload: bytes, alone: bool) -> None:
        """Hears what a poke says; makes a look due when that is not enough. Never raises, and is no reason to report a problem:
        whoever has the broker could make every device report one. An older word than is known is no news: the broker keeps the
        last poke to all for who connects, and metadata may have been renewed since.
        """
        spread_s = BAD_SPREAD_S
        try:
            poke = read_poke(payload)
            spread_s = poke.spread_s
            if poke.news and self._networked:
                self._hear(self._trust.hear(unpack(poke.news)))
                return
        except NotCarried as missing:
            log.debug("the poke did not bring %s: asking the server", missing)
        except (Problem, ContractError) as error:
            if not alone and isinstance(error, Problem) and error.reason in OLDER:
                return
            log.info("a poke is not believed: %s", error)
            spread_s = max(spread_s, BAD_SPREAD_S)
        except Exception:
            log.exception("a poke failed in a way that was not foreseen")
            spread_s = BAD_SPREAD_S
        self._pokes.want_look(self._monotonic(), spread_s)

    def _hear(self, said: Desired | None) -> None:
        if said is None:
            return
        news = self._is_news(said)
        self.current = said
        self._look_at = min(self._look_at, self._monotonic() + self.pause_s())  # it may have named a shorter lease
        if news:
            self._changed()

    def _is_news(self, said: Desired) -> bool:
        now = self.current
        return now is None or now.assignment != said.assignment or now.record != said.record

    def look(self) -> None:
        """Asks the fleet once. Never raises: whatever is wrong is in `problem`, and what was known stays."""
        if (said := self._imported()) is not None:
            self.current = said
            self._changed()
        if not self._networked:
            return
        try:
            current = self._refresh()
        except Problem as problem:
            self._failures += 1
            self._wait_s = problem.wait_s
            news = self.problem is None or self.problem.reason is not problem.reason
            if news:
                log.warning("the fleet's word cannot be learnt: %s: %s", problem.reason.value, problem)
            self.problem = problem
        else:
            self._failures, self._wait_s = 0, 0.0
            news = self.problem is not None or self._is_news(current)
            self.current, self.problem = current, None
        if news:
            self._changed()

    def _refresh(self) -> Desired:
        try:
            return self._trust.refresh()
        except Problem:
            raise
        except Exception as error:
            # A bug of ours, or a document that a library did not foresee: this thread must live, or the device would never
            # update again.
            log.exception("asking the fleet failed in a way that was not foreseen")
            raise Problem(
                Reason.BAD_SIGNATURE, f"the fleet's documents cannot be read: {type(error).__name__}: {error}"
            ) from error

    def pause_s(self) -> float:
        """The seconds until the next look: the interval, spread so that a fleet does not ask in step; sooner after a
        failure, but never before a busy server wants to be asked again.
        """
        pause_s = min(self._interval_s, self._at_most_s())
        if self._failures:
            pause_s = min(pause_s, FIRST_RETRY_S * 2.0 ** min(self._failures - 1, 16))
        jitter = self._jitter()
        return max(pause_s * (0.75 + 0.5 * jitter), self._wait_s * (1.0 + 0.5 * jitter))
