"""The server is lost and comes back from a copy that is older than what its devices know. They follow it again, after `keys recover`."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable

import pytest
from device import Device
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


def test_a_backup_makes_a_server_that_everybody_follows_without_a_visit(world: World) -> None:
    """Also a device that joined after it was taken, and though a release was published since."""
    fleet, backup = world.fleet, world.folder / "fleet.backup"
    world.until("the last rollout ends", lambda: fleet.get("rollouts")[0]["state"] in {"completed", "aborted"})
    fleet.run("backup", fleet.data, backup)
    late = Device("late", world.home, world.processes)
    late.prepare()
    late.enrol(fleet.run("token", "create", "--device", "late", "--group", "canary").strip())
    late.start()
    lost = world.update(WEAK)
    world.until(f"both serve release {lost}", lambda: serving(world) == {"device": lost, "late": lost})
    failed = len(world.traffic.failed)

    world.kill("fleet")
    shutil.rmtree(fleet.data)
    fleet.run("restore", backup, fleet.data, "--key", fleet.keys / "root.key")
    fleet.serve()
    world.until(
        "both are heard", lambda: {name for name, one in fleet.devices().items() if one["online"]} == {"device", "late"}
    )
    assert [event["device"] for event in fleet.get("events") if event["name"] == "device_adopted"] == ["late"]
    assert any("was restored" in warning for warning in fleet.get("status")["warnings"])
    again = world.update(GOOD)
    world.until(f"both serve release {again}", lambda: serving(world) == {"device": again, "late": again})
    world.until("the rollout is complete", lambda: fleet.get("rollouts")[0]["state"] == "completed")
    assert world.traffic.failed[failed:] == []
    fleet.run("device", "delete", "late", "--yes")
    world.processes.terminate("late-serve", "late-sync")


def test_where_nothing_was_published_since_the_backup_no_offline_key_is_needed(world: World) -> None:
    fleet, backup = world.fleet, world.folder / "another.backup"
    world.until("the last rollout ends", lambda: fleet.get("rollouts")[0]["state"] in {"completed", "aborted"})
    before = world.serving()
    world.version += 1
    world.publish(WEAK)
    fleet.run("backup", fleet.data, backup, "--without-blobs")
    fleet.roll_out(world.version)  # decided after the backup, so it is lost, and then decided again
    world.until(f"release {world.version} is committed", lambda: world.committed(world.version))
    fleet.run("device", "group", "device", "yard")

    world.kill("fleet")
    shutil.move(fleet.data / "blobs", world.folder / "blobs")
    shutil.rmtree(fleet.data)
    assert "files of releases are not here" in fleet.run("restore", backup, fleet.data)
    shutil.rmtree(fleet.data / "blobs")
    shutil.move(world.folder / "blobs", fleet.data / "blobs")
    fleet.serve()
    world.until("it goes back to what it ran then", lambda: world.serving() == before)
    fleet.roll_out(world.version)
    world.until(f"release {world.version} is committed again", lambda: world.committed(world.version))
    assert "yard" not in fleet.devices()["device"]["groups"]


def test_a_number_that_devices_know_as_another_release_is_not_given_again(world: World) -> None:
    """The last one: it leaves the device held, with a release that its server does not know."""
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


def serving(world: World) -> dict[str, int | None]:
    return {name: (one["models"].get(MODEL) or {}).get("serving") for name, one in world.fleet.devices().items()}
