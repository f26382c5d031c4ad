"""The real `edge-agent sync` process against a real HTTPS fleet, killed where it hurts. The broker is away all the time, and must not matter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agent.contract.acceptance import WatchRules
from agent.contract.reports import Phase
from agent.store import Selection, Store
from tests import warm
from tests.sync.conftest import eventually
from tests.sync.fake_serve import FakeServe, stats
from tests.sync.fleet import Repository, Server, script_release, sha

pytestmark = [pytest.mark.usefixtures("script_runtime"), pytest.mark.timeout(90)]

ROOT = Path(__file__).parents[2]
MODEL = "crane"


class Device:
    """A device's folder, its fake `serve`, and the `sync` process."""

    def __init__(self, folder: Path, identity, repository: Repository, server: Server) -> None:
        self.folder, self.repository, self.server = folder, repository, server
        self.store = Store.create(folder / "store")
        self.serve = FakeServe(self.store, folder / "agent.sock")
        self.process: subprocess.Popen[bytes] | None = None
        self.config = folder / "agent.yaml"
        settings = {
            "store": str(self.store.root),
            "serve": {"socket": str(folder / "agent.sock"), "shadow_max_load": 0, "shadow_max_celsius": 0},
            "sync": {
                "identity": str(identity.folder),
                "poll_interval_s": 0.2,
                "heartbeat_s": 1.0,
                "disk_reserve_bytes": 0,
                "watch_poll_s": 0.05,
                "trial_socket": str(folder / "no-trial.sock"),
            },
        }
        self.config.write_text(json.dumps(settings))

    def start(self) -> None:
        with (self.folder / "sync.log").open("ab") as log:
            self.process = warm.Process(
                "agent.cli", ["sync", "--config", str(self.config)], env=os.environ, stdout=log, stderr=log
            )

    def kill(self, number: int = signal.SIGKILL) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(15)
        self.process = None
        return status

    def close(self) -> None:
        if self.process is not None:
            self.kill()
        self.serve.stop()

    def state(self) -> dict:
        try:
            return json.loads((self.store.private / "updates" / f"{MODEL}.json").read_bytes())
        except FileNotFoundError:
            return {"phase": None, "answers": [], "target": None}

    def phase(self) -> str:
        return self.state()["phase"]

    @property
    def active(self) -> int | None:
        return self.serve.models.get(MODEL, {}).get("active")

    def answer(self) -> dict:
        return self.state()["answers"][-1]

    def publish(self, version: int, script: str = "scale 1", **options) -> None:
        manifest, contents = script_release(self.folder / "releases", version, script, **options)
        self.repository.publish(manifest, contents)

    def install(self, version: int, **options) -> None:
        self.publish(version, **options)
        self.repository.assign(MODEL, version)
        self.start()
        eventually(lambda: self.serves_at_rest(version), f"release {version}", 30)

    def serves_at_rest(self, version: int) -> bool:
        state = self.state()
        refused = state["phase"] == "quarantined" and state["target"] == version
        assert not refused, f"release {version} is refused: {state['answers'][-1]}"
        return self.active == version and state["phase"] == "steady"

    def check_store(self) -> None:
        """Whatever happened: what is selected is whole, and every blob is what its name says."""
        for model, selection in self.store.selections().items():
            assert isinstance(selection, Selection)
            assert self.store.release(model, selection.active)
        for blob in self.store.blobs.iterdir():
            assert sha(blob.read_bytes()) == blob.name

    def log(self) -> str:
        return (self.folder / "sync.log").read_text()


@pytest.fixture
def device(tmp_path: Path, identity, repository: Repository, server: Server):
    device = Device(tmp_path, identity, repository, server)
    yield device
    device.close()


