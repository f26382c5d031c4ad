"""The port to `serve`: its control routes, its refusals and its absence."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from agent.store import Store
from agent.sync.serving import ServeAway, ServeClient, ServeRefused
from tests.sync.fake_serve import FakeServe, stats
from tests.sync.test_retention import fill


@pytest.fixture
def serve(store: Store, tmp_path: Path):
    fill(store, tmp_path, 1)
    serve = FakeServe(store, tmp_path / "s.sock")
    yield serve
    serve.stop()


def test_control_routes_round(serve: FakeServe, tmp_path: Path):
    client = ServeClient(tmp_path / "s.sock")
    serve.stats["crane", 1] = stats(ok=7, invalid=2, run=1)
    assert client.load("crane", 1, "cpu").version == 1
    client.activate("crane", 1)
    model = client.status().model("crane")

    assert model.serving is not None
    assert model.serving.stats.for_watch().answered == 10
    client.commit("crane")
    client.rollback("crane", 1)
    client.unload("crane")
    assert client.status().models == {}


def test_refusals_and_absence_are_told_apart(serve: FakeServe, tmp_path: Path):
    client = ServeClient(tmp_path / "s.sock")
    with pytest.raises(ServeRefused, match="not in the store") as refused:
        client.load("crane", 9, "cpu")
    assert refused.value.code == "not_in_store"
    serve.crash_on = ("load", 1)
    with pytest.raises(ServeAway) as away:
        client.load("crane", 1, "cpu")
    assert away.value.sent
    with pytest.raises(ServeAway) as nobody:
        ServeClient(tmp_path / "nobody.sock").status()
    assert not nobody.value.sent


def test_a_question_that_is_not_answered_took_nobody_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`serve` that still loads its models lets its callers wait; only a change may be what killed it."""
    monkeypatch.setattr("agent.sync.serving.STATUS_TIMEOUT_S", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s.sock"))
        listener.listen(4)
        with pytest.raises(ServeAway) as away:
            ServeClient(tmp_path / "s.sock").status()

    assert not away.value.sent
