"""A certificate is renewed by whatever way is open, and whoever answers: only what the fleet's CA issued for this key and name is kept."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import threading
from pathlib import Path

import msgspec
import paho.mqtt.client as mqtt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from agent.contract import topics
from agent.contract.codec import decode
from agent.contract.enrolment import MAX_CERTIFICATE_BYTES
from agent.contract.reasons import Reason
from agent.contract.transfers import MAX_ASK_BYTES, Ask, Part, Status
from agent.sync import identity
from agent.sync.fetching.mqtt import Transfers
from agent.sync.fleet import renewal
from agent.sync.fleet.link import Broker, Link, tls_context
from agent.sync.fleet.renewal import Renewal
from agent.sync.http import FleetHttp
from agent.sync.identity import Identity
from agent.sync.problems import Problem
from tests.sync.conftest import FakeClock, eventually
from tests.sync.fleet import DAY, DEVICE, UTC, Authority, Server, enrolled
from tests.sync.test_enrol import Office
from tests.sync.test_link import MOSQUITTO, Mosquitto

CLOSED = "https://127.0.0.1:1"
SOON = 300 * DAY
STRANGER = ec.generate_private_key(ec.SECP256R1()).public_key()


@pytest.fixture
def who(authority: Authority, tmp_path: Path) -> Identity:
    return enrolled(tmp_path / "identity", authority, b"{}", url=CLOSED)


def days_ago(days: float) -> dt.datetime:
    return dt.datetime.now(UTC) - dt.timedelta(days=days)


class Ways:
    """Both ways to the fleet server, and how often each was gone."""

    def __init__(self, who: Identity, authority: Authority, url: str = CLOSED) -> None:
        self.who, self.authority, self.url = who, authority, url
        self.clock = FakeClock(who.not_after - 30 * DAY)
        self.answer: bytes | Exception | None = None
        self.asked: list[str] = []
        self.tried = 0
        self.renewal = Renewal(self.clock, self.https, self.broker)

    def https(self) -> FleetHttp:
        self.tried += 1
        who = self.who
        return FleetHttp(self.url, self.clock, ca=who.ca_file, certificate=who.certificate_file, key=who.key_file)

    def broker(self, request: str) -> bytes:
        self.asked.append(request)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer or self.authority.issue(DEVICE, self.who.key.public_key(), begins=days_ago(0)).encode()

    def look(self) -> Identity:
        return self.renewal.renewed(self.who)


@pytest.fixture
def ways(who: Identity, authority: Authority) -> Ways:
    return Ways(who, authority)


# -- which way, and when --------------------------------------------------------------------------------------------------------


def test_nobody_is_asked_before_it_is_time(ways: Ways):
    ways.clock.set_wall(ways.who.not_before + 100 * DAY)

    assert ways.look() is ways.who
    assert (ways.tried, ways.asked) == (0, [])


def test_the_broker_is_asked_where_https_leads_nowhere(ways: Ways):
    renewed = ways.look()

    assert (ways.tried, len(ways.asked)) == (1, 1)
    assert renewed.certificate != ways.who.certificate
    assert renewed.certificate == identity.load(ways.who.folder).certificate


@pytest.fixture
def office(server: Server, authority: Authority) -> Office:
    return Office(server, authority)


def test_the_broker_is_not_asked_where_https_is_open(office: Office, ways: Ways):
    ways.url = office.server.url

    assert ways.look().certificate != ways.who.certificate
    assert ways.asked == []


def test_the_broker_is_not_asked_when_the_fleet_server_said_no(office: Office, ways: Ways):
    ways.url, office.refusal = office.server.url, (403, b'{"error": "device was revoked", "code": "revoked"}')

    assert ways.look() is ways.who
    assert ways.asked == []


def test_what_does_not_come_is_asked_for_again_after_longer_and_longer_pauses(ways: Ways):
    ways.answer = Problem(Reason.DOWNLOAD_FAILED, "the broker brought nothing")
    times, start = [], ways.clock.monotonic()
    while ways.clock.monotonic() < start + 4 * 3600:
        before = ways.tried
        assert ways.look() is ways.who
        if ways.tried > before:
            times.append(ways.clock.monotonic() - start)
        ways.clock.pass_(5.0)
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]

    assert pauses[:6] == [5.0, 10.0, 20.0, 40.0, 80.0, 160.0]
    assert pauses[-1] == 3600.0
    assert len(ways.asked) == ways.tried == len(times)

    ways.answer = None
    ways.clock.pass_(3600.0)
    assert ways.look().certificate != ways.who.certificate


def test_a_certificate_in_its_last_hour_is_not_lost_to_a_long_pause(ways: Ways):
    ways.clock.set_wall(ways.who.not_after - 3600)
    ways.answer = Problem(Reason.DOWNLOAD_FAILED, "the broker brought nothing")
    while ways.clock.wall() < ways.who.not_after - 60:
        ways.look()
        ways.clock.pass_(5.0)
    before = ways.tried
    ways.clock.pass_(10.0)
    ways.look()

    assert ways.tried == before + 1, "with a minute left it is asked every few seconds"


def test_the_same_certificate_again_is_no_renewal(ways: Ways):
    """A server whose clock is behind ours gives what we have: it is kept, and it is not asked for without end."""
    ways.answer = ways.who.certificate_file.read_bytes()
    for _ in range(100):
        assert ways.look().certificate == ways.who.certificate
        ways.clock.pass_(1.0)

    assert len(ways.asked) == 5


# -- who asks, and who answers ---------------------------------------------------------------------------------------------------


def impostor() -> Authority:
    return Authority()  # the same name, another key


FORGED = {
    "of another authority": lambda who, _: Authority("an impostor").issue(DEVICE, who.key.public_key()),
    "of one of the same name": lambda who, _: impostor().issue(DEVICE, who.key.public_key()),
    "for another key": lambda _, ours: ours.issue(DEVICE, STRANGER),
    "for another name": lambda who, ours: ours.issue("crane-8", who.key.public_key()),
    "that ends earlier": lambda who, ours: ours.issue(DEVICE, who.key.public_key(), begins=days_ago(200)),
    "that is the authority's own": lambda _, ours: ours.pem,
    "that is none": lambda _who, _ours: "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    "that is text": lambda _who, _ours: "no",
    "that is not even text": lambda _who, _ours: "\udcff\x00",
}


@pytest.mark.parametrize("make", FORGED.values(), ids=FORGED.keys())
def test_a_forged_certificate_is_not_kept(make, ways: Ways, authority: Authority):
    """Otherwise whoever has the broker could cut a device off for good: nobody would let it in with that."""
    before = ways.who.certificate_file.read_bytes()
    ways.answer = make(ways.who, authority).encode(errors="surrogateescape")

    assert ways.look() is ways.who
    assert len(ways.asked) == 1
    assert ways.who.certificate_file.read_bytes() == before
    assert identity.load(ways.who.folder).certificate == ways.who.certificate


def test_what_stands_around_a_good_certificate_is_not_kept(ways: Ways, authority: Authority):
    """OpenSSL reads the file to its end, and would refuse it whole."""
    good = authority.issue(DEVICE, ways.who.key.public_key(), begins=days_ago(0))
    ways.answer = f"words\n{good}-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".encode()

    renewed = ways.look()

    assert renewed.certificate_file.read_text() == good
    tls_context(*map(str, (renewed.ca_file, renewed.certificate_file, renewed.key_file)))


def test_a_request_fits_into_an_ask(who: Identity):
    """With the longest name, and room to spare."""
    longest = enrolled_as(who, "d" * 64)
    request = renewal.signed_request(longest)

    assert len(json.dumps(request)) < MAX_ASK_BYTES - 1024


def enrolled_as(who: Identity, name: str) -> Identity:
    return msgspec.structs.replace(who, address=msgspec.structs.replace(who.address, device=name))


class Hostile:
    """Has the broker: answers every request as it likes."""

    def __init__(self, broker: Mosquitto) -> None:
        self.says: bytes | None = None
        self.status = Status.OK
        self.asks: list[Ask] = []
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="fleet-server", protocol=MQTTProtocolVersion.MQTTv5)
        self.client.tls_set_context(broker.context("fleet-server"))
        self.client.on_connect = lambda client, *_: client.subscribe(topics.UP_FILTER, 1)
        ready = threading.Event()
        self.client.on_subscribe = lambda *_: ready.set()
        self.client.on_message = self._on_message
        self.client.connect("127.0.0.1", broker.port)
        self.client.loop_start()
        assert ready.wait(10)

    def _on_message(self, client, _data, message) -> None:
        if not message.topic.endswith("/blocks"):
            return
        ask = decode(message.payload, Ask, limit_bytes=MAX_ASK_BYTES)
        self.asks.append(ask)
        if self.says is not None:
            part = Part(self.status, 0, len(self.says), self.says)
            client.publish(topics.down_blocks(DEVICE, ask.id), part.encode())

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.mark.alone  # silence of 0.2 s is noticed
@pytest.mark.mosquitto
@pytest.mark.timeout(60)
def test_through_a_broker_in_the_wrong_hands(who: Identity, authority: Authority, tmp_path: Path):
    """It may refuse, stay silent, forge and flood: the old certificate stays, and the next honest answer is taken."""
    if not Path(MOSQUITTO).exists():
        pytest.skip("mosquitto is not installed")
    broker = Mosquitto(tmp_path / "broker", authority)
    broker.start()
    hostile = Hostile(broker)
    files = (str(who.ca_file), str(who.certificate_file), str(who.key_file))
    link = Link(
        DEVICE, Broker("127.0.0.1", broker.port, lambda: tls_context(*files)), Nothing(), lambda: 1, lambda _said, _alone: None
    )
    transfers = Transfers(link.ask, lambda: link.connected, silence_s=0.2)
    link.on_blocks, link.busy = transfers.received, lambda: transfers.active
    ways = Ways(who, authority)
    ways.renewal = Renewal(
        ways.clock,
        ways.https,
        lambda request: transfers.whole(
            "renewal", "", limit_bytes=MAX_CERTIFICATE_BYTES, deadline_s=10.0, what="a new certificate", request=request
        ),
    )
    link.start()
    try:
        eventually(lambda: link.connected, "the link")
        before = who.certificate_file.read_bytes()
        foreign = Authority("an impostor").issue(DEVICE, who.key.public_key()).encode()
        for status, says in (
            (Status.OK, None),
            (Status.REFUSED, b"device was revoked"),
            (Status.NOT_FOUND, b""),
            (Status.OK, foreign),
            (Status.OK, b"x" * (MAX_CERTIFICATE_BYTES + 1)),
        ):
            hostile.status, hostile.says = status, says
            asked = len(hostile.asks)
            assert ways.look() is who
            assert len(hostile.asks) > asked
            assert who.certificate_file.read_bytes() == before
            ways.clock.pass_(3600.0)
        good = authority.issue(DEVICE, who.key.public_key(), begins=days_ago(0))
        hostile.status, hostile.says = Status.OK, good.encode()
        assert ways.look().certificate_file.read_text() == good
        assert {ask.thing for ask in hostile.asks} == {"renewal"}
    finally:
        link.stop()
        hostile.close()
        broker.kill()


class Nothing:
    """An empty outbox."""

    def first(self, count: int, after: int = 0) -> list:
        return []

    def delivered(self, item: int) -> None:
        return
