"""Tells systemd how the server is (sd_notify). Does nothing when it was not started by systemd."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> bool:
    """Sends `state` (such as "READY=1") to the socket that systemd named. False when there is none or nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address or address[0] not in "/@":
        return False
    if address[0] == "@":
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.connect(address)
            sock.sendall(state.encode())
    except OSError:
        return False  # a supervisor that went away must not take the server with it
    return True


def watchdog_interval_s() -> float | None:
    """How often systemd wants to hear WATCHDOG=1: half of what it allows. None when it does not ask."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", "")
    if not microseconds.isdigit() or int(microseconds) == 0 or (pid.isdigit() and int(pid) != os.getpid()):
        return None
    return int(microseconds) / 2_000_000
