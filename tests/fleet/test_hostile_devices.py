"""What one device, or a stranger, can do to the broker: the others lose nothing, and nothing of it is left.

The server, its mosquitto and its database are real, and each attack is done as somebody with one device's key would do it.
"""

import contextlib
import os
import resource
import selectors
import socket
import ssl
import struct
import subprocess
import sys
import time
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from paho.mqtt.enums import CallbackAPIVersion

from agent.contract import topics
from agent.contract.codec import encode
from agent.contract.reports import Event
from agent.contract.transfers import Ask
from fleet_server.broker import sessions
from fleet_server.devices import pki
from fleet_server.ingest.buffered_client import BufferedClient
from fleet_server.ingest.connection import Connection
from tests.fleet import flooder, stand
from tests.fleet.stand import DEADLINE_S, Device, Server, environment, make_csr, sha256, signed_event, wait_until

pytestmark = pytest.mark.mosquitto

STAYS = b"\x10\x12\x00\x04MQTT\x05\x00\x00\x3c\x05\x11\xff\xff\xff\xff\x00\x00"  # CONNECT, no clean start, a session that never ends
SUBSCRIBE = 0x82
NOT_AUTHORIZED = 0x87
REFUSED = r"(?i)revoked|EOF occurred|reset by peer|broken pipe"
"""How a handshake ends with a broker that goes by its revocation list."""


def on_the_line(device, connect=flooder.CONNECT):
    return flooder.hello(device.server.broker, str(device.server.ca), str(device.certificate), str(device.key_file), connect)


def memory_mb(pid, what="VmRSS"):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def disk_mb(server):
    return sum(file.stat().st_size for file in (server.data / "broker").iterdir()) / 1e6


def gone(lines, within):
    """Which of the connections the broker ends in time."""
    found, deadline = set(), time.monotonic() + within
    with selectors.DefaultSelector() as selector:
        for line in lines:
            line.setblocking(False)
            selector.register(line, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                try:
                    ended = not key.fileobj.recv(1000)
                except ssl.SSLWantReadError:
                    ended = False
                except OSError:
                    ended = True
                if ended:
                    found.add(key.fileobj)
                    selector.unregister(key.fileobj)
    return found


def others(server, count):
    """Devices that the broker takes, without an enrolment of each."""
    authority, key = pki.Authority(server.data / "pki"), ec.generate_private_key(ec.SECP256R1())
    csr = pki.read_csr(make_csr(key))
    made = {f"other{number}": authority.issue_device(f"other{number}", csr, 3600.0) for number in range(count)}
    return {
        name: Device(server, {"device": name, "certificate_pem": pki.pem_of(certificate).decode()}, key, server.base)
        for name, certificate in made.items()
    }


@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.long)])
def test_revoking_one_leaves_everybody_elses_connection_alone(count, own_server):
    server = own_server.start()
    devices = {"d7": server.enrol("d7"), **others(server, count - 1)}
    with contextlib.ExitStack() as stack:
        lines = {name: stack.enter_context(on_the_line(device)) for name, device in devices.items()}
        broker = server.broker_pid()
        began = time.monotonic()
        server.post("/devices/d7/revoke")
        assert gone([lines["d7"]], within=1), "the revoked one is off within a second"
        assert time.monotonic() - began < 3, "of the operator's word"
        assert gone([line for name, line in lines.items() if name != "d7"], within=3) == set()
        assert server.broker_pid() == broker
        with pytest.raises(OSError, match=REFUSED):
            on_the_line(devices["d7"])
        stack.enter_context(on_the_line(server.enrol("another")))


def test_an_id_that_is_enrolled_again_is_let_in_with_its_new_certificate_only(server):
    before = server.enrol("again")
    kept = {kind: path.read_bytes() for kind, path in (("c", before.certificate), ("k", before.key_file))}
    on_the_line(before).close()
    assert server.request("DELETE", "/devices/again").status_code == 200
    after = server.enrol("again")
    with on_the_line(after) as line:
        line.sendall(flooder.publish(topics.up("again", "telemetry").encode(), b"{}", qos=1))
        assert line.recv(100)[:1] == b"\x40", "an acknowledgement"
    before.certificate.write_bytes(kept["c"])
    before.key_file.write_bytes(kept["k"])
    with pytest.raises(OSError, match=REFUSED):
        on_the_line(before)


def test_many_revocations_within_one_second_all_count(server):
    devices = [server.enrol(f"quick{number}") for number in range(6)]
    for device in devices:
        server.post(f"/devices/{device.id}/revoke")

    def is_refused(device):
        try:
            on_the_line(device).close()
        except OSError:
            return True
        return False

    wait_until(lambda: all(map(is_refused, devices)), "the list that the broker goes by names all of them", within=5)


