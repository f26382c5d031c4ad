"""How the polling thread waits: asleep, or for a moment awake.

A client that is alone and asks again at once has the thread fall asleep and be woken for each request, on a processor that goes
to sleep with it. For a small model that takes longer than the answer. So after some such requests in a row the thread looks
again and again for a moment before it sleeps, some times as long as this client usually takes. It pays only while the client
has a processor of its own: where another took this one from the thread meanwhile, or nothing came (as when the client waits for
this very processor), the thread sleeps through ever more requests before it tries again.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SPIN_S = 250e-6  # a client that asks again sooner than that is prompt
PROMPT_ROUNDS = 4  # so many in a row by the same client, before it is waited for awake
USUAL_TIMES = 3  # so many times as long as the client usually takes is it waited for awake,
USUAL_SPARE_S = 50e-6  # and this much longer
USUAL_SHARE = 1 / 8  # of the newest wait in what is usual: another client is known before it is waited for awake
LOST_S = 20e-6  # one poll takes 1 to 3 µs; between two that lie so far apart somebody else had the processor
MOST_FAILURES = 6  # in a row that count: then 4 to the power of 5 rounds asleep

Events = list[tuple[int, int]]


class Spinner:
    """The polls of one thread at a time. `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last = -1  # the descriptor that had something last
        self._usual_s = SPIN_S  # the wait for a prompt client
        self._rounds = 0  # prompt ones in a row; below 0: still to be slept through
        self._failures = 0

    def poll(self, poll: Callable[[float], Events], longest_s: float) -> Events:
        """What `poll` finds within `longest_s`, asleep or awake."""
        clock = self._clock
        began = now = clock()
        found: Events = []
        if self._rounds >= PROMPT_ROUNDS:
            alone, until = True, began + min(SPIN_S, USUAL_TIMES * self._usual_s + USUAL_SPARE_S)
            while not found and now < until:
                asked, found = now, poll(0)
                now = clock()
                alone = alone and now - asked < LOST_S
            if alone and found:
                self._failures = 0
            else:
                self._failures = min(self._failures + 1, MOST_FAILURES)
                self._rounds = PROMPT_ROUNDS - 1 - 4 ** (self._failures - 1)
        if not found:
            found = poll(longest_s)
            now = clock()
        if len(found) == 1 and found[0][0] == self._last and now - began < SPIN_S:
            self._rounds += 1
            self._usual_s += USUAL_SHARE * (now - began - self._usual_s)
        else:
            self._rounds = min(self._rounds, 0)
            self._last = found[0][0] if found else -1
        return found
