"""SIGTERM and SIGINT as something to wait for."""

from __future__ import annotations

import os
import select
import signal
from types import FrameType


class Ending:
    """Set by the first SIGTERM or SIGINT while the `with` block runs; only for the main thread.

    Not a threading.Event: a handler runs between any two steps of the main thread, also while that holds the event's own lock.
    """

    def __init__(self) -> None:
        self._is_set = False

    def __enter__(self) -> Ending:  # noqa: PYI034 - typing.Self came with Python 3.11
        self._told = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._told)

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until it is set or the time has passed; whether it is set."""
        select.select([self._told], [], [], timeout_s)
        return self._is_set

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if not self._is_set:
            self._is_set = True
            os.eventfd_write(self._told, 1)
