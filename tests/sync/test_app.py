"""What keeps `sync` going when something it did not foresee happens, and what it tells systemd."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agent import config
from agent.contract.reasons import Reason
from agent.contract.reports import Hardware
from agent.store import Store
from agent.sync import app
from agent.sync.exclusive import StoreBusy, exclusive
from agent.sync.fleet.link import Broker, Link
from agent.sync.fleet.outbox import Outbox
from agent.sync.problems import Problem
from agent.sync.trust.follower import FIRST_RETRY_S, Follower
from tests.sync.bench import Bench
from tests.sync.conftest import eventually
from tests.sync.test_process import ROOT, Device

pytestmark = pytest.mark.usefixtures("script_runtime")


class Oracle:
    """Says or raises what it is told to."""

    def __init__(self, *answers) -> None:
        self.answers = list(answers)

    def remembered(self):
        return None

    def refresh(self):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_the_follower_outlives_what_nobody_foresaw(tmp_path: Path):
    bench = Bench(tmp_path)
    bench.want(1)
    told = []
    follower = Follower(Oracle(RecursionError("deep"), bench.desired()), 900.0, lambda: told.append(1), jitter=lambda: 0.5)

    follower.look()
    assert follower.problem is not None
    assert follower.problem.reason is Reason.BAD_SIGNATURE
    assert follower.pause_s() == FIRST_RETRY_S
    follower.look()

    assert follower.problem is None
    assert follower.current == bench.desired()
    assert follower.pause_s() == 900.0
    assert len(told) == 2


def test_news_are_told_once(tmp_path: Path):
    told = []
    trouble = [Problem(Reason.DOWNLOAD_FAILED, "unplugged") for _ in range(3)]
    follower = Follower(Oracle(*trouble), 900.0, lambda: told.append(1), jitter=lambda: 0.5)
    pauses = []
    for _ in range(3):
        follower.look()
        pauses.append(follower.pause_s())

    assert told == [1]
    assert pauses == [5.0, 10.0, 20.0]


def test_what_is_due_is_looked_after_also_while_nothing_is_new(tmp_path: Path):
    """A fleet may want the same for a year; certificates end meanwhile."""
    bench = Bench(tmp_path)
    bench.want(1)
    told, after = [], []
    oracle = Oracle(*[bench.desired() for _ in range(5)])

    def looked() -> None:
        after.append(1)
        if len(after) == 5:
            follower.stop()
        elif len(after) == 2:
            raise RuntimeError("not foreseen")

    follower = Follower(oracle, 0.01, lambda: told.append(1), looked, jitter=lambda: 0.5)
    follower.run()

    assert len(after) == 5
    assert told == [1]


def test_a_probe_that_hangs_starves_neither_the_watchdog_nor_the_end(
    tmp_path: Path, identity, repository, server, monkeypatch: pytest.MonkeyPatch
):
    device = Device(tmp_path, identity, repository, server)
    going_on = threading.Event()
    monkeypatch.setattr("agent.host.hardware.probe", lambda: going_on.wait(20) and Hardware(arch="x86_64"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "200000")

        def wait_and_end() -> None:
            fed = 0
            while fed < 4:
                fed += listener.recv(256) == b"WATCHDOG=1"
            os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=wait_and_end)
        thread.start()
        try:
            app.main(config.load(device.config))
        finally:
            going_on.set()
            thread.join()
            device.close()
    eventually(lambda: not any(t.name == "probe" for t in threading.enumerate()), "the probe to end")


def test_the_link_outlives_what_nobody_foresaw(tmp_path: Path):
    tries = []

    def tls():
        tries.append(1)
        raise ValueError("not a context")

    box = Outbox(tmp_path / "o.db")
    link = Link("crane-7", Broker("127.0.0.1", 1, tls), box, lambda: 1, lambda _said, _alone: None, jitter=lambda: 0.0)
    link.start()
    eventually(lambda: len(tries) >= 3, "three tries")
    link.stop()
    box.close()

    assert "ValueError" in (link.problem or "")


def test_one_process_per_store(store: Store):
    with exclusive(store), pytest.raises(StoreBusy, match=str(os.getpid())), exclusive(store):
        pass
    with exclusive(store):
        pass


def test_systemd_is_told(tmp_path: Path, identity, repository, server):
    device = Device(tmp_path, identity, repository, server)
    said: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(0.1)
        process = subprocess.Popen(
            [sys.executable, "-m", "agent.cli", "sync", "--config", str(device.config)],
            cwd=ROOT,
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"},
            stderr=subprocess.DEVNULL,
        )
        ending = threading.Event()

        def listen() -> None:
            while not ending.is_set():
                try:
                    said.append(listener.recv(256).decode())
                except TimeoutError:
                    continue

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            eventually(lambda: said.count("WATCHDOG=1") >= 4, "the watchdog to be fed")
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0
            eventually(lambda: "STOPPING=1" in said, "the end to be told")
        finally:
            process.kill()
            process.wait()
            ending.set()
            thread.join()
            device.close()

    assert said[0] == "READY=1"


def test_what_killed_ones_left_half_written_is_removed(store: Store):
    old, new = store.private / ".state.json.a1b2c3d4.tmp", store.private / ".state.json.e5f6a7b8.tmp"
    old.write_bytes(b"half")
    new.write_bytes(b"being written by a command, right now")
    hours_ago = time.time() - 7200
    os.utime(old, (hours_ago, hours_ago))
    with exclusive(store):
        assert not old.exists()
        assert new.exists()
