"""A neighbour that answers byte by byte, each in time, does not hold a download for ever."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from agent.host.clock import SystemClock
from agent.store import Store
from agent.sync import http
from agent.sync.fetching.https import HttpBlobs
from agent.sync.http import FleetHttp
from agent.sync.problems import Problem
from tests.sync.blobs import blocked, downloader, fetch

FILE = blocked(b"right" * 500, 1000)


@contextlib.contextmanager
def trickling(begin: bytes) -> Iterator[str]:
    """A server that sends `begin` and then a byte every 20 ms."""
    ending = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with contextlib.suppress(OSError), connection:
                    connection.recv(4096)
                    connection.sendall(begin)
                    while not ending.wait(0.02):
                        connection.sendall(b"a")

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        ending.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10.0)


@pytest.mark.parametrize("begin", [b"HTTP/1.1 200 OK\r\nX-A: ", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;"])
def test_a_neighbour_that_trickles_is_given_up(begin, store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http, "HEAD_S", 0.3)
    with trickling(begin) as url:
        neighbour = HttpBlobs(lambda: FleetHttp(url, SystemClock()), name="neighbour", final=False)
        with pytest.raises(Problem) as caught:
            fetch(downloader(store, neighbour), FILE)
    assert caught.value.retryable
