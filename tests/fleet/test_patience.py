"""Clients that send slowly, too much or nothing: each is let go in time, and no one waits for them."""

import asyncio
import contextlib
import errno
import socket
import sqlite3
import threading
import time
from http.client import HTTPConnection

import pytest
import requests
from sqlalchemy.exc import OperationalError

from fleet_server import listeners
from fleet_server.access import Role
from fleet_server.api import accepting, busy, http, tls
from fleet_server.api import device as device_api
from fleet_server.api.connections import Limits
from fleet_server.api.operator import app as operator_api
from tests.fleet.stand import sha256, wait_until

pytestmark = pytest.mark.alone  # who is slower than a fraction of a second is let go, here also a good client
LET_GO_WITHIN_S = 10.0  # what the tests shorten to a fraction of a second


class Listening:
    """One listener of a fleet in a thread of this process, without TLS."""

    def __init__(self, application, protocol, room=100):
        limits = Limits(total=room, per_address=room, per_device=room)
        self._listener = listeners.listener(application, "127.0.0.1", 0, limits, "test", http=protocol)
        self.room = self._listener.room
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._listener.run, kwargs={"sockets": [self._socket]})
        self._thread.start()
        wait_until(lambda: self._listener.started, "the listener answers")

    def stop(self):
        self._listener.should_exit = True
        self._thread.join(20)
        self._socket.close()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(accepting, "FIRST_BYTE_S", 0.2)
    monkeypatch.setattr(tls, "HEAD_WITHIN_S", 0.2)
    monkeypatch.setattr(http, "BODY_WITHIN_S", 0.3)
    monkeypatch.setattr(http, "STALL_S", 0.3)


@pytest.fixture(params=["operators", "devices"])
def port(request, fleet, quick):
    fleet.database.migrate()
    if request.param == "operators":
        made = Listening(operator_api.build(fleet), tls.OperatorProtocol)
    else:
        made = Listening(device_api.build(fleet), tls.ClientCertificateProtocol)
    yield made.port
    made.stop()


@pytest.fixture
def operators(fleet, quick):
    fleet.database.migrate()
    made = Listening(operator_api.build(fleet), tls.OperatorProtocol)
    yield f"http://127.0.0.1:{made.port}"
    made.stop()


