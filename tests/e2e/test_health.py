"""What models do on a real device reaches the gate of a real rollout, and the evidence of it can be judged again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.world import World

pytestmark = [pytest.mark.long, pytest.mark.mosquitto, pytest.mark.timeout(180)]

HEALTH = {"require": True, "devices": 1, "requests": 30, "rows": 8, "errors_of": 30, "patience_s": 1000.0}
OFTEN = {"heartbeat_s": 0.5, "telemetry_interval_s": 1.0}


def test_a_wave_waits_for_what_a_real_device_tells_and_is_judged_by_it(tmp_path: Path) -> None:
    with World(tmp_path, sync=OFTEN, server={"health": HEALTH, "telemetry": {"window_s": 2.0}}) as world:
        before = world.fleet.get("devices/device")["telemetry"]
        world.until("the device tells of release 1", lambda: told(world, 1) > 30)
        assert before is None or before["told"]["device"] == "device"

        world.update()
        world.until("release 2 is committed", lambda: world.committed(2))
        world.until("its rollout ends", lambda: world.fleet.get("rollouts")[0]["state"] in {"completed", "aborted"})
        rollout = world.fleet.get("rollouts")[0]
        assert rollout["state"] == "completed", rollout["reason"]
        assert rollout["verdict"]["health"]["models"]["digits"]["why"] == "health of 1 devices: nothing found"

        evidence = json.loads(world.fleet.run("rollout", "evidence", rollout["id"], "--json"))
        known = {one["sample"]["test"]: one["sample"] for one in evidence["samples"]}
        assert {"latency", "errors"} <= known.keys()
        assert known["latency"]["before"] > 0
        assert known["latency"]["now"] > 0
        assert known["latency"]["of_now"] >= 30
        assert known["errors"]["now"] == 0
        assert "all verdicts come out the same" in world.fleet.run("rollout", "evidence", rollout["id"])

        shown = world.fleet.run("device", "show", "device")
        assert "digits:2" in shown.split("health  of")[1]
        assert "digits:2" in world.fleet.run("device", "health", "device", "--by", "minutes")
        figures = world.fleet.get("devices/device")["telemetry"]["told"]["figures"]
        assert not any(set(one) - {"model", "release", "figures"} for one in figures), "nothing else is told"
        assert world.traffic.failed == []


def told(world: World, release: int) -> int:
    """How many requests the device has told of in all, of a release."""
    found = world.fleet.get("devices/device/figures?by=days")
    return sum(one["requests"] for one in found if one["release"] == release)
