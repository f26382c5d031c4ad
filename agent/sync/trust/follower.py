"""The thread that asks the fleet what is wanted: at intervals, and whenever a poke comes."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable

from agent.contract.reasons import Reason
from agent.sync.problems import Problem
from agent.sync.trust.client import Trust
from agent.sync.trust.desired import Desired

log = logging.getLogger(__name__)

FIRST_RETRY_S = 5.0


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
    ) -> None:
        """`imported`: what a bundle that came meanwhile says, if it was accepted. Without `networked` nobody else is asked."""
        self._imported = imported
        self._networked = networked
        self._at_most_s = at_most_s
        self._trust = trust
        self._interval_s = interval_s
        self._changed = changed
        self._looked = looked
        self._jitter = jitter
        self._poked = threading.Event()
        self._stop = threading.Event()
        self._failures = 0
        self.current = trust.remembered()
        self.problem: Problem | None = None

    def poke(self) -> None:
        """Makes the next look due now."""
        self._poked.set()

    def stop(self) -> None:
        self._stop.set()
        self._poked.set()

    def run(self) -> None:
        while not self._stop.is_set():
            self._poked.clear()
            self.look()
            try:
                self._looked()
            except Exception:
                log.exception("what follows a look at the fleet failed in a way that was not foreseen")
            self._poked.wait(self.pause_s())

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
            news = self.problem is None or self.problem.reason is not problem.reason
            if news:
                log.warning("the fleet's word cannot be learnt: %s: %s", problem.reason.value, problem)
            self.problem = problem
        else:
            self._failures = 0
            news = self.problem is not None or self.current is None or self.current.assignment != current.assignment
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
        failure.
        """
        pause_s = min(self._interval_s, self._at_most_s())
        if self._failures:
            pause_s = min(pause_s, FIRST_RETRY_S * 2.0 ** min(self._failures - 1, 16))
        return pause_s * (0.75 + 0.5 * self._jitter())
