"""One real RabbitMQ node, with the files that the server writes for it, under a real server: who is let in, what they may do, and that what
they say is stored.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import socket
import ssl
import struct
import threading
import time

import paho.mqtt.client as mqtt
import pytest

from agent.contract import topics
from agent.contract.codec import encode
from agent.contract.reports import Event, Presence
from agent.contract.transfers import PART_BYTES, Ask, bitmap, decode_part
from agent.host.clock import SystemClock
from agent.sync.fleet import enrol
from agent.sync.fleet.link import Broker, Link, tls_context
from agent.sync.fleet.outbox import Outbox
from tests.fleet.rabbit import Rabbits
from tests.fleet.reporters import stored
from tests.fleet.stand import DEADLINE_S, answer, model_state, sha256, signed_event, wait_until

pytestmark = [pytest.mark.mosquitto, pytest.mark.alone]


@pytest.fixture(scope="module")
def rabbits(tmp_path_factory):
    made = Rabbits(tmp_path_factory.mktemp("rabbit"), 1, partitions=3)
    try:
        yield made.start()
    finally:
        made.stop()


@pytest.fixture(scope="module")
def server(rabbits):
    return rabbits.server


def online(server, name):
    return server.get(f"/devices/{name}")["online"]


def agent_version(server, name):
    return server.get(f"/devices/{name}")["agent_version"]


@pytest.fixture
def joined(server, connect):
    """Enrols devices and connects them as agents do that have fallen back to MQTT 3.1.1."""

    def join(name, **options):
        return connect(server.enrol(name), protocol=mqtt.MQTTv311, **options)

    return join


def test_a_device_is_seen_poked_and_completes_a_rollout(server, joined):
    device = joined("d1")
    wait_until(lambda: online(server, "d1"), "the birth arrives")
    first = device.wait_for_poke()
    assert "news" in first, "whoever arrives hears the news, which this broker does not keep for it"
    manifest = server.publish_simple("m", 1)
    rollout = server.post("/rollouts", {"release": "m:1"})["id"]
    wait_until(lambda: device.wait_for_poke()["assignment_version"] == 3, "the poke of the rollout")
    device.report({"m": model_state(manifest, answers=(answer(manifest, rollout=rollout),))})
    wait_until(lambda: server.get(f"/rollouts/{rollout}")["state"] == "completed", "the report completes the rollout")
    device.mqtt.socket().shutdown(socket.SHUT_RDWR)
    device.disconnect()
    wait_until(lambda: not online(server, "d1"), "the last will arrives")


def test_status_says_how_the_cluster_is(server):
    broker = wait_until(
        lambda: (found := server.get("/status")["broker"])["queues"] and found, "the cluster was looked at", within=40
    )
    assert broker["kind"] == "rabbitmq"
    assert broker["nodes"] == [{"name": "r1@localhost", "problem": ""}]
    assert [one["name"] for one in broker["queues"]] == ["edge.reports.0", "edge.reports.1", "edge.reports.2", "edge.asks"]
    assert {one["consumers"] for one in broker["queues"]} == {1}
    shown = server.cli("status")
    assert "1 of 1 nodes answer" in shown.stdout
    examined = server.cli("doctor", server.data)
    assert examined.returncode == 0, examined.stdout
    assert "4 queues" in examined.stdout


HOSTILE = [
    # what a device of the fleet tries with its own certificate; in MQTT 3.1.1 the broker can only hang up
    ("subscribe", "v1/d/honest/down/#"),
    ("subscribe", "v1/d/+/down/poke"),
    ("subscribe", "#"),
    ("subscribe", "$share/x/v1/d/+/up/#"),
    ("subscribe", "v1/d/nosy/up/#"),
    ("subscribe", "v1/d/*/down/poke"),
    ("publish", "v1/d/honest/up/presence"),
    ("publish", "v1/d/honest/down/poke"),
    ("publish", "v1/all/poke"),
    ("publish", "v1/d/nosy/up/other"),
]


@pytest.fixture(scope="module")
def nosy(server):
    return server.enrol("nosy")


@pytest.fixture(scope="module")
def honest(server):
    device = server.enrol("honest").connect(protocol=mqtt.MQTTv311)
    wait_until(lambda: online(server, "honest"), "it is there")
    yield device
    device.disconnect()


@pytest.mark.parametrize(("does", "topic"), HOSTILE)
def test_what_a_device_may_not_do_ends_its_connection(does, topic, server, nosy, honest):
    with hello(server, nosy) as tls:
        lie = encode(Presence(device="honest", session=99, online=False))
        tls.sendall(subscribe(topic) if does == "subscribe" else publish(topic, lie))
        assert tls.recv(100) == b"", "the broker says nothing and hangs up"
    assert online(server, "honest")
    assert honest.mqtt.is_connected()


def test_another_client_id_is_refused_and_throws_nobody_off(server, nosy, honest):
    with pytest.raises((ConnectionError, ssl.SSLError)):
        hello(server, nosy, client_id="honest")
    honest.report({})
    assert honest.mqtt.is_connected()


@pytest.mark.parametrize("password", [b"", b"x"])
def test_a_name_and_password_do_not_make_a_device_another(password, server, nosy):
    with pytest.raises((ConnectionError, ssl.SSLError)):
        hello(server, nosy, client_id="honest", user=b"honest", password=password)
    with pytest.raises((ConnectionError, ssl.SSLError)):
        hello(server, nosy, client_id="fleet-server", user=b"fleet-server", password=password)


def test_a_device_is_not_let_in_by_amqp(rabbits, nosy):
    import pika
    from pika.exceptions import AMQPError

    from fleet_server.ingest.amqp_connection import parameters

    with pytest.raises((AMQPError, OSError)):
        pika.BlockingConnection(
            parameters(("127.0.0.1", rabbits.nodes[0].amqp), "/", context_of(rabbits.server, nosy), "a device")
        )


def test_nothing_but_tls_listens(rabbits):
    """What the node's processes listen on: AMQP and MQTT with certificates, the distribution, and metrics, all on loopback."""
    node = rabbits.nodes[0]
    import psutil

    found = {
        connection.laddr
        for process in psutil.process_iter(["pid"])
        if rabbits.folder.as_posix() in _environment(process)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {address.port for address in found} >= {node.amqp, node.mqtt, node.distribution}
    assert {address.port for address in found} <= {
        node.amqp, node.mqtt, node.distribution, node.metrics, int(rabbits.environment["ERL_EPMD_PORT"]),
    }  # fmt: skip
    assert {address.ip for address in found} <= {"127.0.0.1", "::1"}


def _environment(process):
    import psutil

    try:
        return process.environ().get("HOME", "")
    except psutil.Error:
        return ""


def test_revoking_one_of_thirty(server, joined):
    devices = [joined(f"r{number}") for number in range(30)]
    wait_until(lambda: all(online(server, one.id) for one in devices), "all are there")
    lost = queue.Queue()
    for one in devices:
        one.mqtt.on_disconnect = lambda *_, name=one.id: lost.put((name, time.monotonic()))
    began = time.monotonic()
    server.post("/devices/r7/revoke")
    name, at = lost.get(timeout=5)
    assert (name, at - began < 1.0) == ("r7", True), f"{name} after {at - began:.2f} s"
    with pytest.raises((ConnectionError, ssl.SSLError)):
        hello(server, devices[7])
    devices[7].disconnect()
    with contextlib.suppress(queue.Empty):
        while True:
            assert lost.get(timeout=2.5)[0] == "r7"
    for one in devices[:7] + devices[8:]:
        one.report({})
    wait_until(
        lambda: all(agent_version(server, one.id) == "test" for one in devices[:7] + devices[8:]), "the others are heard"
    )


def test_a_device_that_is_enrolled_anew_comes_in(server, connect):
    connect(server.enrol("again"), protocol=mqtt.MQTTv311)
    server.request("DELETE", "/devices/again")
    anew = connect(server.enrol("again"), protocol=mqtt.MQTTv311)
    anew.report({})
    wait_until(lambda: agent_version(server, "again") == "test", "it is heard")


def test_a_flood_of_one_loses_nothing_of_others(server, joined):
    quiet, flooder = joined("quiet"), server.enrol("flooder")
    stop = threading.Event()

    def flood():
        packet = publish(topics.up("flooder", "telemetry"), b"x" * 200, qos=1) * 300
        while not stop.is_set():
            with contextlib.suppress(OSError), hello(server, flooder) as tls:
                tls.settimeout(2)
                reader = threading.Thread(target=lambda tls=tls: read_away(tls))
                reader.start()
                with contextlib.suppress(OSError):
                    while not stop.is_set():
                        tls.sendall(packet)
                reader.join(5)
            stop.wait(0.05)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        for number in range(30):
            event = Event(device="quiet", id=f"e{number}", at=time.time(), name="tested", message=str(number))
            quiet.send("events", signed_event(event, quiet.key))
            stop.wait(0.1)
        wait_until(lambda: any("flooder" in one for one in server.get("/status")["warnings"]), "the flooder is paused")
        wait_until(lambda: len(stored(server, quiet)) == 30, "every acknowledged event is stored")
        assert stored(server, quiet) == list(range(30)), "in order"
    finally:
        stop.set()
        thread.join(20)
    assert quiet.mqtt.is_connected()


def test_an_agent_falls_back_to_what_the_broker_speaks_and_stays_with_it(server, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    who = enrol.enrol(str(server.enrolment_string()), tmp_path / "identity", SystemClock(), device="agent", hardware=None)
    context = (str(who.ca_file), str(who.certificate_file), str(who.key_file))
    pokes, sessions, outbox = queue.Queue(), itertools.count(1), Outbox(tmp_path / "outbox.db")
    broker = Broker(who.address.broker_host, who.address.broker_port, lambda: tls_context(*context))
    link = Link("agent", broker, outbox, sessions.__next__, on_poke=lambda said, alone: pokes.put((said, alone)))
    link.start()
    try:
        wait_until(lambda: link.connected, "it is connected")
        assert pokes.get(timeout=DEADLINE_S)[1], "the news are for it alone"
        event = Event(device="agent", id="agent-1", at=time.time(), name="tested", message="1")
        outbox.put("events", signed_event(event, who.key))
        wait_until(lambda: outbox.waiting() == 0, "the broker has it")
        known = next(sessions)
        server.post("/devices/agent/revoke")
        wait_until(lambda: not link.connected, "it is thrown off")
        threading.Event().wait(4)
        assert next(sessions) - known < 30, "who is refused tries again after growing pauses"
    finally:
        link.stop()
        outbox.close()
    assert sum("MQTT 3.1.1" in record.message for record in caplog.records) >= 1


def test_files_come_over_mqtt(server, joined):
    data = bytes(range(256)) * 1000
    server.upload(data)
    device = joined("fetches")
    parts = range(-(-len(data) // PART_BYTES))
    device.send("blocks", Ask(id="t1", thing="blob", name=sha256(data), first=0, wanted=bitmap(0, parts)))
    found = {}
    while sum(map(len, found.values())) < len(data):
        topic, payload = device.received.get(timeout=20)
        if "/blocks/" in topic:
            part = decode_part(payload)
            found[part.number] = part.data
    assert b"".join(found[number] for number in sorted(found)) == data


def test_the_queues_are_not_changed_unseen(rabbits):
    """A server whose fleet.yaml says something else than the cluster has does not start, and says why."""
    server = rabbits.server
    server.stop()
    try:
        for change, words in (({"partitions": 2}, "partitions"), ({"queue_messages": 5000}, "put the setting back")):
            kept = (server.data / "fleet.yaml").read_text()
            server.set(broker={"rabbitmq": {**_rabbit(server), **change}})
            done = server.cli("serve", server.data)
            (server.data / "fleet.yaml").write_text(kept)
            assert done.returncode == 1
            assert words in done.stderr.splitlines()[-1], done.stderr
    finally:
        server.start()


def _rabbit(server):
    import yaml

    return yaml.safe_load((server.data / "fleet.yaml").read_text())["broker"]["rabbitmq"]


# -- MQTT by hand ------------------------------------------------------------------------------------------------------------


def context_of(server, device):
    context = ssl.create_default_context(cafile=str(server.ca))
    context.load_cert_chain(device.certificate, device.key_file)
    return context


def hello(server, device, client_id=None, user=None, password=None):
    """A connection that the broker has accepted.  Raises: ConnectionError, ssl.SSLError."""
    name = (client_id or device.id).encode()
    flags, rest = 0x02, struct.pack(">H", len(name)) + name
    if user is not None:
        flags |= 0xC0
        rest += struct.pack(">H", len(user)) + user + struct.pack(">H", len(password)) + password
    body = b"\x00\x04MQTT\x04" + bytes([flags]) + b"\x00\x3c" + rest
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(socket.create_connection(("127.0.0.1", server.broker), timeout=10))
        tls = stack.enter_context(context_of(server, device).wrap_socket(plain, server_hostname="127.0.0.1"))
        tls.sendall(bytes([0x10, len(body)]) + body)
        said = tls.recv(100)
        if said[:1] != b"\x20" or said[3:4] != b"\x00":
            raise ConnectionError(f"refused: {said!r}")
        stack.pop_all()
    return tls


def subscribe(topic):
    body = b"\x00\x01" + struct.pack(">H", len(topic)) + topic.encode() + b"\x01"
    return bytes([0x82, len(body)]) + body


def publish(topic, payload, *, qos=1, number=7):
    body = struct.pack(">H", len(topic)) + topic.encode() + (struct.pack(">H", number) if qos else b"") + payload
    size, digits = len(body), bytearray()
    while True:
        size, digit = divmod(size, 128)
        digits.append(digit | (128 if size else 0))
        if not size:
            return bytes([0x30 | qos << 1]) + bytes(digits) + body


def read_away(tls):
    with contextlib.suppress(OSError, ValueError):
        while tls.recv(1 << 16):
            pass
