"""What systemd wants to hear (sd_notify) and hands over (socket activation, watchdog). Quiet where there is no systemd."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import MutableMapping

log = logging.getLogger(__name__)

SEND_TIMEOUT_S = 1.0  # a full queue at the other end must not hold this process up
FIRST_FD = 3  # sd_listen_fds(3): passed descriptors start here


def notify(message: str, environ: MutableMapping[str, str] | None = None) -> bool:
    """Sends one sd_notify(3) message such as `READY=1`. False when nobody listens, or nobody takes it in time."""
    address = (os.environ if environ is None else environ).get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address[0] == "@":  # an abstract socket
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(SEND_TIMEOUT_S)
        try:
            sender.connect(address)
            sender.sendall(message.encode())
        except OSError as error:
            log.warning("%r could not be told to $NOTIFY_SOCKET: %s", message, error)
            return False
    return True


def watchdog_interval_s(environ: MutableMapping[str, str] | None = None) -> float | None:
    """How often to send `WATCHDOG=1`: half of what systemd allows. None when this process is not watched."""
    environ = os.environ if environ is None else environ
    usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not usec.isdigit() or int(usec) == 0 or (pid.isdigit() and int(pid) != os.getpid()):
        return None
    return int(usec) / 2e6


def passed_sockets(environ: MutableMapping[str, str] | None = None) -> list[socket.socket]:
    """The listening sockets that systemd opened for this process; call once. The variables are removed so that children do not see them."""
    environ = os.environ if environ is None else environ
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if not count.isdigit() or (pid.isdigit() and int(pid) != os.getpid()):
        return []
    sockets = []
    for fd in range(FIRST_FD, FIRST_FD + int(count)):
        os.set_inheritable(fd, False)
        sockets.append(socket.socket(fileno=fd))
    return sockets
