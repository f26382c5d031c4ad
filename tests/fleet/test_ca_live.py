"""A server that runs replaces its CA: listeners and broker take both, nobody's connection ends before the old one is dropped."""

import gc
import json
import ssl

import pytest
import requests
import yaml
from cryptography import x509

from fleet_server.devices import pki
from tests.fleet.stand import make_csr, wait_until
from tests.fleet.test_hostile_devices import on_the_line
from tests.fleet.test_own_certificate import shown

pytestmark = [
    pytest.mark.long,
    pytest.mark.mosquitto,
    # A handshake that is refused leaves its socket to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]


@pytest.fixture(autouse=True)
def _collected():
    yield
    gc.collect()


def renew(server, device):
    """As an agent that has heard of the new CA."""
    named = [one["sha256"] for one in server.get("/ca")["authorities"]]
    body = {"csr_pem": make_csr(device.key, cn=device.id), "authorities": named, "format": 1}
    done = requests.post(
        f"{server.device_url}/renew", json=body, cert=(str(device.certificate), str(device.key_file)), verify=str(server.ca), timeout=20
    )  # fmt: skip
    assert done.status_code == 200, done.text
    device.certificate.write_text(done.json()["certificate_pem"])
    return x509.load_pem_x509_certificate(device.certificate.read_bytes())


def is_taken(device):
    """By the broker, and by the listener: both, or neither."""
    there = []
    for ask in (lambda: on_the_line(device).close(), lambda: device.get("/record").raise_for_status()):
        try:
            ask()
        except (OSError, AssertionError):
            there.append(False)
        else:
            there.append(True)
    assert len(set(there)) == 1, there
    return all(there)


def lines(server):
    return [line for line in server.log().splitlines() if "Traceback" in line]


def test_the_whole_way_with_everybody_connected(own_server, connect):
    server = own_server.start()
    devices = {name: connect(server.enrol(name)) for name in ("follows", "sleeps", "out")}
    server.ca = server.data / "pki" / "trusted.pem"
    lost = []
    for name, device in devices.items():
        device.mqtt.on_disconnect = lambda *_, name=name: lost.append(name)
    broker = server.broker_pid()

    view = server.post("/ca/replace")
    assert (view["step"], view["followed"], view["away"]["count"] + view["here"]["count"]) == ("introduced", 0, 3)
    old, new = (x509.load_pem_x509_certificate(one["pem"].encode()) for one in reversed(view["authorities"]))
    assert devices["follows"].wait_for_poke()["news"], "and the poke carries what is told"
    for name in ("follows", "out"):
        renew(server, devices[name]).verify_directly_issued_by(new)
    devices["follows"].disconnect()
    connect(devices["follows"])
    devices["follows"].report({})
    wait_until(lambda: server.get("/devices/follows")["agent_version"] == "test", "who follows is heard")
    assert (server.broker_pid(), [name for name in lost if name != "follows"]) == (broker, [])

    server.post("/devices/out/revoke")
    wait_until(lambda: "out" in lost, "who is shut out is thrown off")
    devices["out"].disconnect()
    assert not is_taken(devices["out"])
    assert server.broker_pid() == broker

    before = {port: shown(server, port) for port in (server.operator, server.device, server.broker)}
    assert server.post("/ca/switch")["step"] == "switched"
    wait_until(
        lambda: all(shown(server, port) != before[port] for port in before), "the new certificate is shown at every port"
    )
    assert devices["sleeps"].mqtt.is_connected()
    assert devices["sleeps"].get("/record").status_code == 200, "it still comes in, by the old one"

    refused = server.request("POST", "/ca/finish", json={})
    assert (refused.status_code, refused.json()["code"]) == (409, "devices_left")
    assert "sleeps" in refused.json()["error"]
    assert server.post("/ca/finish", {"leave_behind": True})["step"] == "settled"
    server.session.close()
    wait_until(lambda: server.broker_pid() not in {None, broker}, "the broker is another")
    wait_until(lambda: server.get("/status")["broker_connected"], "the server is connected")
    wait_until(devices["follows"].mqtt.is_connected, "who followed comes back by itself")
    devices["sleeps"].disconnect()
    assert not is_taken(devices["sleeps"])
    assert not is_taken(devices["out"])
    assert devices["follows"].get("/record").status_code == 200
    with pytest.raises(requests.exceptions.SSLError):
        requests.get(f"{server.device_url}/record", verify=str(write(server, old)), timeout=10)
    assert lines(server) == []
    server.stop()
    server.start()
    assert server.get("/ca")["step"] == "settled"
    wait_until(lambda: devices["follows"].get("/record").status_code == 200, "after a restart")


def write(server, certificate):
    path = server.base / "old.pem"
    path.write_bytes(pki.pem_of(certificate))
    return path


def test_killed_in_the_middle(own_server):
    """kill -9 after each step: the next start goes on from it, and the broker takes both."""
    server = own_server.start()
    device = server.enrol("d1")
    server.ca = server.data / "pki" / "trusted.pem"
    server.post("/ca/replace")
    server.kill()
    server.start()
    assert server.get("/ca")["step"] == "introduced"
    assert is_taken(device)
    renew(server, device)
    assert is_taken(device)
    server.post("/ca/switch")
    server.kill()
    server.start()
    assert is_taken(device)
    server.post("/ca/finish")
    server.kill()
    server.start()
    assert is_taken(device)
    assert server.get("/ca")["step"] == "settled"


def test_the_command_line_and_its_profile(own_server):
    server = own_server.start()
    server.enrol("d1")
    other = server.base / "other.yaml"  # another operator's, with a copy of the CA
    profile = yaml.safe_load(server.profile.read_text())
    (server.base / "copy.pem").write_text((server.data / "pki" / "ca.crt").read_text())
    other.write_text(yaml.safe_dump({**profile, "ca": str(server.base / "copy.pem")}))

    done = server.cli("ca", "replace", "--yes", "--spread", "1m")
    assert done.returncode == 0, done.stderr
    assert "1 were not heard of since" in done.stdout
    assert "backup" in done.stdout
    assert server.cli("ca", "replace", "--yes").returncode == 3, "one is being replaced already"
    done = server.cli("--profile", other, "ca", "trust")
    assert done.returncode == 0, done.stderr
    assert len(yaml.safe_load(other.read_text())["ca_sha256"]) == 2
    done = server.cli("ca", "switch", "--yes")
    assert done.returncode == 0, done.stderr
    for path in (server.profile, other):
        done = server.cli("--profile", path, "ca", "status", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["step"] == "switched"
    done = server.cli("ca", "trust", "--out", server.base / "both.pem")
    assert done.returncode == 0, done.stderr
    assert ssl.create_default_context(cafile=server.base / "both.pem").cert_store_stats()["x509_ca"] == 2
    late = server.base / "late.yaml"
    late.write_text(yaml.safe_dump({**profile, "ca": str(server.base / "copy.pem")}))
    done = server.cli("--profile", late, "status")
    assert done.returncode == 1
    assert "edge-fleet ca trust" in done.stderr
    done = server.cli("ca", "finish")
    assert done.returncode == 1
    assert "d1" in done.stderr
    done = server.cli("ca", "finish", "--yes")
    assert done.returncode == 0, done.stderr
    done = server.cli("ca", "status")
    assert done.returncode == 0, done.stderr
    assert "being replaced" not in done.stdout
    done = server.cli("--profile", other, "status")
    assert done.returncode == 0, done.stderr
    done = server.cli("doctor", server.data)
    assert done.returncode == 0, done.stdout
    assert "this fleet answers" in done.stdout