def test_what_the_broker_keeps_for_a_revoked_device_is_gone(server):
    device = server.enrol("kept")
    filter_ = topics.down_poke("kept").encode()
    with on_the_line(device, STAYS) as line:
        line.sendall(
            bytes([SUBSCRIBE, 2 + 1 + 2 + len(filter_) + 1]) + b"\x00\x01\x00\x00" + bytes([len(filter_)]) + filter_ + b"\x01"
        )
        line.recv(100)

    def session_is_present():
        context = ssl.create_default_context(cafile=str(server.ca))
        context.load_cert_chain(device.certificate, device.key_file)
        with (
            socket.create_connection(("127.0.0.1", server.broker), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as line,
        ):
            line.sendall(STAYS)
            return line.recv(100)[2] == 1

    assert session_is_present()
    sessions.forget("kept", pki.Authority(server.data / "pki"), "127.0.0.1", server.broker)
    assert not session_is_present()


def test_nothing_stays_retained(own_server):
    server = own_server.start()
    evil = server.enrol("evil")
    before = memory_mb(server.broker_pid())
    payload = os.urandom(200_000)
    with on_the_line(evil) as line:
        for number in range(150):  # 30 MB on topics that do not exist
            line.sendall(flooder.publish(f"v1/d/evil/up/x{number}".encode(), payload, qos=1, retain=True))
            assert line.recv(100)[0] == 0x40
        for what in ("state", "events", "telemetry", "presence"):
            line.sendall(flooder.publish(topics.up("evil", what).encode(), payload, qos=1, retain=True))
            assert line.recv(100)[0] == 0x40

    def retained():
        found = []
        client = _server_client(server)
        client.on_connect = lambda c, *_: c.subscribe("v1/d/#", qos=0)
        client.on_message = lambda _c, _u, message: found.append(message.topic) if message.retain else None
        ready = []
        client.on_subscribe = lambda *_: ready.append(True)
        client.connect("127.0.0.1", server.broker)
        client.loop_start()
        wait_until(lambda: ready, "subscribed")
        client.disconnect()
        client.loop_stop()
        return found

    wait_until(lambda: retained() == [], "nothing is retained", within=20)
    assert memory_mb(server.broker_pid()) - before < 15
    server.post("/devices/evil/revoke")
    server.stop()
    assert disk_mb(server) < 1


def _server_client(server):
    """A client of another name that may read what the server reads."""
    client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    context = ssl.create_default_context(cafile=str(server.ca))
    context.load_cert_chain(server.data / "pki" / "client.crt", server.data / "pki" / "client.key")
    client.tls_set_context(context)
    return client


@contextlib.contextmanager
def flooding(device, qos, size, seconds):
    command = [sys.executable, "-m", "tests.fleet.flooder", str(device.server.broker), str(device.server.ca)]
    command += [
        str(device.certificate),
        str(device.key_file),
        topics.up(device.id, "events"),
        str(qos),
        str(size),
        str(seconds),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.long
@pytest.mark.alone  # the flooder wants a processor of its own
@pytest.mark.parametrize(("qos", "size"), [(1, 200), (0, 200), (1, 50_000)], ids=["qos1", "qos0", "large"])
def test_a_flood_costs_nobody_else_an_acknowledged_event(qos, size, own_server, connect):
    server = own_server.start()
    flood, victim = server.enrol("flood"), connect(server.enrol("victim"))
    server_before = memory_mb(server.process.pid)
    with flooding(flood, qos, size, 8) as process:
        for number in range(30):
            event = Event(device="victim", id=f"e{number}", at=time.time(), name="said", message="")
            victim.send("events", signed_event(event, victim.key))
            time.sleep(0.2)  # the flood's time is meant, not a condition
        sent = int(process.communicate(timeout=60)[0])
    assert sent > 5000
    told = {"events": []}

    def arrived():
        told["events"] = server.get("/events?limit=1000&device=victim")
        return sum(event["name"] == "said" for event in told["events"]) == 30

    wait_until(arrived, "all that was acknowledged is stored", within=60)
    assert [event["reason"] for event in server.get("/events?device=flood") if event["name"] == "device_paused"] == ["flood"]
    assert any("flood" in text for text in server.get("/status")["warnings"])
    assert server.get("/status")["messages"]["dropped"]["flood"] > 0
    assert memory_mb(server.broker_pid(), "VmHWM") < 400
    assert memory_mb(server.process.pid, "VmHWM") - server_before < 200
    with on_the_line(flood) as line:
        line.sendall(flooder.publish(topics.up("flood", "events").encode(), b"x", qos=1))
        assert NOT_AUTHORIZED in line.recv(100), "while the pause lasts the broker takes nothing of it"


@pytest.fixture
def many_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.fail(f"this system allows a process {hard} descriptors; the test needs 4096")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_device_subscribes_to_no_more_than_there_is(server):
    """mosquitto would grant and keep each."""
    device, before = server.enrol("curious"), memory_mb(server.broker_pid())

    def subscribes_without_end():
        with on_the_line(device) as line:
            for packet in range(300):
                filters = (b"v1/d/curious/down/%d/%d" % (packet, number) for number in range(1000))
                body = b"\x00\x01\x00" + b"".join(struct.pack(">H", len(one)) + one + b"\x00" for one in filters)
                line.sendall(bytes([SUBSCRIBE]) + flooder.length(len(body)) + body)
                if not line.recv(4096):
                    break

    with contextlib.suppress(OSError):
        subscribes_without_end()
    wait_until(lambda: any("curious" in text for text in server.get("/status")["warnings"]), "it is paused")
    assert memory_mb(server.broker_pid()) - before < 20


def test_what_a_device_asks_for_and_does_not_read_is_bounded(tmp_path):
    server = Server(tmp_path, broker={"memory_bytes": 100 * 1024**2}).start()
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        data = os.urandom(4 * 1024**2)
        server.publish_simple("m", 1, data)
        device = server.enrol("deaf")
        line = stack.enter_context(on_the_line(device))
        wanted = topics.down_blocks("deaf", "+").encode()
        line.sendall(bytes([SUBSCRIBE, 6 + len(wanted), 0, 1, 0, 0, len(wanted)]) + wanted + b"\x00")
        line.recv(100)
        with contextlib.suppress(OSError):  # it is thrown off
            for number in range(500):  # for 2 GB
                ask = Ask(id=f"t{number}", thing="blob", name=sha256(data), first=0, wanted="ff" * 8)
                line.sendall(flooder.publish(topics.up("deaf", "blocks").encode(), encode(ask)))
                time.sleep(0.02)  # a device has a few asks waiting, and the next find no room
        wait_until(lambda: any("deaf" in text for text in server.get("/status")["warnings"]), "it is paused")
        assert memory_mb(server.broker_pid(), "VmHWM") < 800


STRANGERS = """
import socket, sys
held = [socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=10) for _ in range(int(sys.argv[2]))]
print("here", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def strangers(port, count):
    """As many connections that say nothing; in a process of their own, which may have the descriptors."""
    command = [sys.executable, "-c", STRANGERS, str(port), str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "here\n"
        yield
        process.stdin.close()


def cold(module, arguments, **options):
    """A process that has this one's limits."""
    return subprocess.Popen([sys.executable, "-m", module, *arguments], **options)


def test_strangers_who_say_nothing_keep_nobody_out(tmp_path, many_descriptors, connect, monkeypatch):
    server = Server(tmp_path)
    monkeypatch.setattr(stand.warm, "Process", cold)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))  # what services have by default
    try:
        server.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        present = connect(server.enrol("present"))
        stack.enter_context(strangers(server.broker, 1100))
        present.report({})
        wait_until(lambda: server.get("/devices/present")["agent_version"] == "test", "who was there is heard")
        late = connect(server.enrol("late"))
        late.report({})
        wait_until(lambda: server.get("/devices/late")["agent_version"] == "test", "and who comes now")
        assert server.get("/status")["broker_connected"]
        server.publish_simple("m", 1)
        server.post("/rollouts", {"release": "m:1"})
        assert late.wait_for_poke()


