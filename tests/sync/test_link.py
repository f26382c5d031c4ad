"""The MQTT link against a real mosquitto with mutual TLS and the access list of the fleet: pokes, reports, presence, and a broker that dies."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from pathlib import Path

import msgspec
import paho.mqtt.client as mqtt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from agent.contract import topics
from agent.sync.fleet import link, protocol, takeovers
from agent.sync.fleet.link import Broker, Link, delay_s, tls_context
from agent.sync.fleet.outbox import Outbox
from tests.ports import free_ports
from tests.sync.conftest import eventually
from tests.sync.fleet import DEVICE, Authority, pem_key

MOSQUITTO = "/usr/sbin/mosquitto"
pytestmark = [pytest.mark.mosquitto, pytest.mark.timeout(60)]


class Mosquitto:
    """A broker with the fleet's rules, that can be killed and started again on the same port."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        folder.mkdir()
        self.folder, self.authority = folder, authority
        (self.port,) = free_ports(1)
        self.credentials("localhost", server=True)
        self.credentials("fleet-server")
        self.credentials(DEVICE)
        (folder / "ca.pem").write_text(authority.pem)
        (folder / "acl").write_text(
            "user fleet-server\ntopic readwrite v1/#\npattern write v1/d/%u/up/#\npattern read v1/d/%u/down/#\npattern read v1/all/#\n"
        )
        self.process: subprocess.Popen[bytes] | None = None

    def credentials(self, name: str, *, server: bool = False) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        (self.folder / f"{name}.key").write_bytes(pem_key(key))
        (self.folder / f"{name}.pem").write_text(self.authority.issue(name, key.public_key(), server=server))

    def context(self, name: str) -> ssl.SSLContext:
        return tls_context(str(self.folder / "ca.pem"), str(self.folder / f"{name}.pem"), str(self.folder / f"{name}.key"))

    def start(self) -> None:
        f = self.folder
        (f / "mosquitto.conf").write_text(
            f"listener {self.port} 127.0.0.1\ncafile {f}/ca.pem\ncertfile {f}/localhost.pem\nkeyfile {f}/localhost.key\n"
            f"require_certificate true\nuse_identity_as_username true\nallow_anonymous false\nacl_file {f}/acl\nuser root\n"
            f"persistence false\n"
        )
        self.process = subprocess.Popen(
            [MOSQUITTO, "-c", str(f / "mosquitto.conf")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        eventually(self._listens, "mosquitto")

    def _listens(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


class Fleet:
    """The fleet server's side: sees everything, may poke."""

    def __init__(self, broker: Mosquitto) -> None:
        self.seen: list[tuple[str, bytes, bool]] = []
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="fleet-server", protocol=MQTTProtocolVersion.MQTTv5)
        self.client.tls_set_context(broker.context("fleet-server"))
        self.client.reconnect_delay_set(1, 1)
        self.client.on_connect = lambda client, *_: client.subscribe(topics.UP_FILTER, 1)
        self.client.on_subscribe = lambda *_: self.ready.set()
        self.client.on_message = lambda _c, _d, m: self.seen.append((m.topic.rsplit("/", 1)[1], m.payload, m.retain))
        self.ready = threading.Event()
        self.client.connect("127.0.0.1", broker.port)
        self.client.loop_start()
        assert self.ready.wait(10)

    def of(self, kind: str) -> list[bytes]:
        return [payload for what, payload, _ in self.seen if what == kind]

    def online(self) -> bool | None:
        said = self.of("presence")
        return msgspec.json.decode(said[-1])["online"] if said else None

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def broker(tmp_path: Path, authority: Authority):
    if not Path(MOSQUITTO).exists():
        pytest.skip("mosquitto is not installed")
    broker = Mosquitto(tmp_path / "broker", authority)
    broker.start()
    yield broker
    broker.kill()


@pytest.fixture
def outbox(tmp_path: Path):
    box = Outbox(tmp_path / "outbox.db")
    yield box
    box.close()


class Ours:
    """The device's link and what it noticed."""

    def __init__(self, broker: Mosquitto, outbox: Outbox, name: str = DEVICE) -> None:
        self.pokes = 0
        self.sessions = 0
        self.delivered: list[int] = []
        self.link = Link(
            DEVICE,
            Broker("127.0.0.1", broker.port, lambda: broker.context(name)),
            outbox,
            self._session,
            self._poke,
            jitter=lambda: 0.0,
            on_delivered=self.delivered.append,
        )

    def _session(self) -> int:
        self.sessions += 1
        return self.sessions

    def _poke(self, _said: bytes, _alone: bool) -> None:
        self.pokes += 1


@pytest.fixture
def ours(broker: Mosquitto, outbox: Outbox):
    ours = Ours(broker, outbox)
    yield ours
    ours.link.stop()


@pytest.fixture
def fleet(broker: Mosquitto):
    fleet = Fleet(broker)
    yield fleet
    fleet.close()


def test_what_is_in_the_outbox_arrives_in_order_and_leaves_it(ours: Ours, fleet: Fleet, outbox: Outbox):
    for n in range(40):
        outbox.put("events", b"%d" % n)
    ours.link.start()
    eventually(lambda: len(fleet.of("events")) == 40, "40 events")
    report = outbox.put("state", b"later")
    eventually(lambda: fleet.of("state") == [b"later"], "a report put while connected")
    eventually(lambda: ours.delivered[-1] == report, "the acknowledgement of the report")

    assert fleet.of("events") == [b"%d" % n for n in range(40)]
    eventually(lambda: outbox.waiting() == 0, "the acknowledgements")


def test_pokes_arrive(ours: Ours, fleet: Fleet):
    ours.link.start()
    eventually(fleet.online, "the birth")
    for count, topic in enumerate((topics.down_poke(DEVICE), topics.POKE_ALL), start=1):
        fleet.client.publish(topic, b"whatever this says", qos=1)
        eventually(lambda n=count: ours.pokes == n, "a poke")


def test_birth_goodbye_and_last_will_carry_the_session(ours: Ours, fleet: Fleet, broker: Mosquitto, outbox: Outbox):
    ours.link.start()
    eventually(fleet.online, "the birth")
    ours.link.stop()
    eventually(lambda: fleet.online() is False, "the goodbye")

    again = Ours(broker, outbox)
    again.sessions = 7
    again.link.start()
    eventually(fleet.online, "another birth")
    # A second connection of the same client id makes the broker throw the first one out: its will is sent.
    rude = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=DEVICE, protocol=MQTTProtocolVersion.MQTTv5)
    rude.tls_set_context(broker.context(DEVICE))
    again.link.stopping.set()  # it will not come back
    rude.connect("127.0.0.1", broker.port)
    eventually(lambda: fleet.online() is False, "the end")
    rude.disconnect()
    again.link.stop()

    said = [msgspec.json.decode(payload) for payload in fleet.of("presence")]
    assert [(p["session"], p["online"]) for p in said[:3]] == [(1, True), (1, False), (8, True)]
    assert said[-1]["session"] == 8


def test_the_broker_dies_and_comes_back(ours: Ours, broker: Mosquitto, outbox: Outbox):
    ours.link.start()
    eventually(lambda: ours.link.connected, "the first connection")
    broker.kill()
    eventually(lambda: not ours.link.connected, "noticing")
    for n in range(5):
        outbox.put("events", b"%d" % n)
    eventually(lambda: ours.link.problem is not None, "the reason")
    assert outbox.waiting() == 5
    broker.start()
    fleet = Fleet(broker)
    try:
        eventually(lambda: len(set(fleet.of("events"))) == 5 or outbox.waiting() == 0, "delivery")
        eventually(lambda: outbox.waiting() == 0, "the acknowledgements")
        assert ours.link.problem is None
    finally:
        fleet.close()


class OldBroker:
    """Speaks just enough MQTT 3.1.1 to take messages, and refuses MQTT 5 as such brokers do: CONNACK with return code 1."""

    def __init__(self, broker: Mosquitto) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(broker.folder / "localhost.pem", broker.folder / "localhost.key")
        self.context, self.taken, self.ending = context, [], threading.Event()
        self.deaf, self.subscriptions = False, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(0.1)
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        while not self.ending.is_set():
            try:
                plain, _ = self.listener.accept()
                plain.settimeout(0.2)
                with self.context.wrap_socket(plain, server_side=True) as channel:
                    self.talk(channel)
            except OSError:
                continue

    def talk(self, channel: ssl.SSLSocket) -> None:
        data = b""
        while not self.ending.is_set():
            try:
                received = channel.recv(4096)
            except TimeoutError:
                continue
            if not received:
                return
            data += received
            while len(data) >= 2 and len(data) >= 2 + data[1]:  # every packet of this test is shorter than 128 bytes
                packet, data = data[: 2 + data[1]], data[2 + data[1] :]
                if packet[0] == 0x10 and packet[8] != 4:
                    channel.sendall(b"\x20\x02\x00\x01")
                    return
                self.answer(channel, packet)

    def answer(self, channel: ssl.SSLSocket, packet: bytes) -> None:
        kind = packet[0] & 0xF0
        if kind == 0x10:
            channel.sendall(b"\x20\x02\x00\x00")
        elif kind == 0x80:
            self.subscriptions += 1
            channel.sendall(b"\x90\x04" + packet[2:4] + b"\x01\x01")
        elif kind == 0x30:
            end = 4 + int.from_bytes(packet[2:4], "big")
            self.taken.append((packet[4:end].decode(), packet[end + 2 :]))
            if self.deaf:
                return
            channel.sendall(b"\x40\x02" + packet[end : end + 2])

    def close(self) -> None:
        self.ending.set()
        self.thread.join()
        self.listener.close()


def test_a_broker_of_mqtt_311_only(broker: Mosquitto, outbox: Outbox):
    old = OldBroker(broker)
    ours = Ours(broker, outbox)
    ours.link.broker = Broker("127.0.0.1", old.port, lambda: broker.context(DEVICE))
    outbox.put("events", b"old but good")
    ours.link.start()
    try:
        eventually(lambda: outbox.waiting() == 0, "delivery over MQTT 3.1.1")
        assert (topics.up(DEVICE, "events"), b"old but good") in old.taken
    finally:
        ours.link.stop()
        old.close()


def test_pokes_are_asked_for_again_of_a_broker_of_mqtt_311(broker: Mosquitto, outbox: Outbox, monkeypatch):
    """And each time the device says that it is there, so that what it missed is sent."""
    monkeypatch.setattr(protocol, "ASKED_AGAIN_S", (0.1, 0.1, 0.1))
    old = OldBroker(broker)
    ours = Ours(broker, outbox)
    ours.link.broker = Broker("127.0.0.1", old.port, lambda: broker.context(DEVICE))
    ours.link.start()
    said = topics.up(DEVICE, "presence")
    try:
        eventually(lambda: sum(topic == said for topic, _ in old.taken) == 4, "it says so four times in all")
        assert old.subscriptions == 4
    finally:
        ours.link.stop()
        old.close()


def test_a_message_leaves_the_outbox_only_when_the_broker_has_said_so(broker: Mosquitto, outbox: Outbox):
    """It arrives, the broker dies before it acknowledges, and so it is sent again."""
    old = OldBroker(broker)
    old.deaf = True
    ours = Ours(broker, outbox)
    ours.link.broker = Broker("127.0.0.1", old.port, lambda: broker.context(DEVICE))
    outbox.put("events", b"twice")
    message = (topics.up(DEVICE, "events"), b"twice")
    ours.link.start()
    try:
        eventually(lambda: message in old.taken, "the message")
        assert outbox.waiting() == 1
        old.close()
        old = OldBroker(broker)
        ours.link.broker = Broker("127.0.0.1", old.port, lambda: broker.context(DEVICE))
        eventually(lambda: outbox.waiting() == 0, "the second delivery")
        assert message in old.taken
    finally:
        ours.link.stop()
        old.close()


def test_a_broker_that_acknowledges_nothing_is_connected_to_anew(
    broker: Mosquitto, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
):
    """More messages than may be on the way at once are lost by a broker that stays: later ones must get through all the same."""
    monkeypatch.setattr(link, "SILENCE_S", 0.5)
    old = OldBroker(broker)
    old.deaf = True
    ours = Ours(broker, outbox)
    ours.link.broker = Broker("127.0.0.1", old.port, lambda: broker.context(DEVICE))
    for number in range(link.IN_FLIGHT + 1):
        outbox.put("events", f"{number}".encode())
    ours.link.start()
    try:
        eventually(lambda: old.taken.count((topics.up(DEVICE, "events"), b"0")) > 1, "the first message once more")
        old.deaf = False
        eventually(lambda: outbox.waiting() == 0, "all of them")
    finally:
        ours.link.stop()
        old.close()


def test_a_device_may_not_speak_for_another(broker: Mosquitto, outbox: Outbox, fleet: Fleet):
    """A stolen certificate of another device: what it says under our name does not arrive, and does not block its outbox for ever."""
    broker.credentials("crane-8")
    thief = Ours(broker, outbox, name="crane-8")
    outbox.put("events", b"forged")
    thief.link.start()
    eventually(lambda: outbox.waiting() == 0, "the refusal")
    thief.link.stop()

    assert fleet.of("events") == []


def test_a_stranger_does_not_get_in(broker: Mosquitto, outbox: Outbox, tmp_path: Path):
    stranger = Mosquitto(tmp_path / "stranger", Authority("stranger"))
    (stranger.folder / "ca.pem").write_text(broker.authority.pem)
    link = Link(
        DEVICE,
        Broker("127.0.0.1", broker.port, lambda: stranger.context(DEVICE)),
        outbox,
        lambda: 1,
        lambda _said, _alone: None,
        jitter=lambda: 0.1,
    )
    outbox.put("events", b"x")
    link.start()
    eventually(lambda: link.problem is not None, "the refusal")
    link.stop()

    assert not link.connected
    assert outbox.waiting() == 1


def test_stopping_is_prompt_while_nothing_is_there(outbox: Outbox, authority: Authority, tmp_path: Path):
    nobody = Mosquitto(tmp_path / "nobody", authority)
    ours = Ours(nobody, outbox)
    ours.link.start()
    eventually(lambda: ours.link.problem is not None, "a failed connection")
    assert ours.link.running
    ours.link.stop(timeout_s=3.0)

    assert not ours.link.running


def test_delays_grow_and_are_spread():
    assert [delay_s(outage_s, 1.0) for outage_s in (0.0, 1.0, 5.0, 3600.0)] == [1.0, 1.0, 5.0, 120.0]
    assert delay_s(5.0, 0.0) == 0.05
    assert delay_s(5.0, 0.5) == 2.5


def test_two_with_one_identity_notice_each_other(broker, outbox, tmp_path):
    """Also where the broker closes without a word, as mosquitto 2.0 does."""
    other = Outbox(tmp_path / "other.db")
    noticed: dict[str, list[bool]] = {"one": [], "other": []}
    links = [
        Link(
            DEVICE,
            Broker("127.0.0.1", broker.port, lambda: broker.context(DEVICE)),
            box,
            iter(range(1, 1000)).__next__,
            on_poke=lambda _said, _alone: None,
            jitter=lambda: 0.1,
            on_taken_over=noticed[name].append,
        )
        for name, box in (("one", outbox), ("other", other))
    ]
    for each in links:
        each.start()
    try:
        eventually(lambda: all(len(times) >= takeovers.MANY for times in noticed.values()), "both to notice")
    finally:
        for each in links:
            each.stop()
        other.close()


def test_a_broker_that_is_restarted_is_nobody_else(broker, outbox):
    noticed: list[bool] = []
    connected = threading.Event()
    one = Link(
        DEVICE,
        Broker("127.0.0.1", broker.port, lambda: broker.context(DEVICE)),
        outbox,
        iter(range(1, 1000)).__next__,
        on_poke=lambda _said, _alone: None,
        on_change=lambda up: connected.set() if up else connected.clear(),
        jitter=lambda: 0.01,
        on_taken_over=noticed.append,
    )
    one.start()
    try:
        for _ in range(takeovers.MANY):
            assert connected.wait(20)
            broker.kill()
            eventually(lambda: one.problem is not None and "cannot be reached" in one.problem, "the next attempt to fail")
            broker.start()
        assert connected.wait(20)
    finally:
        one.stop()
    assert noticed == []


FOUND = [
    ("nothing", [], None),
    ("one that the broker told of", [(0, True)], None),
    ("two that it told of", [(60, True), (0, True)], 2),
    ("two without a word", [(60, False), (0, False)], None),
    ("three without a word", [(300, False), (60, False), (0, False)], 3),
    ("three in a day", [(80_000, False), (40_000, False), (0, False)], None),
    ("three of which one is long ago", [(700, False), (60, False), (0, False)], None),
]


@pytest.mark.parametrize(("name", "times", "said"), FOUND, ids=[row[0] for row in FOUND])
def test_when_another_device_is_named(name, times, said, tmp_path):
    for ago, certain in times:
        takeovers.note(tmp_path, 1_000_000.0 - ago, certain=certain)

    found = takeovers.finding(tmp_path, 1_000_000.0)
    assert (found is None) is (said is None)
    assert said is None or f"{said} times" in str(found)
