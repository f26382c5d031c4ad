"""SIGTERM and SIGINT as something to wait for."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from types import FrameType


class Ending:
    """Set by the first SIGTERM or SIGINT while the `with` block runs; only for the main thread.

    Not a threading.Event: a handler runs between any two steps of the main thread, also while that holds the event's own lock.
    And not only something that the handler writes to: a signal that arrives right before the main thread begins to wait, or
    that the kernel gives to another thread, does not end that wait. The interpreter itself writes to the pipe, whichever thread
    it is in.
    """

    def __init__(self) -> None:
        self._is_set = False

    def __enter__(self) -> Ending:  # noqa: PYI034 - typing.Self came with Python 3.11
        self._told, self._tell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._waker_before = signal.set_wakeup_fd(self._tell, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._waker_before)
        os.close(self._told)
        os.close(self._tell)

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout_s: float | None = None, *, or_readable: int | None = None) -> bool:
        """Until it is set, the time has passed, or that descriptor can be read; whether it is set."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._is_set:
            left_s = None if end is None else end - time.monotonic()
            if left_s is not None and left_s <= 0:
                break
            others = [] if or_readable is None else [or_readable]
            ready, _, _ = select.select([self._told, *others], [], [], left_s)
            with contextlib.suppress(BlockingIOError):
                os.read(self._told, 4096)  # other signals are told here too
            if or_readable in ready:
                break
        return self._is_set

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._is_set = True
        with contextlib.suppress(BlockingIOError):  # full: whoever waits will wake
            os.write(self._tell, b"\0")
