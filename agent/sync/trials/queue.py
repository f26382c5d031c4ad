"""Whose trial is next. Each measures how fast its model is, so as a rule there is one at a time."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator

import psutil

from agent.sync.ports import Stop
from agent.sync.problems import Stopped

STOP_ASKED_S = 0.2
"""How often one that waits asks whether it should stop."""

CORES_PER_THREAD = 4
"""A second trial begins only where this many cores are there for every thread of all trials: fewer, and they would measure each
other."""


def available_bytes() -> int:
    """Memory that could be used now without swapping."""
    return int(psutil.virtual_memory().available)


class TrialQueue:
    """Lets in the smallest priority number first, the first to come among equals. A second one is let in while another runs
    only when memory for the limits of both is free, and cores for both. Thread-safe.
    """

    def __init__(self, free_bytes: Callable[[], int] = available_bytes, cores: int = os.cpu_count() or 1) -> None:
        self._free_bytes = free_bytes
        self._cores = cores
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int]] = []
        self._running: list[tuple[int, int]] = []
        self._tickets = itertools.count()

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many have their turn now."""
        return len(self._running)

    @contextlib.contextmanager
    def turn(self, priority: int, need_bytes: int, threads: int, stop: Stop) -> Iterator[None]:
        """Waits for a turn, which lasts as long as the block.  Raises: Stopped when `stop` says so before it comes."""
        ticket, runs = (priority, next(self._tickets)), (need_bytes, max(1, threads))
        with self._changed:
            self._waiting.append(ticket)
            try:
                while min(self._waiting) != ticket or not self._room(runs):
                    if stop():
                        raise Stopped
                    self._changed.wait(STOP_ASKED_S)
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
            self._running.append(runs)
        try:
            yield
        finally:
            with self._changed:
                self._running.remove(runs)
                self._changed.notify_all()

    def _room(self, runs: tuple[int, int]) -> bool:
        if not self._running:
            return True
        all_of_them = [*self._running, runs]
        cores = CORES_PER_THREAD * sum(threads for _, threads in all_of_them)
        return cores <= self._cores and sum(need for need, _ in all_of_them) <= self._free_bytes()
