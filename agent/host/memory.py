"""How much memory this process takes, as the kernel tells it."""

from __future__ import annotations

import resource


def resident_bytes() -> int:
    """What of the process is in memory now."""
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - pathlib is one import more in processes that are kept small
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """The most that was in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def give_back() -> None:
    """Lets the allocator return what it keeps for later, after something large went. Does nothing where the C library
    cannot.
    """
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
