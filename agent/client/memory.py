"""Memory shared with the server: memfds with their size sealed, and arrays that lie in them."""

from __future__ import annotations

import fcntl
import itertools
import math
import mmap
import os
import threading
import weakref
from bisect import bisect_right
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
ALIGNMENT = 64
_numbers = itertools.count(1)


class Memory:
    """One memfd of `size` bytes at least, mapped here. Closed when no array lies in it and nobody keeps it."""

    def __init__(self, size: int) -> None:
        """Raises: OSError."""
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.name = f"m{next(_numbers)}"
        self.fd = os.memfd_create("edge-agent", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, self.size)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
        self.map = mmap.mmap(self.fd, self.size)
        self.bytes: NDArray[np.uint8] = np.frombuffer(self.map, np.uint8)
        self.start: int = self.bytes.ctypes.data


class _Held(np.ndarray[Any, Any]):
    """Keeps its Memory; views of it keep this array."""

    memory: Memory


class Arrays:
    """The arrays that an app made in shared memory, found again by where they lie. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._starts: list[int] = []
        self._memories: list[weakref.ref[Memory]] = []

    def make(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A C-contiguous array of zeros in a memory of its own.  Raises: OSError, ValueError for a dtype with objects."""
        kind = np.dtype(dtype).newbyteorder("<")
        if kind.hasobject:
            raise ValueError(f"dtype {kind} has no fixed bytes and cannot be shared")
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        memory = Memory(max(math.prod(shape) * kind.itemsize, 1))
        held = _Held((memory.size,), np.uint8, memory.map)
        held.memory = memory
        with self._lock:
            at = bisect_right(self._starts, memory.start)
            self._starts.insert(at, memory.start)
            self._memories.insert(at, weakref.ref(memory, self._forget))
        return np.ndarray(shape, kind, held.data)

    def _forget(self, gone: weakref.ref[Memory]) -> None:
        with self._lock:
            at = self._memories.index(gone)
            del self._memories[at], self._starts[at]

    def place(self, array: NDArray[Any]) -> tuple[Memory, int] | None:
        """The memory that the whole C-contiguous `array` lies in, and its offset there; None when it lies elsewhere."""
        if not self._starts:
            return None
        start = array.__array_interface__["data"][0]
        with self._lock:
            at = bisect_right(self._starts, start) - 1
            memory = self._memories[at]() if at >= 0 else None
        if memory is None or start + array.nbytes > memory.start + memory.size:
            return None
        return memory, start - memory.start
