"""Hears the interpreter's audit events (sys.addaudithook): every file operation of this process, whoever makes it.

A hook stays for good and slows all that follows. Besides, where there is one, threads that begin under a tracer such as coverage's fail
now and then (CPython 3.11: "another trace function is being installed"). So it is installed when a test first listens, not when its file
is imported, and tests that listen are marked `alone` or `survival`, which nothing traces.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

Listener = Callable[[str, tuple[Any, ...]], None]

_listeners: list[Listener] = []


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Calls `listener` with the name and the arguments of every event meanwhile."""
    _install()
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@cache
def _install() -> None:
    sys.addaudithook(_hear)


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    for listener in _listeners:
        listener(event, arguments)
