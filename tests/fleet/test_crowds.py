"""Somebody crowds a listener of a running server, from another address: nobody else loses anything, nor does the rollouts' tick."""

import contextlib
import fcntl
import os
import re
import resource
import signal
import socket
import ssl
import threading
import time

import pytest
import requests

from fleet_server import live
from tests.fleet.stand import Server, answer, model_state, wait_until

CROWD = "127.0.0.2"
pytestmark = pytest.mark.alone  # hundreds of handshakes


@pytest.fixture(scope="module", autouse=True)
def _descriptors():
    """The crowd's own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def victim(server):
    return server.enrol("victim")


@pytest.fixture(scope="module")
def hostile(server):
    device = server.enrol("hostile")
    context = ssl.create_default_context(cafile=str(server.ca))
    context.load_cert_chain(device.certificate, device.key_file)
    return context


def _moved(sock):
    """The same under a high descriptor: the test's own MQTT clients need low ones."""
    with sock:
        return fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, 3000)


def connected(port, context=None, said=b""):
    sock = socket.create_connection(("127.0.0.1", port), timeout=20, source_address=(CROWD, 0))
    sock = socket.socket(fileno=_moved(sock))
    sock.settimeout(20)
    if context is not None:
        sock = context.wrap_socket(sock, server_hostname="127.0.0.1")
    if said:
        sock.sendall(said)
    return sock


@contextlib.contextmanager
def crowd(count, port, context=None, said=b""):
    """`count` connections that stay open for as long as the server lets them."""
    held = []
    try:
        for _ in range(count):
            with contextlib.suppress(OSError):
                held.append(connected(port, context, said))
        yield held
    finally:
        for sock in held:
            sock.close()


def everybody_is_answered(server, victim, times=10):
    """New connections, as those of others are; each of them must be answered, and in time."""
    headers = {"Authorization": f"Bearer {server.token}"}
    for _ in range(times):
        assert victim.get("/metadata/timestamp.json").status_code == 200
        for url in (server.url, f"http://127.0.0.1:{server.loopback}"):
            assert requests.get(f"{url}/api/v1/me", headers=headers, verify=str(server.ca), timeout=10).status_code == 200


