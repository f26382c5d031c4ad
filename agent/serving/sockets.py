"""The listening sockets: handed over by systemd, or bound here."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

from agent.host import notify

BACKLOG = 512
MAX_PATH_BYTES = 107  # sun_path of Linux, less its final zero


class SocketError(Exception):
    """The socket cannot be used; the message says what to do."""


class Listeners:
    """The sockets to serve. `close` removes what `open_listeners` made, and nothing that somebody else put in its place."""

    def __init__(self, sockets: list[socket.socket], path: Path | None) -> None:
        self.sockets = sockets
        self.path = path
        self._made = path.stat() if path is not None else None

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        if self.path is None or self._made is None:
            return
        with contextlib.suppress(FileNotFoundError):
            now = self.path.stat()
            if (now.st_dev, now.st_ino) == (self._made.st_dev, self._made.st_ino):
                self.path.unlink()


def open_listeners(path: Path, mode: int) -> Listeners:
    """What systemd passed; without it, a new socket at `path` with permissions `mode`.

    Raises: SocketError when another server answers there, something else is in the way, or the path cannot be used.
    """
    passed = notify.passed_sockets()
    if passed:
        return Listeners(passed, None)
    return Listeners([_bind(path, mode)], path)


def _bind(path: Path, mode: int) -> socket.socket:
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise SocketError(
            f"socket path {str(path)!r} is longer than the {MAX_PATH_BYTES} bytes that Linux allows: choose a shorter one"
        )
    _make_way(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o777 & ~mode)
    try:
        sock.bind(os.fspath(path))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise SocketError(f"cannot listen on {str(path)!r}: {error.strerror}") from error
    finally:
        os.umask(before)
    return sock


def _make_way(path: Path) -> None:
    """Removes the socket that a killed server left behind.  Raises: SocketError."""
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise SocketError(f"cannot listen on {str(path)!r}: {error.strerror}") from error
    if not stat.S_ISSOCK(kind):
        raise SocketError(f"{str(path)!r} exists and is not a socket: choose another path or remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            return
        except OSError as error:
            raise SocketError(f"{str(path)!r} is in use: {error.strerror}") from error
    raise SocketError(f"another server answers on {str(path)!r}: stop it or choose another path with --socket")