def stall_blob(device: Device) -> threading.Event:
    """The server sends half of a blob and then nothing, until the event is set."""
    go = threading.Event()

    def fault(handler) -> bool:
        if go.is_set():
            return False
        data = device.repository.blobs[handler.path.rsplit("/", 1)[1]]
        handler.answer(200, data[: len(data) // 2], length=len(data))
        go.wait(30)
        handler.hang_up()
        return True

    device.server.faults["blobs/"] = fault
    return go


def kill_in_fetching(device: Device) -> None:
    go = stall_blob(device)
    device.publish(2, padding=2_000_000)
    device.repository.assign(MODEL, 2)
    staged = device.store.staging
    eventually(lambda: any(path.stat().st_size > 500_000 for path in staged.iterdir()), "half a download")
    assert device.phase() == "fetching"
    device.kill()
    go.set()
    device.server.asked.clear()


def marks(device: Device) -> set[str]:
    """The trials that are under way, by their folders."""
    return {str(mark.parent) for mark in device.store.private.glob("scratch/*/mark")}


def kill_in_trialing(device: Device) -> None:
    device.publish(2, "load mark 3")
    device.repository.assign(MODEL, 2)
    eventually(lambda: marks(device), "the trial")
    assert device.phase() == "trialing"
    device.kill()


def kill_in_activating(device: Device) -> None:
    device.serve.block["load"] = threading.Event()
    device.publish(2)
    device.repository.assign(MODEL, 2)
    eventually(lambda: ("load", MODEL, 2) in device.serve.calls, "serve to be asked to load")
    assert device.phase() == "activating"
    device.kill()
    device.serve.block.pop("load").set()


def kill_between_selecting_and_activating(device: Device) -> None:
    device.serve.block["activate"] = threading.Event()
    device.publish(2)
    device.repository.assign(MODEL, 2)
    eventually(lambda: ("activate", MODEL, 2) in device.serve.calls, "serve to be asked to activate")
    selection = device.store.selection(MODEL)
    assert selection is not None
    assert selection.active.version == 2
    device.kill()
    device.serve.block.pop("activate").set()


def kill_in_watching(device: Device) -> None:
    device.publish(2, watch=WatchRules(duration_s=2.0, max_duration_s=10.0))
    device.repository.assign(MODEL, 2)
    eventually(lambda: device.phase() == "watching", "the watch")
    device.kill()


KILLS = [kill_in_fetching, kill_in_trialing, kill_in_activating, kill_between_selecting_and_activating, kill_in_watching]


@pytest.mark.parametrize("kill", KILLS)
def test_killed_in_the_middle_the_update_is_completed_after_a_restart(kill, device: Device):
    device.install(1)
    kill(device)
    device.check_store()
    assert device.active in (1, 2)

    device.start()
    eventually(lambda: device.serves_at_rest(2), "release 2", 30)

    device.check_store()
    assert device.answer()["outcome"] == "committed"
    if kill is kill_in_fetching:
        asked = [path for path in device.server.asked if path.startswith("blobs/")]
        assert len(asked) == 1, "resumed, not begun again"


def test_killed_while_rolling_back(device: Device):
    device.install(1)
    device.serve.block["rollback"] = threading.Event()
    device.publish(2, watch=WatchRules(duration_s=20.0))
    device.repository.assign(MODEL, 2)
    eventually(lambda: device.phase() == "watching", "the watch")
    device.serve.answer_with(MODEL, 2, stats(ok=10, run=90))
    eventually(lambda: ("rollback", MODEL, 1) in device.serve.calls, "the rollback")
    device.kill()
    device.check_store()
    selection = device.store.selection(MODEL)
    assert selection is not None
    assert selection.active.version == 1, "a serve that starts now loads the good one"
    device.serve.block.pop("rollback").set()

    device.start()
    eventually(lambda: device.phase() == "quarantined", "the rollback to end")
    assert device.active == 1
    assert device.answer()["reason"] == "error_ratio"


def test_killed_in_quarantine_it_still_refuses(device: Device):
    device.install(1)
    device.publish(2, "scale 3", expect=2.0)
    device.repository.assign(MODEL, 2)
    eventually(lambda: device.phase() == "quarantined", "the refusal")
    device.kill()
    device.server.asked.clear()
    device.start()
    eventually(lambda: device.server.asked.count("record") >= 3, "three more rounds")

    assert device.phase() == "quarantined"
    assert not any(path.startswith(("blobs/", "targets/releases")) for path in device.server.asked)
    assert device.active == 1


def test_a_trial_that_takes_sync_down_each_time_ends_in_quarantine(device: Device):
    """The kill stands for the machine going down: SIGKILL, four trials in a row."""
    device.install(1)
    device.publish(2, "load mark 60")
    device.repository.assign(MODEL, 2)
    seen: set[str] = set()
    for times in range(1, 5):
        eventually(lambda known=frozenset(seen): marks(device) - known, f"trial {times}")
        seen |= marks(device)
        device.kill()
        device.start()
    eventually(lambda: device.phase() == "quarantined", "the refusal")

    assert device.answer()["reason"] == "interrupted_too_often"
    assert device.active == 1


@pytest.mark.parametrize("where", [Phase.FETCHING, Phase.TRIALING, Phase.ACTIVATING, Phase.WATCHING, Phase.STEADY])
def test_sigterm_ends_it_promptly_and_in_order(where, device: Device):
    device.install(1)
    if where is Phase.FETCHING:
        stall_blob(device)
        device.publish(2, padding=2_000_000)
    elif where is Phase.TRIALING:
        device.publish(2, "load sleep 60")
    elif where is Phase.ACTIVATING:
        device.serve.block["load"] = threading.Event()
        device.publish(2)
    elif where is Phase.WATCHING:
        device.publish(2, watch=WatchRules(duration_s=60.0))
    if where is not Phase.STEADY:
        device.repository.assign(MODEL, 2)
    eventually(lambda: device.phase() == where.value, where.value)

    # The longest wait allowed for threads that are stuck in the network is GOODBYE_S.
    assert device.kill(signal.SIGTERM) == 0
    device.check_store()
    assert "Traceback" not in device.log()


def test_two_agents_on_one_store(device: Device):
    device.install(1)
    second = subprocess.run(
        [sys.executable, "-c", "from agent.sync.cli import sync; sync()", "--config", str(device.config)],
        cwd=ROOT, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip

    assert device.process is not None
    assert second.returncode == 1
    assert f"another edge-agent sync holds the store {device.store.root} (process {device.process.pid})" in second.stderr


def test_without_a_network_it_keeps_quiet_and_goes_on(device: Device):
    """It starts with nothing reachable, finishes an interrupted trial from what is on disk, and waits."""
    device.install(1)
    kill_in_trialing(device)
    device.server.faults[""] = lambda handler: handler.answer(503, b"{}") or True
    device.start()
    eventually(lambda: device.serves_at_rest(2), "release 2 from what is on disk", 30)
    refreshes = len(device.server.asked)
    eventually(lambda: len(device.server.asked) > refreshes, "another look")

    assert device.process is not None
    assert device.process.poll() is None


def test_not_enrolled_says_what_to_do(tmp_path: Path):
    config = tmp_path / "agent.yaml"
    config.write_text(json.dumps({"store": str(tmp_path / "store"), "sync": {"identity": str(tmp_path / "none")}}))
    done = subprocess.run(
        [sys.executable, "-c", "from agent.sync.cli import sync; sync()", "--config", str(config)],
        cwd=ROOT, capture_output=True, text=True, timeout=30, check=False, env={**os.environ},
    )  # fmt: skip

    assert done.returncode == 1
    assert "this device is not enrolled" in done.stderr
    assert "edge-agent enrol" in done.stderr
