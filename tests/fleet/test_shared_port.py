"""One port for the page, enrolment, devices and broker: a real server, real TLS, a real mosquitto."""

import contextlib
import socket
import ssl
import time

import paho.mqtt.client as mqtt
import pytest
import requests
import yaml
from paho.mqtt.enums import CallbackAPIVersion

from tests.fleet.stand import Server, wait_until
from tests.ports import free_ports


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("shared"))
    path = made.data / "fleet.yaml"
    config = yaml.safe_load(path.read_text())
    (made.shared,) = (config["shared_port"],) = free_ports(1)
    path.write_text(yaml.safe_dump(config))
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def device(server):
    return server.enrol("dev-1")


def secured(server, *protocols, device=None):
    """A TLS connection to the shared port."""
    context = ssl.create_default_context(cafile=str(server.ca))
    if protocols:
        context.set_alpn_protocols(list(protocols))
    if device is not None:
        context.load_cert_chain(device.certificate, device.key_file)
    return context.wrap_socket(socket.create_connection(("127.0.0.1", server.shared), timeout=10), server_hostname="127.0.0.1")


def answer(sock, path):
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(65536):
            said += data
    return said


def test_operators_and_who_enrols(server):
    """A device enrols by the string that it is given, before it has a certificate."""
    string = server.enrolment_string()
    assert string.port == server.shared
    url = f"https://127.0.0.1:{server.shared}"
    assert requests.get(f"{url}/enrolment/ca", verify=str(server.ca), timeout=10).text == server.ca.read_text()
    headers = {"Authorization": f"Bearer {server.token}"}
    assert requests.get(f"{url}/api/v1/status", headers=headers, verify=str(server.ca), timeout=10).json()["fleet"] == "test"
    with secured(server, "h2", "http/1.1") as browser:
        assert b" 200 " in answer(browser, "/")[:20]


def test_a_device_with_its_certificate(server, device):
    with secured(server, "edge-devices", "http/1.1", device=device) as sock:
        assert b" 200 " in answer(sock, "/record")[:20]


def test_the_devices_listener_demands_the_certificate_there_too(server):
    with contextlib.suppress(ssl.SSLError), secured(server, "edge-devices") as sock:
        assert answer(sock, "/record") == b""


def test_what_is_for_devices_is_nowhere_else(server, device):
    """Whoever does not say that it is a device is taken for an operator, whatever certificate it has."""
    with secured(server, device=device) as sock:
        assert b" 404 " in answer(sock, "/record")[:20]


def test_mqtt_by_the_certificates_name(server, device):
    """The broker knows the device by its certificate, and its access list holds: through the port as beside it."""
    client = mqtt.Client(CallbackAPIVersion.VERSION2, "anything", protocol=mqtt.MQTTv5)
    context = ssl.create_default_context(cafile=str(server.ca))
    context.load_cert_chain(device.certificate, device.key_file)
    context.set_alpn_protocols(["mqtt"])
    client.tls_set_context(context)
    got, ready = [], []
    client.on_connect = lambda c, *_: c.subscribe([("v1/d/+/down/#", 1)])
    client.on_subscribe = lambda *_: ready.append(1)
    client.on_message = lambda _c, _u, message: got.append(message.topic)
    client.connect("127.0.0.1", server.shared)
    client.loop_start()
    try:
        wait_until(lambda: ready, "subscribed")
        server.enrol("dev-2")
        for name in ("dev-2", "dev-1"):
            answered = server.request("PUT", f"/devices/{name}/groups", json={"groups": ["a"]})
            assert answered.status_code == 200, answered.text
        wait_until(lambda: got, "a poke")
        assert got == ["v1/d/dev-1/down/poke"]
        large = b"x" * 900_000  # more than any buffer on the way
        client.publish("v1/d/dev-1/up/telemetry", large, qos=1).wait_for_publish(20)
    finally:
        client.disconnect()
        client.loop_stop()


def test_the_broker_demands_a_certificate_there_too(server):
    with contextlib.suppress(ssl.SSLError, ConnectionError), secured(server, "mqtt") as sock:
        sock.sendall(b"\x10\x0d\x00\x04MQTT\x05\x02\x00\x05\x00\x00\x00")
        assert sock.recv(100) == b""


def test_a_revoked_device_is_thrown_off(server):
    device = server.enrol("dev-bad")
    with secured(server, "mqtt", device=device) as sock:
        sock.sendall(b"\x10\x0d\x00\x04MQTT\x05\x02\x00\x05\x00\x00\x00")
        assert sock.recv(100)[0] == 0x20
        server.post("/devices/dev-bad/revoke")
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            while sock.recv(100):
                pass
    with contextlib.suppress(ssl.SSLError, ConnectionError), secured(server, "mqtt", device=device) as again:
        again.sendall(b"\x10\x0d\x00\x04MQTT\x05\x02\x00\x05\x00\x00\x00")
        assert again.recv(100) == b""


def test_a_first_message_in_pieces(server):
    """A slow line brings a handshake in several packets."""
    there = socket.create_connection(("127.0.0.1", server.shared), timeout=10)
    context = ssl.create_default_context(cafile=str(server.ca))
    come, go = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(come, go, server_hostname="127.0.0.1")
    with there:
        with pytest.raises(ssl.SSLWantReadError):
            client.do_handshake()
        hello = go.read()
        for part in (hello[:1], hello[1:60], hello[60:]):
            there.sendall(part)
            time.sleep(0.1)
        come.write(there.recv(65536))
        with contextlib.suppress(ssl.SSLWantReadError):
            client.do_handshake()
        assert client.version() in {"TLSv1.3", "TLSv1.2"} or go.pending


def test_strangers_who_say_nothing_are_in_nobodys_way(server, device):
    silent = []
    try:
        silent += (socket.create_connection(("127.0.0.1", server.shared), timeout=10) for _ in range(600))
        with secured(server, "edge-devices", device=device) as sock:
            assert b" 200 " in answer(sock, "/record")[:20]
    finally:
        for sock in silent:
            sock.close()


def test_what_is_no_tls_is_answered_by_nobody(server):
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"\x10\x0d\x00\x04MQTT\x05", b"\x16\x03\x01\xff\xff" + bytes(70_000)):
        with socket.create_connection(("127.0.0.1", server.shared), timeout=20) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(said)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1000):
                pass


def test_it_is_counted(server, device):
    def metrics():
        return server.request("GET", "/metrics").text

    with secured(server, "mqtt", device=device):
        wait_until(lambda: "edge_fleet_shared_port_broker_connections 1\n" in metrics(), "it is there")
        assert 'edge_fleet_shared_port_connections_total{to="broker"}' in metrics()
    wait_until(lambda: "edge_fleet_shared_port_broker_connections 0\n" in metrics(), "it has gone")
