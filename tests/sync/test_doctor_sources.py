"""What `edge-agent doctor` says of everybody who may have files: each that is configured, whether it can be used now, and nobody else."""

from __future__ import annotations

import datetime as dt
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from agent.config import AgentConfig, SyncSettings
from agent.contract import bundle
from agent.contract.codec import encode
from agent.contract.reasons import Reason
from agent.host.clock import SystemClock
from agent.store import Choice, Selection, Store
from agent.sync.fetching.sharing import Sharing
from agent.sync.fetching.spool import Spool, Told
from agent.sync.operator import sources
from agent.sync.operator.findings import Finding
from tests.sync.conftest import FakeClock
from tests.sync.test_retention import fill
from tests.sync.test_sources import ABOUT, make_bundle


def found(store: Store, who=None, **settings) -> dict[str, Finding]:
    config = AgentConfig(store=store.root, sync=SyncSettings(**settings))
    findings = sources.examine(config, who, SystemClock(), unset=lambda: False)
    return {finding.name: finding for finding in findings}


def the_only(*arguments, **settings) -> Finding:
    (finding,) = found(*arguments, **settings).values()
    return finding


@pytest.fixture
def serving(store: Store, tmp_path: Path) -> Store:
    """Release 1 serves."""
    fill(store, tmp_path, 1)
    store.select(Selection(model="crane", active=Choice(version=1, variant="cpu")))
    return store


def blob_of(store: Store) -> Path:
    manifest = store.manifest(store.releases()[0])
    return store.file(manifest, "model.script")


def test_what_is_not_configured_is_not_asked(store: Store, monkeypatch: pytest.MonkeyPatch):
    def connects(*_args, **_options):
        raise AssertionError("it connects")

    monkeypatch.setattr(socket.socket, "connect", connects)
    assert found(store) == {}


# -- on this machine ---------------------------------------------------------------------------------------------------------------


def test_folders(store: Store, tmp_path: Path):
    stick, full = tmp_path / "stick", tmp_path / "full"
    (full / "blobs").mkdir(parents=True)
    make_bundle(full / "fleet.bundle", b"1", b"2")
    for name in ("a" * 64, "b" * 64, "notes.txt"):
        (full / "blobs" / name).write_bytes(b"x")
    empty = tmp_path / "empty"
    empty.mkdir()
    said = found(store, local_sources=(stick, full, empty))

    assert [finding.level for finding in said.values()] == ["warning", "ok", "warning"]
    assert "mount" in said[f"folder {stick}"].advice
    assert said[f"folder {full}"].message == "1 bundle, 2 files in blobs"
    assert "mounted" in said[f"folder {empty}"].advice


def test_a_bundle_that_was_not_copied_to_its_end(store: Store, tmp_path: Path):
    (tmp_path / "fleet.bundle").write_bytes(b"")
    said = the_only(store, local_sources=(tmp_path,))

    assert said.level == "warning"
    assert "fleet.bundle: it is cut off at byte 0" in said.message
    assert "once more" in said.advice


def test_a_pipe_that_is_named_as_a_bundle_is_not_waited_for(store: Store, tmp_path: Path):
    os.mkfifo(tmp_path / "fleet.bundle")
    said = the_only(store, local_sources=(tmp_path,))
    assert (said.level, "not a regular file" in said.message) == ("warning", True)


def test_imported_bundles(store: Store):
    spool = Spool(store)
    spool.path("a" * 32).mkdir(parents=True)
    said = the_only(store)
    assert (said.name, said.level) == ("imported bundles", "warning")
    assert "edge-agent sync" in said.advice
    spool.remove("a" * 32)
    spool.tell("b" * 32, Told(accepted=True))
    assert found(store) == {}
    os.utime(spool.folder / f"{'b' * 32}.told", (1.0, 1.0))
    spool.tell("c" * 32, Told(accepted=False, reason=Reason.WRONG_FLEET, message="it is of fleet 'x'"))
    said = the_only(store)
    assert said.level == "warning"
    assert "it is of fleet 'x'" in said.message
    spool.path("d" * 32).mkdir()
    (spool.path("d" * 32) / bundle.HEAD).write_bytes(encode(msgspec.structs.replace(ABOUT, releases=("crane:1",))))
    spool.accept("d" * 32)
    os.utime(spool.folder / f"{'c' * 32}.told", (1.0, 1.0))
    spool.tell("d" * 32, Told(accepted=True))
    assert the_only(store).message == "1 bundle with crane:1"


