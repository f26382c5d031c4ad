"""How many threads there are, and what for."""

from __future__ import annotations


def loop_threads(threads: int) -> int:
    """How many threads a loop has that was allowed so many: one polls at any time, so that a run keeps no other request,
    timeout or health check waiting, and at least one other runs.
    """
    return max(2, threads)


def busy_threads(threads: int) -> int:
    """How many of them may be at long work: all but the one that polls."""
    return loop_threads(threads) - 1
