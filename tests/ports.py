"""Ports for servers that are told where to listen, and do so only some time later, or a second time after a restart."""

import itertools
import os
import random
import socket

# The system gives ports from 32768 on to whoever asks for any, so one of those may be taken before the server listens on it.
FIRST, END = 12_000, 32_000
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
_own = range(FIRST + WORKER, END, WORKERS)  # no other worker of this run takes these
_start = random.randrange(len(_own))  # another run on this machine most likely begins elsewhere
_next = itertools.cycle([*_own[_start:], *_own[:_start]])


def free_ports(count):
    """Ports of 127.0.0.1 that nobody listens on; each is given once before any is given again."""
    return list(itertools.islice(filter(_is_free, _next), count))


def _is_free(port):
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