def metric(server, name, **labels):
    """A number out of the server's metrics; 0 when it was never counted."""
    headers = {"Authorization": f"Bearer {server.token}"}
    text = requests.get(f"{server.url}/api/v1/metrics", headers=headers, verify=str(server.ca), timeout=10).text
    said = ",".join(f'{key}="{value}"' for key, value in labels.items())
    found = re.search(rf"^{name}{{{re.escape(said)}}} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


KEPT = b"GET /metadata/timestamp.json HTTP/1.1\r\nHost: x\r\n\r\n"


def test_four_hundred_connections_of_one_device(server, victim, hostile):
    with crowd(400, server.device, hostile, KEPT):
        everybody_is_answered(server, victim)
        assert metric(server, "edge_fleet_connections_refused_total", listener="devices", full="device") > 300


def test_idle_connections_at_the_operators_port(server, victim):
    context = ssl.create_default_context(cafile=str(server.ca))
    with crowd(410, server.operator, context):
        everybody_is_answered(server, victim)
        ended = metric(server, "edge_fleet_connections_ended_total", listener="operators", full="address")
        assert ended + metric(server, "edge_fleet_connections_refused_total", listener="operators", full="address") > 250


@pytest.mark.parametrize("listener", ["device", "operator", "loopback"])
def test_silent_connections_without_credentials(server, victim, listener):
    lines = len(server.log().splitlines())
    with crowd(1100, getattr(server, listener)):
        if listener == "loopback":  # its connections are one address's, so they make room for each other
            wait_until(lambda: metric(server, "edge_fleet_connections", listener="loopback") <= 100, "room")
            time.sleep(1.1)
        everybody_is_answered(server, victim)
    assert len(server.log().splitlines()) - lines < 20, "and the log is not filled"


@pytest.fixture
def roomy_server(tmp_path):
    made = Server(tmp_path, connections={"devices": 2000, "devices_per_address": 1500}).start()
    yield made
    made.stop()


def test_the_broker_comes_back_and_rollouts_go_on_in_a_crowd(roomy_server, connect):
    """A process that has more than 1024 descriptors in use can still open what it needs itself."""
    server = roomy_server
    victim = server.enrol("victim")
    manifest = server.publish_simple("m", 1)
    with crowd(1200, server.device), crowd(500, server.operator), crowd(500, server.loopback), contextlib.ExitStack() as more:
        pid = server.broker_pid()
        os.kill(pid, signal.SIGKILL)
        more.enter_context(crowd(200, server.device))  # who take what descriptors the link to the broker had
        wait_until(lambda: server.broker_pid() not in (None, pid), "a new broker")
        soon = 8  # seconds: before silent ones are let go
        wait_until(lambda: server.get("/status")["broker_connected"], "the link to it", within=soon)
        connect(victim)
        rollout = server.post("/rollouts", {"release": "m:1"})["id"]
        victim.report({"m": model_state(manifest, answers=(answer(manifest),))})
        wait_until(lambda: server.get(f"/rollouts/{rollout}")["state"] == "completed", "the rollout goes on")


def test_a_flood_of_connections_that_come_and_go(server, victim):
    stop, made = threading.Event(), []

    def flood():
        while not stop.is_set():
            with contextlib.suppress(OSError), connected(server.device) as sock:
                sock.sendall(b"\x16\x03\x01nothing")
                made.append(1)

    threads = [threading.Thread(target=flood) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        everybody_is_answered(server, victim)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(made) > 100


def handshake(port, device, **limits):
    context = ssl.create_default_context(cafile=str(device.server.ca))
    context.load_cert_chain(device.certificate, device.key_file)
    context.minimum_version = context.maximum_version = limits.get("version", ssl.TLSVersion.TLSv1_2)
    if "ciphers" in limits:
        context.set_ciphers(limits["ciphers"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=20) as sock,
        context.wrap_socket(sock, server_hostname="127.0.0.1") as tls,
    ):
        return tls.cipher()[0]


CBC = "ECDHE-ECDSA-AES128-SHA256:ECDHE-ECDSA-AES256-SHA384:ECDHE-RSA-AES128-SHA256:ECDHE-ECDSA-AES128-SHA:AES128-SHA256:AES128-SHA"


@pytest.mark.parametrize("listener", ["operator", "device"])
def test_only_ciphers_that_authenticate_what_they_encrypt(server, victim, listener):
    port = getattr(server, listener)
    with pytest.raises(ssl.SSLError):
        handshake(port, victim, ciphers=CBC + ":@SECLEVEL=0")
    with pytest.raises(ssl.SSLError):
        handshake(port, victim, ciphers="AES128-GCM-SHA256")  # without forward secrecy
    assert re.search("GCM|CHACHA", handshake(port, victim))
    assert re.search("GCM|CHACHA", handshake(port, victim, version=ssl.TLSVersion.TLSv1_3))


def test_an_account_that_reads_along_without_end(server, victim):
    """Streams are never ended to make room; so one account must not have them all."""
    token = server.make_token("viewer")
    context = ssl.create_default_context(cafile=str(server.ca))
    asks = f"GET /api/v1/events/stream HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    with crowd(60, server.operator, context, asks) as held:
        answers = [sock.recv(12) for sock in held]
        assert (answers.count(b"HTTP/1.1 200"), answers.count(b"HTTP/1.1 429")) == (live.PER_ACCOUNT, 60 - live.PER_ACCOUNT)
        everybody_is_answered(server, victim, times=3)
        with server.request("GET", "/events/stream", stream=True) as other:
            assert other.status_code == 200
