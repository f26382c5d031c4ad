"""What meets operators in the field, on a fleet of three real devices: held, full, misspelt, superseded, repaired, gone back, silent."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from device import Device
from fleet import MODEL, Fleet
from processes import Processes, StepFailed, command, processes

from agent.client import Client, ClientError
from tests.e2e.world import DIGITS, GOOD, TREACHEROUS, WATCH, Traffic

pytestmark = [pytest.mark.long, pytest.mark.mosquitto, pytest.mark.timeout(240)]

NAMES = ("dev-a", "dev-b", "dev-c")
LIMIT_S = 60.0
TOO_MUCH_BYTES = 10**15


class Yard:
    """A fleet server and three devices. Every release is published once and has the next number."""

    def __init__(self, folder: Path, running: Processes) -> None:
        self.folder, self.processes, self.version = folder, running, 0
        self.models: dict[int, str] = {}
        self.fleet = Fleet(folder, running, lambda _: None, lambda: None)
        self.fleet.init()
        self.fleet.serve()
        self.devices = {name: Device(name, folder, running) for name in NAMES}
        for name, device in self.devices.items():
            device.prepare()
            device.enrol(self.fleet.run("token", "create", "--device", name).strip())
            device.start()
        self.until("all devices are there", lambda: all(one["online"] for one in self.fleet.devices().values()))
        self.roll_out(self.publish())

    # -- what operators do -------------------------------------------------------------------------------------------------

    def publish(self, model: str = GOOD, *, ballast: bool = False, **watch: float) -> int:
        """`ballast`: with bytes that no device has."""
        self.version += 1
        self.models[self.version] = model
        folder = self.folder / f"release-{self.version}"
        folder.mkdir()
        shutil.copy(DIGITS / "models" / model, folder / "model.onnx")
        files = {}
        if ballast:
            files["ballast.bin"] = "ballast.bin"
            (folder / "ballast.bin").write_bytes(os.urandom(100_000))
        release = {
            "model": MODEL, "version": self.version, "files": files,
            "variants": [{"name": "cpu", "runtime": "onnx", "file": "model.onnx"}], "acceptance": {"watch": {**WATCH, "duration_s": 0.5, **watch}},
        }  # fmt: skip
        (folder / "release.yaml").write_text(yaml.safe_dump(release))
        self.fleet.publish(folder / "release.yaml")
        return self.version

    def start(self, version: int, *options: object) -> str:
        return self.fleet.roll_out(version, *options)

    def roll_out(self, version: int, *options: object) -> str:
        rollout = self.start(version, *options)
        self.ends(rollout, "completed")
        return rollout

    def refused(self, *arguments: object) -> str:
        """What `edge-fleet …` says when it is refused."""
        with pytest.raises(StepFailed) as error:
            self.fleet.run(*arguments)
        return str(error.value)

    def on(self, name: str, *arguments: object) -> str:
        """`edge-agent …` on the device."""
        return self.processes.call(*command("edge-agent", *arguments, "--config", self.devices[name].config))

    def configure(self, name: str, **sync: object) -> None:
        """Changes agent.yaml of the device, and starts its `sync` anew."""
        config = self.devices[name].config
        settings = yaml.safe_load(config.read_text())
        settings["sync"] |= sync
        config.write_text(yaml.safe_dump(settings))
        self.processes.kill(f"{name}-sync")
        self.devices[name].start_part("sync")
        self.until(f"{name} is there", lambda: self.fleet.devices()[name]["online"])

    # -- what they see -----------------------------------------------------------------------------------------------------

    def until(self, what: str, condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > deadline:
                self.processes.check()
                raise AssertionError(f"not within {limit_s} s: {what}; {self.serving()}; {self.fleet.get('rollouts?limit=1')}")
            threading.Event().wait(0.05)

    def ends(self, rollout: str, state: str) -> None:
        self.until(f"{rollout} is {state}", lambda: self.fleet.rollout(rollout)["state"] == state)

    def standings(self, rollout: str) -> dict[str, str]:
        return {one["device"]: one["standing"] for one in self.fleet.get(f"rollouts/{rollout}/devices")["devices"]}

    def serving(self) -> dict[str, int | None]:
        """What `serve` itself says, on each device."""
        return {name: self._serving(device) for name, device in self.devices.items()}

    def _serving(self, device: Device) -> int | None:
        try:
            with Client(device.socket) as client:
                status, _, body = client.request("GET", f"/control/v1/models/{MODEL}")
        except ClientError:
            return None
        return json.loads(bytes(body))["active"] if status == 200 else None

    def answers(self, name: str) -> list[dict[str, Any]]:
        path = self.devices[name].folder / f"store/sync/updates/{MODEL}.json"
        found: list[dict[str, Any]] = json.loads(path.read_bytes())["answers"]
        return found


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    folder = tmp_path_factory.mktemp("yard")
    with processes(folder / "logs", {"EDGE_FLEET_PROFILE": str(folder / "profile.yaml")}) as running:
        yield Yard(folder, running)


def test_a_misspelt_group_and_a_scope_that_nobody_is_in_are_refused(yard: Yard) -> None:
    version = yard.publish()
    assert "no device is in the group 'canray'" in yard.refused("rollout", "start", f"{MODEL}:{version}", "--waves", "canray")
    assert "no device is in label:site=berlin" in yard.refused(
        "rollout", "start", f"{MODEL}:{version}", "--scope", "label:site=berlin"
    )
    assert set(yard.serving().values()) == {1}


def test_a_label_makes_a_scope_and_the_device_says_by_which_rule_it_runs(yard: Yard) -> None:
    before = yard.serving()["dev-a"]
    yard.fleet.run("device", "label", "dev-b", "site=berlin")
    version = yard.publish()
    yard.roll_out(version, "--scope", "label:site=berlin")
    yard.until("dev-b serves it", lambda: yard.serving()["dev-b"] == version)
    assert yard.serving()["dev-a"] == before
    said = yard.on("dev-b", "why", MODEL)
    assert "what every device in label:site=berlin runs, and this is one" in said
    assert "labels: site=berlin" in said
    yard.fleet.run("rule", "remove", MODEL, "--scope", "label:site=berlin", "--yes")
    yard.until("dev-b follows everyone's rule", lambda: yard.serving()["dev-b"] == before)


def test_five_percent_of_three_is_one_and_a_newer_release_takes_its_place_half_done(yard: Yard) -> None:
    before, first, second = yard.serving()["dev-a"], yard.publish(), yard.publish()
    rollout = yard.start(first, "--waves", "5%", "--confirm")
    yard.ends(rollout, "waiting")
    (reached,) = [name for name, release in yard.serving().items() if release == first]
    newer = json.loads(yard.fleet.run("rollout", "supersede", rollout, f"{MODEL}:{second}", "--waves", "2", "--json"))["id"]
    yard.ends(rollout, "superseded")
    yard.ends(newer, "waiting")
    assert yard.serving()[reached] in {first, second}
    assert sorted(yard.serving().values()).count(second) == 2
    (move,) = json.loads(yard.fleet.run("rollout", "promote", newer, "--plan", "--json"))["moves"]
    assert (move["release"], move["changing"], move["online"], move["unfit"]) == (second, 1, 1, 0)
    yard.fleet.run("rollout", "promote", newer)
    yard.ends(newer, "completed")
    (back,) = json.loads(yard.fleet.run("rollback", MODEL, "--plan", "--json"))["moves"]
    assert (back["release"], back["changing"]) == (before, 3), "nobody is taken back by asking"
    assert set(yard.serving().values()) == {second}
    gone_back = [one for one in yard.answers(reached)[-2:] if one["release"] == before]
    assert not gone_back, "it went straight on"


def test_a_held_device_is_not_waited_for(yard: Yard) -> None:
    held = yard.serving()["dev-a"]
    yard.on("dev-a", "hold", MODEL, held)
    yard.until("the fleet knows", lambda: yard.fleet.devices()["dev-a"]["models"][MODEL]["held"])
    version = yard.publish()
    rollout = yard.roll_out(version)
    assert yard.standings(rollout)["dev-a"] == "held"
    assert yard.serving()["dev-a"] == held
    yard.on("dev-a", "unhold", MODEL)
    yard.until("it follows", lambda: yard.serving()["dev-a"] == version)


def test_a_device_without_space_does_not_keep_a_wave_waiting_for_ever(yard: Yard) -> None:
    yard.configure("dev-c", disk_reserve_bytes=TOO_MUCH_BYTES)
    version = yard.publish(ballast=True)
    rollout = yard.start(version, "--time-limit", "8s")
    yard.until("it says so", lambda: yard.standings(rollout)["dev-c"] == "failed")
    yard.ends(rollout, "completed")
    assert yard.standings(rollout)["dev-c"] == "timed_out"
    yard.configure("dev-c", disk_reserve_bytes=64 * 1024 * 1024)
    yard.until("there is room now, and it follows", lambda: yard.serving()["dev-c"] == version)


def test_a_device_that_rolled_back_is_shown_after_the_end_repaired_and_tries_again(yard: Yard) -> None:
    before, version = yard.serving()["dev-b"], yard.publish(TREACHEROUS, duration_s=1.5, max_duration_s=4)
    traffic = Traffic(yard.devices["dev-b"].socket, yard.models)
    with contextlib.closing(_Stopping(traffic)):
        rollout = yard.start(version, "--max-failures", "1")
        yard.ends(rollout, "completed")
        assert yard.standings(rollout)["dev-b"] == "rolled_back"
        yard.until("it serves what it had", lambda: yard.serving()["dev-b"] == before)
    # Repaired: what asked in a way that the release cannot answer is gone.
    yard.fleet.run("rollout", "retry", rollout, "dev-b")
    yard.until("it tries again and stays", lambda: yard.standings(rollout)["dev-b"] == "committed")
    assert yard.serving()["dev-b"] == version
    assert yard.answers("dev-b")[-1]["attempt"] > 0
    assert "did not refuse" in yard.refused("rollout", "retry", rollout, "dev-b")


class _Stopping:
    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    def close(self) -> None:
        self._traffic.stop()


def test_after_a_downgrade_a_rollback_does_not_go_forward_by_itself(yard: Yard) -> None:
    older, newer = yard.publish(), yard.publish()
    yard.roll_out(newer)
    yard.roll_out(older)
    said = yard.refused("rollback", MODEL)
    assert f"--to {newer} --forward" in said
    assert set(yard.serving().values()) == {older}
    yard.fleet.run("rollback", MODEL, "--to", newer, "--forward")
    yard.until("all serve the newer one", lambda: set(yard.serving().values()) == {newer})


def test_devices_that_fall_silent_in_the_update_stall_the_rollout_until_they_are_back(yard: Yard) -> None:
    version = yard.publish(duration_s=6)
    rollout = yard.start(version)
    yard.until("all serve it on trial", lambda: set(yard.serving().values()) == {version})
    for name in ("dev-a", "dev-b"):
        yard.processes.kill(f"{name}-sync")
    yard.until("it stalls", lambda: (yard.fleet.rollout(rollout)["verdict"] or {})["verdict"] == "stall")
    assert [yard.standings(rollout)[name] for name in ("dev-a", "dev-b")] == ["lost", "lost"]
    assert rollout in " ".join(yard.fleet.get("status")["warnings"])
    assert yard.fleet.rollout(rollout)["state"] == "running"
    for name in ("dev-a", "dev-b"):
        yard.devices[name].start_part("sync")
    yard.ends(rollout, "completed")
