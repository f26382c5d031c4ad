"""How `serve` can end, and what it leaves behind for `sync`: a restart, or a crash."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from agent.client import Client
from agent.contract.codec import encode
from agent.diary import Diary
from agent.lives import Life
from agent.store import Choice, Selection, Store
from tests.serving.server import Server as ServeProcess
from tests.sync.fleet import script_release, sha

pytestmark = [pytest.mark.usefixtures("script_runtime"), pytest.mark.timeout(60)]

TERM, INT, KILL, ABRT = signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGABRT
ENDS = [
    # name, what the model does, the signal once it serves (None: it ends by itself before), whether that is an orderly end
    ("systemctl restart", "scale 1", TERM, True),
    ("Ctrl-C", "scale 1", INT, True),
    ("kill -9", "scale 1", KILL, False),
    ("the watchdog", "scale 1", ABRT, False),
    ("a fault in the engine", "run segfault", None, False),
    ("an engine that calls exit(0)", "run exit 0", None, False),
    ("a fault while it is closed", "close segfault", TERM, False),
    ("an exit(0) while it is closed", "close exit 0", TERM, False),
]


@pytest.fixture
def serve(tmp_path: Path):
    config = tmp_path / "agent.yaml"
    config.write_text(yaml.safe_dump({"store": str(tmp_path / "store"), "serve": {"socket": str(tmp_path / "agent.sock")}}))
    process = ServeProcess(tmp_path, "serve", "--config", config)
    yield process
    process.stop()


@pytest.mark.parametrize(("name", "script", "number", "orderly"), ENDS, ids=[row[0] for row in ENDS])
def test_how_it_ended(name, script, number, orderly, tmp_path, serve):
    store = Store.create(tmp_path / "store")
    manifest, contents = script_release(tmp_path / "releases", 1, script)
    for data in contents.values():
        store.blob(sha(data)).write_bytes(data)
    store.write_manifest(encode(manifest))
    store.select(Selection(model="crane", active=Choice(version=1, variant="cpu")))
    serve.start(wait=number is not None)
    diary = Diary(tmp_path / "serve")
    if number is not None:
        (life,) = diary.read()
        with Client(tmp_path / "agent.sock") as client:
            assert client.status()["instance"] == life.instance
        assert not life.ended
        serve.process.send_signal(number)
    serve.process.wait(20)

    assert [life.ended for life in diary.read()] == [orderly]


def test_a_second_serve_that_finds_the_socket_taken_is_no_life(tmp_path, serve):
    serve.start()
    line = [sys.executable, "-m", "agent.cli", "serve", "--config", str(tmp_path / "agent.yaml")]
    assert subprocess.run(line, capture_output=True, timeout=30, check=False).returncode != 0

    assert len(Diary(tmp_path / "serve").read()) == 1


def test_the_file_is_for_the_group_alone_and_holds_the_last_lives(tmp_path):
    diary = Diary(tmp_path / "serve")
    for number in range(100):
        diary.begin(f"{number}")
        diary.end(f"{number}")
    diary.begin("last")

    lives = diary.read()
    assert (len(lives), lives[0].instance) == (64, "37")
    assert lives[-1] == Life(instance="last", boot=lives[0].boot)
    assert all(life.ended for life in lives[:-1])
    assert stat.S_IMODE((tmp_path / "serve/lives.json").stat().st_mode) == 0o640


@pytest.mark.parametrize("what", ["nothing", "garbage", "too much", "a pipe", "a link", "a folder", "another format"])
def test_a_diary_that_is_none_is_empty(what, tmp_path):
    path = tmp_path / "lives.json"
    if what == "garbage":
        path.write_text("{")
    elif what == "too much":
        path.write_text('{"lives": []}' + " " * 100_000)
    elif what == "a pipe":
        os.mkfifo(path)
    elif what == "a link":
        (tmp_path / "elsewhere").write_text('{"lives": [{"instance": "a"}]}')
        path.symlink_to("elsewhere")
    elif what == "a folder":
        path.mkdir()
    elif what == "another format":
        path.write_text('{"lives": [{"instance": "a"}], "format": 99}')

    assert Diary(tmp_path).read() == ()


def test_a_diary_that_cannot_be_written_keeps_nobody_from_serving(tmp_path, serve):
    (tmp_path / "serve").write_text("in the way")
    serve.start()

    with Client(tmp_path / "agent.sock") as client:
        assert client.status()["instance"]
    serve.process.send_signal(TERM)
    assert serve.process.wait(20) == 0
    assert "will count as a crash" in serve.output()
