"""The listening sockets: handed over by systemd, or bound here."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
from pathlib import Path

from agent.common import systemd

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

    @property
    def local(self) -> str:
        """The address of the first Unix socket."""
        address: str = next(sock for sock in self.sockets if sock.family == socket.AF_UNIX).getsockname()
        return address

    @property
    def http(self) -> list[str]:
        """Where the loopback port is, such as `127.0.0.1:8000`; empty without one."""
        addresses = [sock.getsockname() for sock in self.sockets if sock.family != socket.AF_UNIX]
        return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port, *_ in addresses]

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        if self.path is None or self._made is None:
            return
        with contextlib.suppress(FileNotFoundError):
            now = self.path.stat()
            if (now.st_dev, now.st_ino) == (self._made.st_dev, self._made.st_ino):
                self.path.unlink()


def open_listeners(path: Path, mode: int, http_listen: str = "") -> Listeners:
    """What systemd passed; without it, a new socket at `path` with permissions `mode`. And the loopback port `http_listen`, if
    any.

    Raises: SocketError when another server answers there, something else is in the way, an address cannot be used, or a port
    is not on the loopback.
    """
    passed = systemd.passed_sockets()
    sockets, made = list(passed), None
    try:
        for sock in passed:
            _check_passed(sock)
        if http_listen:
            sockets.append(_bind_loopback(http_listen, passed=bool(passed)))
        if not any(sock.family == socket.AF_UNIX for sock in sockets):
            sockets.insert(0, _bind(path, mode))
            made = path
        return Listeners(sockets, made)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise


def loopback_address(text: str) -> tuple[socket.AddressFamily, str, int]:
    """`127.0.0.1:8000`, `[::1]:8000` or `localhost:8000`, read; port 0 lets the system choose.  Raises: SocketError."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise SocketError(f"http_listen is {text!r}: expected an address and a port, such as 127.0.0.1:8000")
    if host == "localhost":
        host = "127.0.0.1"
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        raise SocketError(f"http_listen is {text!r}: expected 127.0.0.1, [::1] or localhost before the port") from None
    if not address.is_loopback or (address.version == 6 and address.ipv4_mapped is not None):
        raise SocketError(
            f"http_listen is {text!r}, which others could reach: this port knows no user, so it is offered on the loopback only "
            "(127.0.0.1 or [::1])"
        )
    return (socket.AF_INET if address.version == 4 else socket.AF_INET6), str(address), int(port)


def _check_passed(sock: socket.socket) -> None:
    if sock.family == socket.AF_UNIX:
        return
    host = str(sock.getsockname()[0]) if sock.family in (socket.AF_INET, socket.AF_INET6) else ""
    if not host or not ipaddress.ip_address(host).is_loopback:
        raise SocketError(
            f"systemd passed a socket on {sock.getsockname()!r}, which others could reach: "
            "have ListenStream= in edge-agent.socket name 127.0.0.1 or [::1]"
        )
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _bind_loopback(text: str, *, passed: bool) -> socket.socket:
    family, host, port = loopback_address(text)
    advice = " (under systemd, give the port to edge-agent.socket instead: ListenStream=)" if passed else ""
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise SocketError(f"cannot listen on {text!r}: {error.strerror}{advice}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted connections have it from here
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise SocketError(f"cannot listen on {text!r}: {error.strerror}{advice}") from error
    return sock


def _bind(path: Path, mode: int) -> socket.socket:
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise SocketError(
            f"socket path {str(path)!r} is longer than the {MAX_PATH_BYTES} bytes that Linux allows: choose a shorter one"
        )
    make_way(path)
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


def make_way(path: Path) -> None:
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
