"""The real mosquitto under the real server: who may write and read what, revocation, and what happens when it is killed."""

import os
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from agent.contract import topics
from agent.contract.codec import encode
from agent.contract.reports import Presence
from tests.fleet.stand import Server, answer, environment, model_state, wait_until

pytestmark = pytest.mark.mosquitto


def online(server, device):
    return server.get(f"/devices/{device.id}")["online"]


def test_a_device_is_seen_and_poked(server, connect):
    device = connect(server.enrol("d1"))
    wait_until(lambda: online(server, device), "the birth arrives")
    manifest = server.publish_simple("m", 1)
    rollout = server.post("/rollouts", {"release": "m:1"})["id"]
    assert device.wait_for_poke()["assignment_version"] == 3  # 1 is that of `init`, 2 says at which ports the server is
    device.report({"m": model_state(manifest, answers=(answer(manifest, rollout=rollout),))})
    wait_until(lambda: server.get(f"/rollouts/{rollout}")["state"] == "completed", "the report completes the rollout")
    device.mqtt.socket().shutdown(socket.SHUT_RDWR)  # the network goes away: the broker sends the will
    device.disconnect()
    wait_until(lambda: not online(server, device), "the last will arrives")


def test_a_device_writes_only_its_own_topics(server, connect):
    good, evil = connect(server.enrol("good")), connect(server.enrol("evil"))
    wait_until(lambda: online(server, good), "good is online")
    for topic in (
        topics.up("good", "presence"),
        topics.down_poke("good"),
        topics.POKE_ALL,
        "v1/d/good/down/request/1",
        "other",
    ):
        lie = Presence(device="good", session=99, online=False)
        sent = evil.mqtt.publish(topic, encode(lie) if "presence" in topic else b"{}", qos=1)
        sent.wait_for_publish(10)
    evil.report({})  # comes behind the lies
    wait_until(lambda: server.get("/devices/evil")["agent_version"] == "test", "evil's own report arrives")
    assert online(server, good)
    assert good.received.empty()


def test_a_device_reads_only_its_own_topics(server, connect):
    good, evil = connect(server.enrol("honest")), connect(server.enrol("nosy"))
    for topic in ("v1/d/honest/down/#", "v1/d/+/down/#", "#", "v1/d/honest/up/#", "$share/x/v1/d/+/up/#", "$SYS/#"):
        evil.mqtt.subscribe(topic, qos=1)
    server.request("PUT", "/devices/honest/groups", json={"groups": ["x"]})
    assert good.wait_for_poke() is not None
    good.report({})
    wait_until(
        lambda: server.get("/devices/honest")["agent_version"] == "test", "the report arrives although evil joined a share"
    )
    server.request("PUT", "/devices/nosy/groups", json={"groups": ["x"]})
    found = {evil.received.get(timeout=20)[0]}
    while not evil.received.empty():  # its own poke comes once for every filter that covers it
        found.add(evil.received.get()[0])
    assert found == {"v1/d/nosy/down/poke"}


def test_a_connection_without_a_certificate(server):
    context = ssl.create_default_context(cafile=str(server.ca))
    with pytest.raises((ssl.SSLError, ConnectionError)):
        _mqtt_hello(server, context)


def test_revocation(server, connect):
    stays, goes = connect(server.enrol("stays")), connect(server.enrol("goes"))
    dropped = []
    goes.mqtt.on_disconnect = lambda *_: dropped.append("goes")
    stays.mqtt.on_disconnect = lambda *_: dropped.append("stays")
    wait_until(lambda: online(server, stays) and online(server, goes), "both are online")
    broker = server.broker_pid()
    server.post("/devices/goes/revoke")
    wait_until(lambda: dropped, "the revoked device is thrown off", within=5)
    goes.disconnect()
    with pytest.raises((ssl.SSLError, ConnectionError)):
        _connects_no_more(server, goes)
    stays.report({})
    wait_until(lambda: server.get("/devices/stays")["agent_version"] == "test", "the other one is heard")
    assert (set(dropped), server.broker_pid()) == ({"goes"}, broker)


