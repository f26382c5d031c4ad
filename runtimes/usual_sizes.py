"""Which sizes of requests are usual for a model, so that what its engine keeps for an unusual one goes back to the machine.

Engines keep the memory of a run for the next one, which saves the kernel's work of giving and clearing it: a run of 40 ms with
64 images took 1.5 times as long without (ONNX Runtime 1.31, x86-64). But one large request would keep its memory for as long as
the model is loaded: 109 MB here.
"""

from __future__ import annotations

import resource

MUCH = 4  # so many times larger or smaller is another kind of request
LEAST_BYTES = 64 * 1024  # what such inputs need is not worth a thought
OFTEN = 3  # large ones come often when there are so many
AMONG = 64  # among so many; and after so many small ones, large ones do not come any more


class UsualSizes:
    """The usual sizes of one model whose inputs have any. Called by the threads that run it; that they count past each other
    does no harm.
    """

    def __init__(self) -> None:
        self.grown_bytes = 0
        """What runs have left with the engine, beyond what loading took."""
        self._kept = 0  # bytes of inputs, for whose runs the engine has memory
        self._runs = self._larger = self._smaller = 0

    def keeps(self, size_bytes: int) -> bool:
        """Whether the engine is to keep what a run with inputs of this size took; else it gives back all that it keeps."""
        if size_bytes <= self._kept:
            if self._larger:
                self._count()
            if size_bytes * MUCH >= self._kept or self._kept <= LEAST_BYTES:
                self._smaller = 0
                return True
            self._smaller += 1
            if self._smaller < AMONG:
                return True
            self._kept, self._smaller, self.grown_bytes = max(size_bytes, LEAST_BYTES), 0, 0
            return False
        if size_bytes <= LEAST_BYTES or not self._kept or size_bytes <= self._kept * MUCH:
            self._kept = max(size_bytes, LEAST_BYTES)
            return True
        self._count()
        self._larger += 1
        if self._larger < OFTEN:
            self.grown_bytes = 0
            return False
        self._kept, self._larger, self._smaller = size_bytes, 0, 0
        return True

    def grows(self, size_bytes: int) -> bool:
        """Whether a run of this size may leave more with the engine than any before it, so that it is worth measuring."""
        return size_bytes > self._kept

    def _count(self) -> None:
        self._runs += 1
        if self._runs >= AMONG:
            self._runs = self._larger = 0


def resident_bytes() -> int:
    """What of this process is in memory now."""
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - some 10 µs
        return int(file.read().split()[1]) * resource.getpagesize()