def until_let_go(port, first, then=b""):
    """What comes back from a client that says `first` and then `then` again and again; fails when it is never let go."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.settimeout(0.02)
        answer, deadline = b"", time.monotonic() + LET_GO_WITHIN_S
        try:
            sock.sendall(first)
            while time.monotonic() < deadline:
                try:
                    if not (data := sock.recv(65536)):
                        return answer
                    answer += data
                except TimeoutError:
                    sock.sendall(then)
        except (ConnectionError, BrokenPipeError):
            return answer
    raise AssertionError("it was never let go")


@pytest.mark.parametrize(
    "first", [b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nA: "], ids=["nothing", "a line", "half a head"]
)
@pytest.mark.parametrize("then", [b"", b"x"], ids=["stops", "drips"])
def test_a_head_that_does_not_come(port, first, then):
    until_let_go(port, first, then)


def test_a_second_request_that_does_not_come(port):
    answer = until_let_go(port, b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", b"")
    assert b" 404 " in answer or b" 403 " in answer


def test_an_endless_head(port):
    line = b"".join(b"X-%d: %s\r\n" % (n, b"a" * 1000) for n in range(100))
    until_let_go(port, b"GET / HTTP/1.1\r\nHost: x\r\n" + line, line)


def test_an_endless_address(port):
    until_let_go(port, b"GET /" + b"a" * 100_000, b"a" * 100_000)


def test_a_body_that_does_not_come(operators):
    port = int(operators.rpartition(":")[2])
    head = b"POST /enrolment HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50000\r\n\r\n"
    assert b" 408 " in until_let_go(port, head)
    assert b" 408 " in until_let_go(port, head, b" ")
    head = head.replace(b"/enrolment", b"/api/v1/session")
    assert b" 408 " in until_let_go(port, head)


def test_an_upload_that_stalls_leaves_what_arrived_and_lets_the_next_one_on(operators, fleet):
    token = fleet.access.create("publisher", Role.PUBLISHER).token
    data = b"0123456789" * 1000
    path = f"/api/v1/blobs/{sha256(data)}"
    head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    assert b" 408 " in until_let_go(int(operators.rpartition(":")[2]), head + data[:4000])
    headers = {"Authorization": f"Bearer {token}"}
    seen = requests.head(operators + path, headers=headers, timeout=20)
    assert (seen.status_code, seen.headers["upload-offset"]) == (404, "4000")
    done = requests.put(operators + path, data=data[4000:], headers={**headers, "Upload-Offset": "4000"}, timeout=20)
    assert (done.status_code, (fleet.folder.blobs / sha256(data)).read_bytes()) == (200, data)


def test_a_stream_that_says_nothing_for_long_stays(operators, fleet):
    token = fleet.access.create("viewer", Role.VIEWER).token
    headers = {"Authorization": f"Bearer {token}"}
    with requests.get(f"{operators}/api/v1/events/stream", headers=headers, stream=True, timeout=20) as stream:
        lines = stream.iter_lines(chunk_size=1, decode_unicode=True)
        assert next(lines) == "retry: 1000"
        threading.Event().wait(1.0)  # several times what a silent request may take
        fleet.journal.changed("devices")
        assert "event: change" in (next(lines), next(lines))


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 507, "no_space"), (OSError(errno.EIO, "Input/output error"), 503, "unavailable"),
        (OperationalError("x", {}, sqlite3.OperationalError("database or disk is full")), 503, "unavailable"),
    ],
)  # fmt: skip
def test_a_disk_that_takes_nothing_is_named(operators, fleet, monkeypatch, error, status, code):
    def fails():
        raise error

    token = fleet.access.create("viewer", Role.VIEWER).token
    monkeypatch.setattr(fleet.views, "models", fails)
    answer = requests.get(f"{operators}/api/v1/models", headers={"Authorization": f"Bearer {token}"}, timeout=20)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


async def _large(_scope, _receive, send):
    """An application whose answers are larger than what the system takes for a client that does not read."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(64):
        await send({"type": "http.response.body", "body": bytes(1024 * 1024), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def test_an_answer_that_is_not_read(quick, monkeypatch):
    monkeypatch.setattr(accepting, "UNREAD_MS", 300)
    made = Listening(_large, tls.OperatorProtocol)
    try:
        with socket.create_connection(("127.0.0.1", made.port)) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            wait_until(lambda: len(made.room) == 1, "it is answered")
            wait_until(lambda: len(made.room) == 0, "it is let go", within=LET_GO_WITHIN_S)
        answered = requests.get(f"http://127.0.0.1:{made.port}/", timeout=20)
        assert len(answered.content) == 64 * 1024 * 1024, "whoever reads gets all of it"
    finally:
        made.stop()


def _idle(port, count):
    return [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]


def test_a_listener_with_too_many_requests_under_way_says_when_to_come_again():
    asked = []

    async def slow(_scope, _receive, _send):
        asked.append(1)
        await asyncio.sleep(60)

    made = Listening(slow, tls.ClientCertificateProtocol, room=6)
    waiting = _idle(made.port, 3)
    try:
        for sock in waiting:
            sock.sendall(b"GET /record HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: len(asked) == 3, "they are under way")
        answer = requests.get(f"http://127.0.0.1:{made.port}/record", timeout=20)
        assert (answer.status_code, answer.json()["code"]) == (503, "busy")
        assert int(answer.headers["Retry-After"]) >= busy.FIRST_S
        assert answer.headers["Connection"] == "close"
    finally:
        for sock in waiting:
            sock.close()
        made.stop()


def test_a_kept_connection_is_let_go_sooner_where_connections_are_scarce(fleet, monkeypatch):
    monkeypatch.setattr(tls, "CROWDED_IDLE_S", 0.1)
    fleet.database.migrate()
    made = Listening(device_api.build(fleet), tls.ClientCertificateProtocol, room=4)
    connection = HTTPConnection("127.0.0.1", made.port, timeout=LET_GO_WITHIN_S)
    with contextlib.closing(connection):

        def ended(within_s):
            connection.request("GET", "/record")
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 403
            connection.sock.settimeout(within_s)
            return connection.sock.recv(1) == b""

        with pytest.raises(TimeoutError):
            ended(0.5)
        idle = _idle(made.port, 2)
        assert ended(LET_GO_WITHIN_S), "long before it would be else"
    for sock in idle:
        sock.close()
    made.stop()


def test_the_more_are_sent_away_the_later_they_come():
    now = 0.0
    crowd = busy.Busy(lambda: now)
    assert crowd.retry_after_s() == busy.FIRST_S
    said = [crowd.retry_after_s() for _ in range(5000)]
    assert said == sorted(said)
    assert 5000 / busy.PER_S * 0.9 < said[-1] <= busy.FIRST_S + 5000 / busy.PER_S
    assert max(crowd.retry_after_s() for _ in range(100_000)) == busy.LONGEST_S
    now += 20 * busy.WINDOW_S
    assert crowd.retry_after_s() == busy.FIRST_S