# -- on the network ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def neighbour(tmp_path: Path, serving: Store) -> Iterator[Sharing]:
    lent = Store.create(tmp_path / "neighbour")
    one = Sharing(lent, SystemClock(), "127.0.0.1:0", 0)
    one.start()
    yield one
    one.stop()


def test_neighbours(serving: Store, neighbour: Sharing):
    address = f"127.0.0.1:{neighbour.port}"
    said = found(serving, neighbours=("127.0.0.1:1", address))
    assert said["neighbour 127.0.0.1:1"].level == "warning"
    assert "neighbour_listen" in said["neighbour 127.0.0.1:1"].advice
    assert said[f"neighbour {address}"].level == "ok"
    blob = blob_of(serving)
    neighbour.store.blob(blob.name).write_bytes(blob.read_bytes())
    assert "has crane:1" in the_only(serving, neighbours=(address,)).message


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """It takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.mark.alone  # it measures
def test_who_says_nothing_is_not_waited_for_and_holds_nobody_else_up(store, silent, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PATIENCE_S", 0.5)
    address = f"127.0.0.1:{silent.getsockname()[1]}"
    begun = time.monotonic()
    said = found(store, neighbours=(address,), local_sources=(tmp_path / "gone",))
    assert time.monotonic() - begun < 5
    assert "no answer within" in said[f"neighbour {address}"].message
    assert "it is not there" in said[f"folder {tmp_path / 'gone'}"].message
    connection, _ = silent.accept()
    connection.close()
    for thread in threading.enumerate():
        if thread.name.startswith("neighbour"):
            thread.join(20)


def test_mirrors(serving: Store, server, identity, repository):
    server.anonymous()
    wrong = "https://127.0.0.1:1"
    blob = blob_of(serving)
    repository.blobs[blob.name] = blob.read_bytes()
    said = found(serving, identity, mirrors=(server.url, f"{server.url}/copy", wrong))
    whole, elsewhere, away = said.values()

    assert (whole.level, whole.message) == ("ok", "it has crane:1")
    assert elsewhere.level == "warning"
    assert "does not have crane:1" in elsewhere.message
    assert f"{server.url}/copy/blobs/" in elsewhere.advice
    assert away.level == "warning"
    assert set(server.asked) == {f"blobs/{blob.name}", f"copy/blobs/{blob.name}"}, "nothing else is asked for"


def test_a_mirror_whose_certificate_nobody_vouches_for(serving: Store, server):
    server.anonymous()
    said = the_only(serving, mirrors=(server.url,))
    assert said.level == "warning"
    assert "TLS failed" in said.message
    assert "authority" in said.advice


def test_a_mirror_of_a_device_that_has_nothing_yet(store: Store, server, identity):
    server.anonymous()
    assert the_only(store, identity, mirrors=(server.url,)).level == "ok"


def test_lending(store: Store, neighbour: Sharing, silent: socket.socket):
    assert the_only(store, neighbour_listen=f"0.0.0.0:{neighbour.port}").level == "ok"
    assert the_only(store, neighbour_listen="127.0.0.1:1").level == "warning"


# -- what else keeps files away ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hour", "level"), [(23, "ok"), (12, "warning")])
def test_hours(hour, level):
    clock = FakeClock(dt.datetime(2026, 3, 4, hour, 30).astimezone().timestamp())
    said = sources.download_hours(SyncSettings(transfer_window="22:00-06:00"), clock)
    assert said.level == level
    assert f"{hour}:30" in said.message


def test_files_over_the_broker():
    up, down = Finding("broker", "ok", ""), Finding("broker", "failed", "")
    assert sources.over_the_broker(SyncSettings(), up).level == "ok"
    assert sources.over_the_broker(SyncSettings(), down).message == "needs the broker"
    assert "sync.mqtt_transfers" in sources.over_the_broker(SyncSettings(mqtt_transfers=False), up).message