def test_a_broker_without_the_plugin_is_restarted_to_shut_a_device_out(tmp_path, connect):
    server = Server(tmp_path, broker={"dynamic_security": ""}).start()
    try:
        stays, goes = connect(server.enrol("stays")), connect(server.enrol("goes"))
        wait_until(lambda: online(server, stays) and online(server, goes), "both are online")
        assert any("plug-in" in text for text in server.get("/status")["warnings"])
        before = server.broker_pid()
        server.post("/devices/goes/revoke")
        wait_until(lambda: server.broker_pid() not in {before, None}, "another broker runs")
        goes.disconnect()
        with pytest.raises((ssl.SSLError, ConnectionError)):
            _connects_no_more(server, goes)
        wait_until(stays.mqtt.is_connected, "the other one connects again")
        stays.report({})
        wait_until(lambda: server.get("/devices/stays")["agent_version"] == "test", "and is heard")
    finally:
        server.stop()


def _connects_no_more(server, device):
    context = ssl.create_default_context(cafile=str(server.ca))
    context.load_cert_chain(device.certificate, device.key_file)
    wait_until(lambda: _open(server.broker), "the broker is up again")
    _mqtt_hello(server, context)


def _mqtt_hello(server, context):
    """Says CONNECT; raises when the broker does not answer it."""
    with (
        socket.create_connection(("127.0.0.1", server.broker), timeout=10) as sock,
        context.wrap_socket(sock, server_hostname="127.0.0.1") as tls,
    ):
        tls.sendall(b"\x10\x0c\x00\x04MQTT\x05\x02\x00\x05\x00\x00\x00")
        if not tls.recv(1):
            raise ConnectionError("closed")


def _open(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_a_killed_broker_comes_back(own_server, connect):
    server = own_server.start()
    device = connect(server.enrol("d1"))
    wait_until(lambda: online(server, device), "online")
    before = server.broker_pid()
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: server.broker_pid() not in {before, None}, "another broker runs")
    wait_until(device.mqtt.is_connected, "the device is connected again")
    device.report({})
    wait_until(lambda: server.get("/devices/d1")["agent_version"] == "test", "the server listens again")
    assert server.get("/status")["broker_connected"]


def test_a_killed_server_leaves_no_broker_and_starts_again(own_server, connect):
    server = own_server.start()
    device = connect(server.enrol("d1"))
    broker = server.broker_pid()
    server.kill()
    server.start()
    assert server.broker_pid() != broker
    wait_until(device.mqtt.is_connected, "the device is connected again")
    device.report({})
    wait_until(lambda: server.get("/devices/d1")["agent_version"] == "test", "the report arrives")


def test_term_stops_everything(own_server):
    server = own_server.start()
    broker = server.broker_pid()
    assert server.stop() == 0
    wait_until(lambda: not Path(f"/proc/{broker}").exists(), "the broker is gone", within=5)


def test_ctrl_c_stops_it_too(own_server):
    own_server.start()
    own_server.process.send_signal(signal.SIGINT)
    assert own_server.process.wait(20) == 0
    own_server.process = None


def test_no_mosquitto(own_server):
    own_server.set(broker={"mosquitto": "mosquitto-that-is-not-there"})
    done = own_server.cli("serve", own_server.data)
    assert done.returncode == 1
    assert "apt install mosquitto" in done.stderr


def test_two_servers_on_one_folder(server):
    done = server.cli("serve", server.data)
    assert done.returncode == 1
    assert f"process {server.process.pid}" in done.stderr


@pytest.mark.parametrize("which", ["operator", "device", "broker"])
def test_a_port_that_is_taken(own_server, which):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", getattr(own_server, which)))
        taken.listen()
        command = [sys.executable, "-m", "fleet_server.cli", "serve", str(own_server.data)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(), check=False)
    assert done.returncode == 1
    assert str(getattr(own_server, which)) in done.stderr.splitlines()[-1]
