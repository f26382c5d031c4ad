"""The control thread's work: connections whose request changes models, and chores that others give it, some for later."""

from __future__ import annotations

import heapq
import logging
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)


@dataclass(order=True)
class Deferred:
    """Work for later: not before `due_s`, a monotonic time."""

    due_s: float
    do: Callable[[], None] = field(compare=False)


class ControlThread:
    """The work of one thread, which is in `work`; any other may `put`, `defer` and `end`."""

    def __init__(self, attend: Callable[[Any], None]) -> None:
        self._attend = attend
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def put(self, item: object) -> None:
        """Gives `item` to `attend`, which never raises, on the control thread."""
        self._queue.put(item)

    def defer(self, do: Callable[[], None], delay_s: float = 0.0) -> None:
        """Calls `do` on the control thread after `delay_s`. What has not begun at the end is left undone."""
        self._queue.put(Deferred(time.monotonic() + delay_s, do))

    def end(self) -> None:
        self._queue.put(None)

    def work(self) -> None:
        later: list[Deferred] = []  # a heap
        while True:
            left_s = later[0].due_s - time.monotonic() if later else None
            if left_s is not None and left_s <= 0:
                _do(heapq.heappop(later))
                continue
            try:
                item = self._queue.get(timeout=left_s)
            except queue.Empty:
                continue
            if item is None:
                return
            if isinstance(item, Deferred):
                heapq.heappush(later, item)
            else:
                self._attend(item)


def _do(work: Deferred) -> None:
    try:
        work.do()
    except Exception:
        log.exception("work of the control thread failed in an unforeseen way")
