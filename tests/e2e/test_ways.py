"""A device that reaches one port of one name, by a proxy, and one whose fleet server moves: real processes throughout."""

import json
import subprocess

import pytest
from processes import command

from tests.e2e.world import MODEL, World
from tests.ports import free_ports
from tests.ways import ConnectProxy, Forward

pytestmark = [pytest.mark.long, pytest.mark.mosquitto, pytest.mark.timeout(180)]

NAME, GOAL = "fleet.invalid", "fleet.invalid:443"  # no name server knows it, and nothing here listens at 443


def known(world):
    return json.loads((world.device.folder / "identity" / "addresses.json").read_bytes())


def finding(world, name):
    done = subprocess.run(
        command("edge-agent", "doctor", "--json", "--config", world.device.config), capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip
    return next(one for one in json.loads(done.stdout) if one["name"] == name)


def test_everything_through_a_proxy_that_allows_one_port_of_one_host(tmp_path):
    """Enrol, look, fetch, report, hear of a rollout, renew: nothing else is asked for, and nothing is reached but through it."""
    (shared,) = free_ports(1)
    secret = tmp_path / "secret"
    secret.write_text("edge:secret\n")
    secret.chmod(0o600)
    public = dict.fromkeys(("operators", "enrolment", "devices", "broker"), GOAL)
    with ConnectProxy({GOAL: shared}, secret="edge:secret") as proxy:
        sync = {"proxy": proxy.url, "proxy_credentials": str(secret), "poll_interval_s": 2}
        # A certificate that begins a day ago and lasts two hours more is due for renewal at once.
        server = {"shared_port": shared, "public": public, "expiry": {"device_certificate_s": 7200}}
        with World(tmp_path, sync=sync, server=server) as world:
            enrolled = (world.device.folder / "identity" / "fleet.json").read_text()
            assert json.loads(enrolled)["broker_host"] == NAME
            world.update()
            world.until("the second release", lambda: world.committed(2))
            world.until("the fleet hears of it", lambda: world.fleet.devices()["device"]["models"][MODEL]["serving"] == 2)
            world.configure(expiry={"device_certificate_s": 86400.0 * 30})
            world.processes.terminate("fleet")
            world.fleet.serve()
            log = tmp_path / "logs" / "device-sync.log"
            world.until("the certificate is renewed", lambda: "the certificate was renewed" in log.read_text(), 60)
            world.until("the device is connected", world.device_is_connected)
            for name in ("proxy", "fleet server", "broker"):
                assert finding(world, name)["level"] == "ok", finding(world, name)
        assert set(proxy.connected) == {GOAL}
        assert proxy.refused == []


def test_a_device_follows_its_server(tmp_path):
    """Devices are told another address while nothing answers there, and go when it does."""
    devices, broker = free_ports(2)
    with World(tmp_path, sync={"poll_interval_s": 2}) as world:
        settings = world.configure(public={"devices": f"localhost:{devices}", "broker": f"localhost:{broker}"})
        world.processes.terminate("fleet")
        world.fleet.serve()
        new = f"https://localhost:{devices}"
        world.until("the device hears of it", (world.device.folder / "identity/addresses.json").is_file)
        assert known(world)["used"]["device_url"] == f"https://127.0.0.1:{settings['device_port']}"
        found = finding(world, "addresses")
        assert found["level"] == "warning"
        assert new in found["message"]

        world.kill("sync")
        world.restart("sync")
        with Forward(settings["device_port"], devices), Forward(settings["broker"]["port"], broker):
            world.until("the device goes there", lambda: known(world)["used"]["device_url"] == new, 60)
            world.until(
                "the fleet hears of it", lambda: any(e["name"] == "server-moved" for e in world.fleet.get("events")), 30
            )
            assert finding(world, "addresses")["level"] == "ok"
            words = ("status", "--json", "--socket", world.device.socket, "--config", world.device.config)
            done = subprocess.run(command("edge-agent", *words), capture_output=True, text=True, timeout=60, check=True)
            assert json.loads(done.stdout)["fleet_server"]["device_url"] == new
            world.update()
            world.until("an update", lambda: world.committed(2))

            # To another machine: it is named first, then the old one stops, and what it knew starts there.
            away = free_ports(2)
            world.configure(public={"devices": f"localhost:{away[0]}", "broker": f"localhost:{away[1]}"})
            world.processes.terminate("fleet")
            world.fleet.serve()
            last = f"https://localhost:{away[0]}"
            world.until("the device hears of it", lambda: any(one["device_url"] == last for one in known(world)["others"]), 60)
            world.processes.terminate("fleet")
            world.configure(device_port=away[0], broker={**settings["broker"], "port": away[1]})
            world.fleet.serve()
            world.until("the device goes there", lambda: known(world)["used"]["device_url"] == last, 60)
            world.until("the device is online", world.device_is_connected, 30)
