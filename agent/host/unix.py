"""Connecting to a Unix socket within a time."""

from __future__ import annotations

import socket
import time

AGAIN_S = 0.005


def connect(path: str | bytes, timeout_s: float) -> socket.socket:
    """A connection to the socket at `path`, with this timeout for what comes after, too.

    A server whose queue of connections is full makes only those wait who block without limit; for all others waiting is done
    here.
    Raises: TimeoutError, OSError.
    """
    end = time.monotonic() + timeout_s
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(timeout_s)
        while True:
            try:
                sock.connect(path)
            except BlockingIOError:  # noqa: PERF203 - waiting is what this loop is for
                if time.monotonic() >= end:
                    raise TimeoutError(f"its queue of connections was full for {timeout_s} s") from None
                time.sleep(AGAIN_S)
            else:
                return sock
    except BaseException:
        sock.close()
        raise
