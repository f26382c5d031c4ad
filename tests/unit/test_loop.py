"""The loop's own view of how it is doing."""

import socket
import threading
import time

import pytest

from agent.serving.access import Access, Grant
from agent.serving.answers import Answer
from agent.serving.routes import Kind, Route, Router
from agent.serving.transport import loop as loops
from agent.serving.transport.loop import Loop

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


class Prompt:
    """Answers at once, in the thread that polls."""

    def kind(self, _request, _grant):
        return Kind.QUICK

    def answer(self, _request, _grant):
        return Answer()


def ask_anew(path, begun, end):
    """A client that makes a connection for every request, until nobody listens any more."""
    while not end.is_set():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(10)
            try:
                client.connect(path)
                client.sendall(GET)
                answer = client.recv(100)
            except OSError:
                return
            begun.set()
            assert not answer or answer.startswith(b"HTTP/1.1 200")


def trickle(path, begun, end):
    """A client that never comes to the end of its request."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(path)
        client.sendall(GET[:-2] + b"x: ")
        while not end.wait(0.05):
            try:
                client.sendall(b"a")
            except OSError:
                return
            begun.set()


def flood(path, begun, end):
    """A client that goes on sending and reads nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(10)
        client.connect(path)
        while not end.is_set():
            try:
                client.sendall(GET)
            except OSError:
                return
            begun.set()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("behave", [ask_anew, flood, trickle])
def test_no_client_can_keep_it_from_ending(tmp_path, behave, monkeypatch):
    monkeypatch.setattr(loops, "STOP_LONGEST_S", 0.5)
    router = Router([Route("GET", "/long", Access.NONE, lambda _: Answer())])
    begun, end = threading.Event(), threading.Event()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(8)
        grant = Grant(Access.CONTROL, "test")
        loop = Loop([listener], Prompt(), router, lambda _: grant, threads=3, max_body_bytes=1024, max_connections=8)
        loop.start()
        clients = [threading.Thread(target=behave, args=(str(tmp_path / "s"), begun, end)) for _ in range(3)]
        try:
            for client in clients:
                client.start()
            assert begun.wait(10)
            assert loop.stop(12)
            listener.close()
        finally:
            end.set()
            for client in clients:
                client.join(10)


@pytest.mark.timeout(30)
def test_who_has_just_connected_is_answered_before_it_ends(tmp_path):
    router = Router([Route("GET", "/long", Access.NONE, lambda _: Answer())])
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(8)
        grant = Grant(Access.CONTROL, "test")
        came_in = threading.Event()

        def grant_of(_sock):
            came_in.set()
            return grant

        loop = Loop([listener], Prompt(), router, grant_of, threads=3, max_body_bytes=1024, max_connections=8)
        loop.start()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(10)
            client.connect(str(tmp_path / "s"))
            assert came_in.wait(10)
            ending = threading.Thread(target=loop.stop, args=(10,))
            ending.start()
            assert not loop._drained.wait(0.2)
            client.sendall(GET)
            answer = client.recv(1000)
        ending.join(15)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in answer.lower()


LARGE = b"a" * (8 << 20)


class Generous(Prompt):
    def answer(self, _request, _grant):
        return Answer((LARGE,))


@pytest.mark.timeout(30)
def test_who_reads_a_long_answer_slowly_gets_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(loops, "STOP_LONGEST_S", 0.2)
    router = Router([Route("GET", "/long", Access.NONE, lambda _: Answer())])
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(8)
        grant = Grant(Access.CONTROL, "test")
        loop = Loop([listener], Generous(), router, lambda _: grant, threads=3, max_body_bytes=1024, max_connections=8)
        loop.start()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(10)
            client.connect(str(tmp_path / "s"))
            client.sendall(GET)
            got = len(client.recv(1000))
            ending = threading.Thread(target=loop.stop, args=(20,))
            ending.start()
            while piece := client.recv(256 << 10):
                got += len(piece)
                loop._drained.wait(0.03)
        ending.join(25)
    assert got > len(LARGE)


class Counting:
    """An epoll that counts how often a connection is put there."""

    def __init__(self, epoll):
        self._epoll = epoll
        self.registered = 0

    def register(self, fd, events):
        self.registered += 1
        self._epoll.register(fd, events)

    def __getattr__(self, name):
        return getattr(self._epoll, name)


@pytest.fixture
def prompt_loop(tmp_path, monkeypatch):
    """A loop with one thread for long work, to which every client is prompt; and its address."""
    monkeypatch.setattr(loops, "PROMPT_S", 1000.0)
    service = Service()
    service.going_on.set()
    router = Router([Route("GET", "/long", Access.NONE, lambda _: Answer())])
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(8)
        grant = Grant(Access.CONTROL, "test")
        loop = Loop([listener], service, router, lambda _: grant, threads=2, max_body_bytes=1024, max_connections=8)
        loop._epoll = loop._doors._epoll = Counting(loop._epoll)
        loop.start()
        yield loop, str(tmp_path / "s")
        assert loop.stop(10)


def ask(client):
    client.sendall(GET)
    assert client.recv(1000).startswith(b"HTTP/1.1 200")


def connected(path):
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(10)
    client.connect(path)
    return client


@pytest.mark.timeout(60)
def test_a_thread_stays_with_a_client_that_asks_again_at_once(prompt_loop, monkeypatch):
    loop, path = prompt_loop
    monkeypatch.setattr(loops, "STAY_MS", 10_000)
    with connected(path) as client:
        ask(client)
        ask(client)
        before = loop._epoll.registered
        for _ in range(20):
            ask(client)
        assert loop._epoll.registered == before


@pytest.mark.timeout(60)
def test_it_waits_for_its_client_no_longer_than_a_moment(prompt_loop):
    _, path = prompt_loop
    with connected(path) as first, connected(path) as second:
        for _ in range(20):
            ask(first)
            ask(first)
            ask(second)


@pytest.mark.timeout(60)
def test_it_does_not_wait_for_its_client_while_others_do(prompt_loop, monkeypatch):
    loop, path = prompt_loop
    with connected(path) as first, connected(path) as second:
        ask(first)
        monkeypatch.setattr(loops, "STAY_MS", 60_000)
        loop._service.going_on.clear()
        first.sendall(GET)
        while loop._scheduler._free:
            time.sleep(0.001)
        second.sendall(GET)
        while not loop._scheduler.crowded:
            time.sleep(0.001)
        loop._service.going_on.set()
        assert second.recv(1000).startswith(b"HTTP/1.1 200")
        second.close()


@pytest.mark.timeout(60)
def test_a_client_that_goes_while_a_thread_stays_with_it_is_let_go(prompt_loop, monkeypatch):
    loop, path = prompt_loop
    monkeypatch.setattr(loops, "STAY_MS", 60_000)
    with connected(path) as client:
        ask(client)
        ask(client)
    with connected(path) as other:
        ask(other)
    deadline = time.monotonic() + 10
    while loop._connections:
        assert time.monotonic() < deadline
        time.sleep(0.001)
