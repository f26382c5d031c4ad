"""The server is lost and comes back from a copy that is older than what its devices know. They follow it again, after `keys recover`."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable

import pytest
from fleet import MODEL
from processes import StepFailed, command

from tests.e2e.world import GOOD, WEAK, World

pytestmark = [pytest.mark.long, pytest.mark.mosquitto, pytest.mark.timeout(150)]


def until_it_looked(world: World, what: str, condition: Callable[[], object]) -> None:
    """The device is poked until it has heard that; else it would look within a quarter of an hour."""
    groups = itertools.cycle(["one", "other"])

    def poked() -> bool:
        world.fleet.run("device", "group", "device", next(groups))
        return bool(condition())

    world.until(what, poked, every_s=0.5)


def test_publish_copy_publish_restore_recover_publish(world: World) -> None:
    fleet, copy = world.fleet, world.folder / "copy"
    world.until("the first rollout ends", lambda: fleet.get("rollouts")[0]["state"] == "completed")
    world.kill("fleet")
    shutil.copytree(fleet.data, copy)
    world.restart("fleet")
    release = world.update(WEAK)
    world.until(f"release {release} is committed", lambda: world.committed(release))
    failed = len(world.traffic.failed)

    world.kill("fleet")
    shutil.rmtree(fleet.data)
    shutil.copytree(copy, fleet.data)
    world.restart("fleet")
    until_it_looked(world, "the server warns", lambda: any("keys recover" in text for text in fleet.get("status")["warnings"]))
    assert world.serving() == release, "it serves what it has"

    world.kill("fleet")
    world.kill("sync")  # whoever looks right after the recovery learns of the older list before the new one has its number
    fleet.run("keys", "recover", fleet.data, "--key", fleet.keys / "root.key")
    world.restart("fleet")
    again = world.update(GOOD)  # its publisher's list has a number that the device holds too, with the lost release in it
    world.restart("sync")
    world.until(f"release {again} is committed", lambda: world.committed(again))
    world.until("the rollout is complete", lambda: fleet.get("rollouts")[0]["state"] == "completed")
    assert fleet.get("status")["warnings"] == []
    assert world.traffic.failed[failed:] == []


def test_a_number_that_devices_know_as_another_release_is_not_given_again(world: World) -> None:
    fleet, copy = world.fleet, world.folder / "another-copy"
    world.until("the last rollout ends", lambda: fleet.get("rollouts")[0]["state"] in {"completed", "aborted"})
    world.kill("fleet")
    shutil.copytree(fleet.data, copy)
    world.restart("fleet")
    release = world.update(WEAK)
    world.until(f"release {release} is committed", lambda: world.committed(release))
    world.kill("sync")
    world.processes.call(*command("edge-agent", "hold", MODEL, "--config", world.device.config))  # else it soon goes back
    world.kill("fleet")
    shutil.rmtree(fleet.data)
    shutil.copytree(copy, fleet.data)
    fleet.run("keys", "recover", fleet.data, "--key", fleet.keys / "root.key")
    world.restart("fleet")
    path = world.folder / f"release-{release}" / "release.yaml"
    shutil.copy(path.parent.parent / "release-1" / "model.onnx", path.parent / "model.onnx")
    world.restart("sync")
    world.until("it is heard", lambda: (fleet.devices()["device"]["models"].get(MODEL) or {}).get("serving") == release)

    with pytest.raises(StepFailed, match="publish this one with a larger version"):
        fleet.publish(path)
