"""Work that can wait: done by a thread to which every other one on this machine goes first."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

NICE = 10


def lower() -> None:
    """The calling thread gives way to the others, for the rest of its life."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(NICE, os.getpriority(os.PRIO_PROCESS, 0)))


def in_background(work: Callable[[], None]) -> None:
    """Does `work` in a thread of low priority and waits for it.  Raises: whatever it raises."""
    failures: list[BaseException] = []

    def run() -> None:
        lower()
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - it is raised where it was waited for
            failures.append(error)

    thread = threading.Thread(target=run, name="background")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
