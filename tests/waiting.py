"""Waiting for a condition, with a limit."""

import threading
import time

LIMIT_S = 10.0


def wait_until(condition, limit_s=LIMIT_S, what="it came to that"):
    """Until `condition()` is true.  Raises: AssertionError after `limit_s`."""
    deadline, pause = time.monotonic() + limit_s, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not in {limit_s:g} s: {what}"
        pause.wait(0.001)
