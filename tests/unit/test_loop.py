"""The loop's own view of how it is doing."""

import socket
import threading
import time

import pytest

from agent.serving.access import Access, Grant
from agent.serving.answers import Answer
from agent.serving.loop import Loop
from agent.serving.routes import Kind, Route, Router

GET = b"GET /long HTTP/1.1\r\n\r\n"


class Service:
    """Answers when it is let."""

    def __init__(self):
        self.going_on = threading.Event()

    def kind(self, _request, _grant):
        return Kind.PREDICT

    def parks(self, _request):
        return False

    def answer(self, _request, _grant):
        self.going_on.wait(20)
        return Answer()


@pytest.mark.timeout(30)
def test_it_is_stuck_while_somebody_waits_and_no_thread_comes_free(tmp_path):
    service = Service()
    router = Router([Route("GET", "/long", Access.NONE, lambda _: Answer())])
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(8)
        grant = Grant(Access.CONTROL, "test")
        loop = Loop([listener], service, router, lambda _: grant, threads=3, max_body_bytes=1024, max_connections=8)
        loop.start()
        clients = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(3)]
        try:
            for client in clients[:2]:
                client.connect(str(tmp_path / "s"))
                client.sendall(GET)
            assert not loop.stuck(0.0), "nobody waits: both are being answered"
            clients[2].connect(str(tmp_path / "s"))
            clients[2].sendall(GET)
            deadline = time.monotonic() + 10
            while not loop.stuck(0.0):
                assert time.monotonic() < deadline
            assert not loop.stuck(60.0)
            service.going_on.set()
            for client in clients:
                client.settimeout(10)
                assert client.recv(100).startswith(b"HTTP/1.1 200")
            assert not loop.stuck(0.0)
        finally:
            service.going_on.set()
            assert loop.stop(10)
            for client in clients:
                client.close()


class Hesitant:
    """An epoll whose `register` returns late: the thread that polls hears of the connection before the one that put it there goes on."""

    def __init__(self, epoll):
        self._epoll = epoll
        self.polls = 0
        self.many = threading.Event()

    def poll(self, *arguments):
        self.polls += 1
        if self.polls > 100:
            self.many.set()
        return self._epoll.poll(*arguments)

    def register(self, fd, events):
        self._epoll.register(fd, events)
        if threading.current_thread().name.startswith("serve"):
            self.many.wait(0.2)

    def __getattr__(self, name):
        return getattr(self._epoll, name)


@pytest.mark.timeout(30)
def test_the_thread_that_polls_waits_for_a_connection_that_is_just_put_back(tmp_path):
    service = Service()
    service.going_on.set()
    router = Router([Route("GET", "/long", Access.NONE, lambda _: Answer())])
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(8)
        grant = Grant(Access.CONTROL, "test")
        loop = Loop([listener], service, router, lambda _: grant, threads=3, max_body_bytes=1024, max_connections=8)
        epoll = loop._epoll = Hesitant(loop._epoll)
        loop.start()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.settimeout(10)
                client.connect(str(tmp_path / "s"))
                for _ in range(2):
                    client.sendall(GET)
                    assert client.recv(100).startswith(b"HTTP/1.1 200")
        finally:
            assert loop.stop(10)
    assert not epoll.many.is_set()
