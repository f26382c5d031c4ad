"""What is sent to the leader: done once or said to be unknown, whatever becomes of the connection."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time

import pytest

from fleet_server.api import leader as asking
from fleet_server.api.leader import NoLeader, ToLeader, Unanswered
from fleet_server.devices.pki import Authority
from fleet_server.errors import NotFound
from fleet_server.storage.leadership import Leader


def said(status, body):
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


OK = said(b"200 OK", b"{}")
FENCED = said(b"503 Service Unavailable", b'{"error":"leads no more","code":"not_leading"}')
AWAY = said(b"503 Service Unavailable", b'{"error":"the disk","code":"unavailable"}')
MISSING = said(b"404 Not Found", b'{"error":"no device","code":"not_found"}')


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority.create(tmp_path_factory.mktemp("pki"), "x", ("127.0.0.1",))


class Stage:
    """A leader that answers each request with the next of what it was told; None: it hangs up."""

    def __init__(self, authority, *answers):
        self._answers, self.keys = list(answers), []
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority.ca_path))
        context.load_cert_chain(authority.server_cert, authority.server_key)
        context.verify_mode = ssl.CERT_REQUIRED
        self._context, self._listening = context, socket.create_server(("127.0.0.1", 0))
        self.leader = Leader(1, "decide-x-1-a", f"127.0.0.1:{self._listening.getsockname()[1]}", 0.0)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        for answer in self._answers:
            with contextlib.suppress(OSError):
                accepted, _ = self._listening.accept()
                with self._context.wrap_socket(accepted, server_side=True) as sock:
                    data = b""
                    while b"\r\n\r\n" not in data:
                        data += sock.recv(4096)
                    head, _, body = data.partition(b"\r\n\r\n")
                    fields = dict(line.lower().split(": ", 1) for line in head.decode().split("\r\n")[1:])
                    while len(body) < int(fields["content-length"]):
                        body += sock.recv(4096)
                    self.keys.append(fields["idempotency-key"])
                    if answer is not None:
                        sock.sendall(answer)

    def close(self):
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(10)


@pytest.fixture
def stage(authority):
    made = []

    def make(*answers):
        made.append(Stage(authority, *answers))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def to(authority):
    made = []

    def make(leader):
        made.append(ToLeader(authority, leader, lambda: None))
        return made[-1]

    yield make
    for one in made:
        one.threads.shutdown()


def test_answered(stage, to):
    told = stage(OK)
    asked = to(lambda: told.leader)
    answer = asked.ask("POST", "/x", {"Idempotency-Key": "mine"}, b"{}" * 100)
    assert (answer.status, answer.whole(), told.keys) == (200, b"{}", ["mine"])
    assert asked.outcomes == {"answered": 1}


@pytest.mark.parametrize("first", [None, FENCED], ids=["hung up", "leads no more"])
def test_what_was_not_answered_goes_to_the_next_with_the_same_key(stage, to, first):
    told, following = stage(first), stage(OK)
    leaders = [told.leader, None, following.leader]
    asked = to(lambda: leaders.pop(0))
    assert asked.ask("POST", "/x").whole() == b"{}"
    assert told.keys == following.keys
    assert asked.outcomes["again"] > 0


def test_another_failure_is_an_answer(stage, to):
    told = stage(AWAY)
    answer = to(lambda: told.leader).ask("POST", "/x")
    assert (answer.status, b"the disk" in answer.whole()) == (503, True)


def test_nobody_leads(to, monkeypatch):
    monkeypatch.setattr(asking, "WAIT_FOR_S", 0.2)
    with pytest.raises(NoLeader, match="nothing was changed"):
        to(lambda: None).ask("POST", "/x")
    gone = Leader(1, "decide-x-1-a", "127.0.0.1:1", 0.0)
    with pytest.raises(NoLeader, match="cannot be reached"):
        to(lambda: gone).ask("POST", "/x")


def test_one_that_begins_to_lead_meanwhile_is_waited_for(stage, to):
    told = stage(OK)
    began = time.monotonic()
    asked = to(lambda: told.leader if time.monotonic() - began > 0.5 else None)
    answer = asked.ask("POST", "/x")
    assert answer.status == 200
    answer.close()


def test_what_is_never_answered_is_said_to_be_unknown(stage, to, monkeypatch):
    monkeypatch.setattr(asking, "RETRY_FOR_S", 0.5)
    told = stage(None, None, None)
    with pytest.raises(Unanswered, match="not known") as raised:
        to(lambda: told.leader).ask("POST", "/x")
    assert {raised.value.key.lower()} == set(told.keys)


def test_who_is_not_of_the_fleet_is_not_believed(stage, to, tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "WAIT_FOR_S", 0.2)
    (tmp_path / "other").mkdir()
    foreign = Stage(Authority.create(tmp_path / "other", "other", ("127.0.0.1",)), OK)
    try:
        with pytest.raises(NoLeader, match="cannot be reached"):
            to(lambda: foreign.leader).ask("POST", "/x")
        assert foreign.keys == []
    finally:
        foreign.close()


def test_what_devices_want_is_refused_in_the_leaders_words(stage, to):
    told = stage(MISSING)
    with pytest.raises(NotFound, match="no device"):
        to(lambda: told.leader).record("d1")
