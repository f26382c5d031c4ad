"""How many files and connections a process may have open."""

from __future__ import annotations

import contextlib
import resource

MOST = 262_144  # some systems allow a billion, and some programs make tables for as many as are allowed
OWN = 128
"""Of the broker: its files, its listener, the server's link, and some to say no with."""

ENOUGH = 4096
"""Below this a few hundred strangers who say nothing can take the place of devices."""


def raise_limit() -> int:
    """Raises what this process and its children may have to what the system allows; how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return allowed()


def allowed() -> int:
    """How many this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else soft


def for_clients() -> int:
    """How many connections the broker can take, so that it always has descriptors for itself."""
    return max(allowed() - OWN, 16)
