"""The way out: TCP connections to the fleet server and its broker, direct or through an HTTP proxy that is asked with CONNECT
(RFC 9110, 9.3.6).

The proxy passes bytes on and sees TLS only; who is at the other end is proved as without it. It is asked by name, so this device
needs no DNS. What `HTTPS_PROXY` says is not obeyed: a shell has it and a daemon has not, and then a device would enrol by a way that
its daemon does not know.
"""

from __future__ import annotations

import base64
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from agent.config import SyncSettings
from agent.contract.addresses import join

CONNECT_TIMEOUT_S = 10.0
ANSWER_S = 30.0
"""How long the proxy may take to connect to the other side."""

MAX_HEAD_BYTES = 16 * 1024
MAX_CREDENTIALS_BYTES = 4096
ENVIRONMENT = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5]\d\d)(?: ([^\r\n]{0,100}))?")


class ProxyFailed(OSError):
    """The proxy does not lead there; the message says why and what to do."""


class Way:
    """How this device reaches others: `direct`, or through the proxy at an `http://HOST:PORT` address."""

    def __init__(self, proxy: str = "", credentials: Path | None = None, but: tuple[str, ...] = ()) -> None:
        """`credentials` is a file with `USER:PASSWORD`, read for each connection; `but` are hosts, and with a leading dot domains,
        that are reached directly.
        """
        self._host, self._port = address_of(proxy) if proxy else ("", 0)
        self.credentials, self._but = credentials, tuple(one.lower() for one in but)

    @classmethod
    def configured(cls, settings: SyncSettings) -> Way:
        """As agent.yaml says."""
        return cls(settings.proxy, settings.proxy_credentials, settings.proxy_except)

    @property
    def proxy(self) -> str:
        """HOST:PORT of the proxy; empty for the direct way."""
        return join(self._host, self._port) if self._host else ""

    def proxy_for(self, host: str) -> str:
        """HOST:PORT of the proxy that is asked for `host`; empty when it is reached directly."""
        name = host.lower().rstrip(".")
        direct = any(name.endswith(one) if one.startswith(".") else name == one for one in self._but)
        return "" if direct else self.proxy

    def connect(self, host: str, port: int, timeout_s: float | None = CONNECT_TIMEOUT_S) -> socket.socket:
        """A connection to `host`:`port`.  Raises: OSError; its kind ProxyFailed when the proxy is what fails."""
        if not self.proxy_for(host):
            return socket.create_connection((host, port), timeout=timeout_s)
        goal = join(host, port)
        try:
            sock = socket.create_connection((self._host, self._port), timeout=timeout_s)
        except OSError as error:
            raise ProxyFailed(
                f"the proxy {self.proxy} cannot be reached ({error}): see whether it runs, and sync.proxy in agent.yaml"
            ) from error
        try:
            sock.sendall(self._request(goal))
            self._check(_head(sock), goal)
        except TimeoutError as error:
            sock.close()
            raise ProxyFailed(f"the proxy {self.proxy} did not connect to {goal} within {ANSWER_S:.0f} s") from error
        except ProxyFailed:
            sock.close()
            raise
        except OSError as error:
            sock.close()
            raise ProxyFailed(f"the proxy {self.proxy} broke off while it was asked for {goal}: {error}") from error
        sock.settimeout(timeout_s)
        return sock

    def _request(self, goal: str) -> bytes:
        lines = [f"CONNECT {goal} HTTP/1.1", f"Host: {goal}"]
        if self.credentials is not None:
            lines.append(f"Proxy-Authorization: Basic {base64.b64encode(self._secret(self.credentials)).decode()}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")

    def _secret(self, path: Path) -> bytes:
        try:
            with path.open("rb") as file:
                secret = file.read(MAX_CREDENTIALS_BYTES).strip()
        except OSError as error:
            raise ProxyFailed(f"{path}, which sync.proxy_credentials names, cannot be read: {error.strerror}") from error
        if b":" not in secret or b"\n" in secret:
            raise ProxyFailed(f"{path}, which sync.proxy_credentials names, must be one line USER:PASSWORD")
        return secret

    def _check(self, head: bytes, goal: str) -> None:
        """Raises: ProxyFailed."""
        found = _STATUS.match(head)
        if found is None:
            raise ProxyFailed(f"{self.proxy} does not answer as an HTTP proxy: see sync.proxy in agent.yaml")
        status, words = int(found[1]), (found[2] or b"").decode("latin-1").strip()
        if 200 <= status < 300:
            return
        said = f"the proxy {self.proxy} does not connect to {goal}: {status} {words}".rstrip()
        if status == 407 and self.credentials is None:
            raise ProxyFailed(
                f"{said}; it wants a user and a password: put them into a file and name it in sync.proxy_credentials"
            )
        if status == 407:
            raise ProxyFailed(
                f"{said}; it does not take the user and password in {self.credentials}, or wants another kind of sign-in than Basic"
            )
        if status in {403, 405}:
            raise ProxyFailed(
                f"{said}; whoever runs the proxy must allow CONNECT to it, or the fleet server be reached by a port that is allowed (shared_port in fleet.yaml)"
            )
        if status in {502, 503, 504}:
            raise ProxyFailed(
                f"{said}; the proxy does not reach it: see whether the name and the port are right, and the server runs"
            )
        raise ProxyFailed(said)


DIRECT = Way()


def address_of(proxy: str) -> tuple[str, int]:
    """Host and port of `http://HOST:PORT`.  Raises: ValueError."""
    say = f"proxy is {proxy!r}; expected http://HOST:PORT"
    try:
        parts = urlsplit(proxy)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{say} ({error})") from None
    if "@" in parts.netloc:
        raise ValueError(
            "proxy must not hold a user and password; put USER:PASSWORD into a file and name it in proxy_credentials"
        )
    if parts.scheme != "http" or not host or not port or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(say)
    return host, port


def ignored(environment: Mapping[str, str] = os.environ) -> str:
    """The variable of the environment that names a proxy, which is not obeyed; empty when there is none."""
    return next((name for name in ENVIRONMENT if environment.get(name)), "")


def _head(sock: socket.socket) -> bytes:
    """The head of the answer and not a byte more, since what follows is of the other side.  Raises: OSError."""
    deadline, head = time.monotonic() + ANSWER_S, bytearray()
    while not head.endswith(b"\r\n\r\n"):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)
        waiting = sock.recv(MAX_HEAD_BYTES, socket.MSG_PEEK)
        end = (bytes(head) + waiting).find(b"\r\n\r\n")
        wanted = len(waiting) if end < 0 else end + 4 - len(head)
        if not waiting:
            raise ProxyFailed("it closed the connection without an answer" if not head else "its answer breaks off")
        head += sock.recv(wanted)
        if len(head) > MAX_HEAD_BYTES:
            raise ProxyFailed("its answer does not end")
    return bytes(head)
