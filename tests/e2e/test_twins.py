"""A card that was copied after its device had enrolled: two agents with one identity, on a real broker and a real fleet server."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest
from device import Device
from processes import command

from tests.e2e.world import World

pytestmark = [pytest.mark.long, pytest.mark.mosquitto, pytest.mark.timeout(150)]


def examined(world: World, device: Device) -> dict[str, dict[str, Any]]:
    line = command("edge-agent", "doctor", "--config", device.config, "--json")
    done = subprocess.run(line, env=world.processes.environment, capture_output=True, text=True, timeout=60, check=False)
    return {finding["name"]: finding for finding in json.loads(done.stdout)}


def test_two_devices_with_one_identity_are_told_apart(world: World) -> None:
    fleet = world.fleet
    world.until("the first rollout ends", lambda: fleet.get("rollouts")[0]["state"] == "completed")
    assert not fleet.devices()["device"]["shared"]
    assert examined(world, world.device)["identity"]["level"] == "ok"

    world.end("sync")
    twin = Device("twin", world.home, world.processes)
    twin.prepare()
    for folder in ("store", "identity"):
        shutil.copytree(world.device.folder / folder, twin.folder / folder)
    world.restart("sync")
    world.until("the device is back", lambda: fleet.devices()["device"]["online"])
    assert fleet.get("status")["warnings"] == [], "a device that restarts is one device"
    twin.start()

    world.until("the server warns", lambda: any("several machines" in text for text in fleet.get("status")["warnings"]))
    assert fleet.devices()["device"]["shared"]
    assert "identity_shared" in {event["name"] for event in fleet.get("events?limit=100&device=device")}
    assert "several machines" in fleet.run("device", "list")
    both = (world.device, twin)
    world.until("doctor finds it", lambda: any(examined(world, one)["identity"]["level"] == "failed" for one in both))
    shown = [
        subprocess.run(
            command("edge-agent", "status", "--socket", one.socket, "--config", one.config),
            env=world.processes.environment, capture_output=True, text=True, timeout=60, check=False,
        ).stdout
        for one in both
    ]  # fmt: skip
    assert any("another device has this one's identity" in text for text in shown)
    said = [(world.folder / "logs" / f"{one.name}-sync.log").read_text() for one in both]
    assert any("another device has this one's identity" in text for text in said)

    for part in ("sync", "serve"):
        world.processes.kill(f"{twin.name}-{part}")  # for an hour the server takes both for what they were
    world.until("the device is back", world.device_is_connected)
    release = world.update()
    world.until(f"the first device serves release {release}", lambda: world.committed(release))
    verdict = fleet.get("rollouts")[0]
    assert (verdict["state"], verdict["verdict"]["counts"]["committed"]) == ("running", 0), "nobody's success"
