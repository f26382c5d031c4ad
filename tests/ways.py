"""Real ways through a network, for tests: an HTTP proxy that knows CONNECT, and a port that leads to another one (NAT)."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading


class _Listening:
    """Accepts on 127.0.0.1 in a thread, a thread for each connection, until it is closed."""

    def __init__(self, port: int = 0) -> None:
        self._listening = socket.create_server(("127.0.0.1", port))
        self.port = self._listening.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every connection, and the listener."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._accepting.join(10)
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            self._open.add(sock)
            thread = threading.Thread(target=self._served, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _served(self, sock: socket.socket) -> None:
        try:
            with sock, contextlib.suppress(OSError):
                self.serve(sock)
        finally:
            self._open.discard(sock)

    def serve(self, sock: socket.socket) -> None:
        raise NotImplementedError

    def join(self, one: socket.socket, goal: tuple[str, int]) -> None:
        """Copies bytes both ways until either side ends."""
        with socket.create_connection(goal, timeout=10) as other:
            other.settimeout(None)
            self._open.add(other)
            back = threading.Thread(target=_copy, args=(other, one), daemon=True)
            back.start()
            _copy(one, other)
            back.join(10)
            self._open.discard(other)


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for sock in (source, sink):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


class Forward(_Listening):
    """A port of this machine that leads to another one, as NAT and load balancers do."""

    def __init__(self, goal: int, port: int = 0) -> None:
        self.goal = goal
        super().__init__(port)

    def serve(self, sock: socket.socket) -> None:
        self.join(sock, ("127.0.0.1", self.goal))


class ConnectProxy(_Listening):
    """Connects to what `allowed` names, `HOST:PORT` → port of this machine, and refuses all else with 403. With `secret`
    (USER:PASSWORD) it answers 407 to whoever does not say it. `answer`: what it says instead of all that.
    """

    def __init__(self, allowed: dict[str, int], *, secret: str | None = None, answer: bytes | None = None) -> None:
        self.allowed, self.secret, self.answer = allowed, secret, answer
        self.connected: list[str] = []
        self.refused: list[str] = []
        super().__init__()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def serve(self, sock: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            data = sock.recv(1)
            if not data:
                return
            head += data
        first, *lines = head.decode("latin-1").split("\r\n")
        method, goal, _ = first.split()
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if self.answer is not None:
            sock.sendall(self.answer)
            return
        if self.secret is not None:
            expected = "Basic " + base64.b64encode(self.secret.encode()).decode()
            if headers.get("proxy-authorization") != expected:
                sock.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n")
                return
        if method != "CONNECT" or goal not in self.allowed:
            self.refused.append(f"{method} {goal}")
            sock.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
            return
        self.connected.append(goal)
        sock.sendall(b"HTTP/1.1 200 Connection established\r\nVia: 1.1 test\r\n\r\n")
        self.join(sock, ("127.0.0.1", self.allowed[goal]))
