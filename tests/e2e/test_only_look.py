"""A rollout that only looks, with the real parts: copies of an app's requests, and nothing installed until somebody says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.client import Client
from tests.e2e.world import World

pytestmark = [pytest.mark.long, pytest.mark.mosquitto, pytest.mark.timeout(120)]


def test_a_release_is_looked_at_and_then_installed(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        world.version = 2
        world.publish(careful=True)
        world.until("the first rollout is over", lambda: world.fleet.get("rollouts")[0]["state"] == "completed")
        rollout = world.fleet.roll_out(2, "--shadow")
        world.until("the look is over", lambda: world.fleet.get(f"rollouts/{rollout}")["state"] == "completed")
        assert world.fleet.get(f"rollouts/{rollout}")["verdict"]["why"] == "1 shadowed"
        assert world.serving() == 1
        world.until("its memory goes back", lambda: loaded(world) == {"1"})
        world.until("the device rests", world.at_rest)

        world.fleet.roll_out(2)
        world.until("release 2 is committed", lambda: world.committed(2))
        assert world.traffic.failed == []
        assert world.traffic.wrong == []


def loaded(world: World) -> set[str]:
    with Client(world.device.socket) as client:
        return set(client.status()["models"]["digits"]["versions"])