def test_the_servers_link_takes_any_descriptor(server, many_descriptors):
    """Its socket has a number that select() does not take."""
    device = server.enrol("high")
    with contextlib.ExitStack() as stack:
        while stack.enter_context(open(os.devnull)).fileno() < 1100:  # noqa: PTH123 - a descriptor is wanted
            pass
        client = BufferedClient(CallbackAPIVersion.VERSION2, "high", protocol=5)
        context = ssl.create_default_context(cafile=str(server.ca))
        context.load_cert_chain(device.certificate, device.key_file)
        client.tls_set_context(context)
        numbers, came = [], []
        client.on_connect = lambda c, *_: (numbers.append(c.socket().fileno()), c.subscribe("v1/d/high/down/#"))
        client.on_subscribe = lambda *_: came.append("subscribed")
        client.on_message = lambda _c, _u, message: came.append(message.topic)
        client.connect_async("127.0.0.1", server.broker)
        connection = Connection(client)
        connection.start()
        stack.callback(connection.stop)
        wait_until(lambda: came == ["subscribed"], "connected")
        assert numbers[0] > 1024
        server.request("PUT", "/devices/high/groups", json={"groups": ["x"]})
        wait_until(lambda: came[1:] == [topics.down_poke("high")], "poked", within=DEADLINE_S)
        client.socket().shutdown(socket.SHUT_RDWR)
        wait_until(lambda: len(numbers) == 2, "connected again")
