"""Long work in Python, in pieces between which other threads have the interpreter's lock.

One call into a C library keeps the lock from its beginning to its end, and a thread that wants the lock asks for it only after
five milliseconds. So whoever reads a large request does it in pieces that take a fraction of a prediction, and rests between
them as long as anybody else is at work. That is seen from the processor's time of the process, which grows by more than that of
the readers.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time

ALONE_S = 400e-6  # a piece while nobody else is at work: so long whoever comes first may wait
AMONG_S = 40e-6  # a piece while others are
QUIET_S = 2e-3  # so long after others were at work they may be again
NOISE_S = 4e-6  # the clocks are read one after the other
REST_S = 1e-6  # the kernel makes some 55 µs of it: long enough for another thread to wake up and take the lock
RESTS = 3  # at most, after one piece, while others go on
SMALLEST, LARGEST = 512, 64 * 1024

_at_work: dict[int, int] = {}  # the clocks of threads that read large requests, by their Pauses
_numbers = itertools.count()


class Pauses:
    """`size` is how many bytes the next piece should have; call `rest` after each. It counts as at work until nobody refers to
    it.
    """

    __slots__ = ("_began_s", "_number", "_others_s", "_quiet_s", "size")

    def __init__(self) -> None:
        self.size = 4096
        self._number = next(_numbers)
        _at_work[self._number] = time.pthread_getcpuclockid(threading.get_ident())
        self._began_s = self._quiet_s = time.perf_counter()
        self._others_s = _others_s()[0]

    def __del__(self) -> None:
        _at_work.pop(self._number, None)

    def rest(self) -> None:
        now = time.perf_counter()
        heard, readers = self._heard()
        if heard:
            self._quiet_s = now + QUIET_S
        among = now < self._quiet_s
        took, wanted = now - self._began_s, AMONG_S if among else ALONE_S
        if took > wanted:
            self.size = max(SMALLEST, self.size // 2)
        elif took < wanted / 2:
            self.size = min(LARGEST, self.size * 2)
        if among:
            for _ in range(RESTS):
                for _ in range(readers):  # together they are not to leave less room than one
                    time.sleep(REST_S)
                if not self._heard()[0]:
                    break
                self._quiet_s = time.perf_counter() + QUIET_S
        self._began_s = time.perf_counter()

    def _heard(self) -> tuple[bool, int]:
        """Whether others were at work since the last time, and how many read large requests."""
        others, readers = _others_s()
        heard = others - self._others_s > NOISE_S
        self._others_s = others
        return heard, readers


def _others_s() -> tuple[float, int]:
    """The processor's time of all threads but those that read large requests, and how many these are."""
    clocks = set(_at_work.values())
    own = 0.0
    for clock in clocks:
        with contextlib.suppress(OSError):  # of a thread that has ended
            own += time.clock_gettime(clock)
    return time.process_time() - own, len(clocks)
