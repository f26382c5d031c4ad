"""Memory for bodies that do not fit a connection's own buffer: reused while warm, bounded in sum."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

KEEP_BYTES = 16 * 1024 * 1024  # what idle buffers may hold; a page that was touched before costs no fault
SMALLEST_BYTES = 64 * 1024
ALIGNMENT = 64  # a cache line, and more than any datatype or vector unit asks for
LARGE_BODIES_AT_ONCE = 4  # of max_body_bytes: bounds what hostile clients can make the server hold
TOO_MANY = "too many large requests at once: try again"


class Exhausted(Exception):
    """So many large bodies are under way that another one would exceed the bound."""


class BufferPool:
    """Lends arrays of at least a size, their contents undefined. Last in, first out: the warmest is reused."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._lent = 0
        self._kept = 0
        self._idle: dict[int, list[Bytes]] = {}
        self._lock = threading.Lock()

    def lend(self, size: int) -> Bytes:
        """Raises: Exhausted."""
        size = _rounded(size)
        with self._lock:
            self._charge(size)
            idle = self._idle.get(size)
            if idle:
                self._kept -= size
                return idle.pop()
        return empty(size)

    def give_back(self, buffer: Bytes) -> None:
        size = len(buffer)
        with self._lock:
            self._lent -= size
            if self._kept + size <= KEEP_BYTES:
                self._kept += size
                self._idle.setdefault(size, []).append(buffer)

    def charge(self, size: int) -> None:
        """Counts memory that somebody else holds as lent; `refund` it.  Raises: Exhausted."""
        with self._lock:
            self._charge(size)

    def refund(self, size: int) -> None:
        with self._lock:
            self._lent -= size

    def _charge(self, size: int) -> None:
        if self._lent and self._lent + size > self._limit:
            raise Exhausted
        self._lent += size


def empty(size: int) -> Bytes:
    """Undefined bytes that begin at a multiple of ALIGNMENT. Not cleared: that would take the thread which polls tens of
    milliseconds.
    """
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]


def aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A copy that begins at a multiple of ALIGNMENT. An engine's sums depend, in their last bits, on where its vectors begin:
    the same request is to get the same answer wherever its bytes came to lie.
    """
    copy = empty(array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _rounded(size: int) -> int:
    """Up to the next of four steps per power of two: at most a quarter is wasted, and sizes meet again."""
    if size <= SMALLEST_BYTES:
        return SMALLEST_BYTES
    step = 1 << (size.bit_length() - 3)
    return -(-size // step) * step
