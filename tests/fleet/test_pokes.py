"""The pokes of a real server over a real broker, heard by the device's own code: what a device asks its server for after one."""

from __future__ import annotations

import threading
import time
from typing import Literal

import msgspec
import pytest

from agent.contract import enrolment
from agent.contract.codec import convert
from agent.contract.names import ReleaseRef
from agent.contract.news import PACKED_BYTES, read_poke, unpack
from agent.host.clock import LastKnownGood, SignedClock, SystemClock
from agent.sync import identity as identities
from agent.sync.fleet.link import Broker, Link, tls_context
from agent.sync.http import FleetHttp
from agent.sync.trust.client import Trust
from agent.sync.trust.follower import Follower
from tests.fleet.stand import wait_until


class NoOutbox:
    def first(self, _count, _after=0):
        return []

    def delivered(self, item):
        return


class Counting(FleetHttp):
    """Notes every request."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.asked: list[str] = []

    def open(self, url, **options):
        self.asked.append(url.removeprefix(self.base_url))
        return super().open(url, **options)


class Listener:
    """A device's link, follower and trust, as `sync` wires them."""

    def __init__(self, server, folder, name, groups=()):
        device = server.enrol(name, groups)
        self.name = name
        identities.write(folder / name, convert(device.response, enrolment.EnrolmentResponse), device.key, time.time())
        self.who = who = identities.load(folder / name)
        clock = SignedClock(SystemClock(), LastKnownGood(folder / f"{name}-trust" / "clock.json", floor=who.not_before))
        self.http = Counting(who.address.device_url, clock, ca=who.ca_file, certificate=who.certificate_file, key=who.key_file)
        self.trust = Trust(folder / f"{name}-trust", who, self.http, clock)
        self.follower = Follower(self.trust, 3600.0, lambda: None, device=name)
        self.pokes: list[bytes] = []
        files = tuple(map(str, (who.ca_file, who.certificate_file, who.key_file)))
        self._broker = Broker("127.0.0.1", server.broker, lambda: tls_context(*files))
        self._thread = threading.Thread(target=self.follower.run)

    def _poked(self, said, alone):
        self.pokes.append(said)
        self.follower.poked(said, alone)

    def connect(self):
        self.link = Link(self.name, self._broker, NoOutbox(), lambda: 1, self._poked, jitter=lambda: 0.01)
        self.link.start()

    def start(self):
        self._thread.start()
        self.connect()
        wait_until(lambda: self.pokes and self.follower.current is not None, "a first look, and the poke that the broker kept")
        self.http.asked.clear()
        self.pokes.clear()
        return self

    def stop(self):
        self.follower.stop()
        self._thread.join(20)
        self.link.stop()
        self.trust.close()


@pytest.fixture
def listener(server, tmp_path):
    made = []

    def listening(name, groups=()):
        made.append(Listener(server, tmp_path, name, groups))
        return made[-1].start()

    yield listening
    for each in made:
        each.stop()


def test_a_rollout_reaches_a_device_that_asks_for_nothing(server, listener):
    device = listener("poke-1")
    server.publish_simple("quiet", 1)
    server.begin("quiet:1")
    wait_until(lambda: "quiet" in device.follower.current.models(), "the assignment")
    assert device.http.asked == []
    assert device.follower.problem is None
    assert len(device.pokes[-1]) < PACKED_BYTES


def test_whom_the_rollout_reaches_has_the_manifest_too(server, listener):
    device = listener("poke-2", ["loud"])
    manifest = server.publish_simple("loud", 1)
    server.post("/rollouts", {"release": "loud:1", "groups": ["loud"]})
    wait_until(lambda: "loud" in device.follower.current.models(), "the assignment")
    assert device.follower.current.wanted("loud").release == 1
    assert device.trust.manifest(ReleaseRef("loud", 1)).manifest == manifest
    assert device.http.asked == [], "so that only blobs are left to ask for"


def test_what_was_withdrawn_is_known_without_a_question(server, listener):
    device = listener("poke-3")
    for version in (1, 2):
        server.publish_simple("gone", version)
    server.begin("gone:2")
    server.post("/releases/gone/2/withdraw", {})
    wait_until(lambda: device.follower.current.withdrawn_before == {"gone": (2,)}, "the withdrawal")
    assert device.http.asked == []


def test_new_groups_reach_the_device_alone(server, listener):
    device, other = listener("poke-4"), listener("poke-5")
    server.request("PUT", "/devices/poke-4/groups", json={"groups": ["moved"]})
    wait_until(lambda: device.follower.current.record.groups == ("moved",), "the record")
    assert device.http.asked == []
    assert other.pokes == []
    assert read_poke(device.pokes[-1]).spread_s == 0.0


def test_a_poke_names_the_time_to_spread_over(server, listener):
    device = listener("poke-6")
    wait_until(lambda: server.get("/status")["devices"]["online"] >= 1, "the device")
    server.publish_simple("spread", 1)
    server.begin("spread:1")
    wait_until(lambda: device.pokes, "a poke")
    said = read_poke(device.pokes[-1])
    assert 0 < said.spread_s <= 1.0
    assert "metadata/timestamp.json" in unpack(said.news).documents


def test_an_older_agent_can_read_the_poke(server, listener):
    """It has none of the new fields, and fields that it does not know mean nothing to it."""

    class Poke(msgspec.Struct, frozen=True, kw_only=True):
        kind: Literal["poke"]
        format: int
        assignment_version: int | None = None

    device = listener("poke-7")
    server.publish_simple("older", 1)
    server.begin("older:1")
    wait_until(lambda: "older" in device.follower.current.models(), "the assignment")
    said = msgspec.json.decode(device.pokes[-1], type=Poke)
    assert (said.format, said.assignment_version) == (1, device.follower.current.assignment.version)


def test_a_device_that_was_away_hears_the_last_poke_when_it_is_back(server, listener):
    device = listener("poke-8")
    device.link.stop()
    server.publish_simple("missed", 1)
    server.begin("missed:1")
    device.connect()
    wait_until(lambda: "missed" in device.follower.current.models(), "the assignment")
    assert device.http.asked == []


def test_a_broker_that_lost_everything_has_the_poke_again(server, listener):
    device = listener("poke-9")
    server.stop()
    (server.data / "broker" / "mosquitto.db").unlink()
    server.start()
    wait_until(lambda: device.pokes, "a poke")
    assert device.http.asked == [], "it knows it"
