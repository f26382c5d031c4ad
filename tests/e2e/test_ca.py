"""The fleet's CA is replaced, and no device is visited: real servers, broker and agents."""

from __future__ import annotations

import shutil

import pytest
from device import Device

from agent.sync import identity
from agent.sync.authorities import fingerprint, issuer_of
from tests.e2e.world import World

pytestmark = [pytest.mark.long, pytest.mark.mosquitto, pytest.mark.timeout(240)]


def newest(world):
    return world.fleet.get("ca")["authorities"][0]["sha256"]


def knows(device):
    """The CAs that it believes, and which of them its certificate is of."""
    who = identity.load(device.folder / "identity")
    known = who.authorities()
    return [fingerprint(one) for one in known], issuer_of(who.certificate, known)


def test_devices_follow_without_a_visit(tmp_path):
    with World(tmp_path, sync={"poll_interval_s": 5}) as world:
        fleet = world.fleet
        slept = Device("slept", world.home, world.processes)
        slept.prepare()
        slept.config.write_text(world.device.config.read_text().replace("/device/", "/slept/"))
        slept.enrol(fleet.run("token", "create", "--device", "slept").strip())
        slept.start()
        world.until(
            "both are online", lambda: all(one["online"] for one in fleet.devices().values()) and len(fleet.devices()) == 2
        )
        world.until("the first rollout ends", lambda: fleet.get("rollouts")[0]["state"] == "completed")
        copy = tmp_path / "copy-of-slept"
        world.processes.terminate("slept-sync")
        shutil.copytree(slept.folder / "identity", copy)
        old = newest(world)

        fleet.run("ca", "replace", "--yes")
        world.kill("fleet")
        world.restart("fleet")
        new = newest(world)
        assert new != old
        world.until("it has a certificate of the new CA", lambda: knows(world.device) == ([new, old], 0), 60)
        assert knows(slept) == ([old], 0)
        view = fleet.get("ca")
        assert (view["followed"], view["away"]["devices"]) == (1, ["slept"])
        fleet.run("ca", "switch", "--yes")
        world.kill("fleet")
        world.restart("fleet")
        world.until("the device is connected", world.device_is_connected)

        # It knows a CA that vouches for nothing any more, and finds back by what is signed.
        slept.start_part("sync")
        world.until("who slept has followed", lambda: knows(slept) == ([new, old], 0), 60)
        world.until("and is online", lambda: fleet.devices()["slept"]["online"], 60)
        assert fleet.get("ca")["followed"] == 2

        release = world.update()
        world.until(f"release {release} is committed", lambda: world.committed(release), 60)
        fleet.run("ca", "finish", "--yes")
        world.until("nobody believes the old one", lambda: knows(world.device) == ([new], 0) == knows(slept), 60)
        world.until("both are online", lambda: all(one["online"] for one in fleet.devices().values()), 60)
        release = world.update()
        world.until(f"release {release} is committed", lambda: world.committed(release), 60)
        world.until("everywhere", lambda: fleet.get("rollouts")[0]["state"] == "completed", 60)
        assert world.traffic.failed == []

        # A card of before, put in after the end: nobody lets it in, and it is enrolled anew under its name.
        world.processes.terminate("slept-sync")
        shutil.rmtree(slept.folder / "identity")
        shutil.copytree(copy, slept.folder / "identity")
        slept.start_part("sync")
        log = tmp_path / "logs" / "slept-sync.log"
        world.until("it is refused", lambda: "the fleet's word cannot be learnt" in log.read_text(), 60)
        assert knows(slept)[1] is None
        world.processes.terminate("slept-sync")
        shutil.rmtree(slept.folder / "identity")
        fleet.run("device", "delete", "slept", "--yes")
        slept.enrol(fleet.run("token", "create", "--device", "slept").strip())
        slept.start_part("sync")
        world.until("it is there again", lambda: fleet.devices().get("slept", {}).get("online"), 60)
        assert knows(slept) == ([new], 0)
        world.processes.terminate("slept-sync", "slept-serve")
