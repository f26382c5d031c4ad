"""Everything that a server of several processes is made of, at once: three RabbitMQ nodes, PostgreSQL, an object store, two processes of each
kind, and a HAProxy before them.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import ssl
import time
import uuid

import msgspec
import paho.mqtt.client as mqtt
import pytest
import requests

from agent.contract import topics
from agent.contract.assignment import EVERYONE
from agent.contract.names import ReleaseRef
from fleet_server.client import Client, Profile
from fleet_server.errors import ServerRefused, Unavailable
from fleet_server.simulation import members
from fleet_server.simulation.behaviours import Behaviour, parse
from fleet_server.simulation.borrowed import Borrowed
from fleet_server.simulation.crowd import Crowd
from fleet_server.simulation.expected import Plan, Stage
from fleet_server.simulation.pace import Realism
from fleet_server.simulation.story import Nobody, Order, Story
from tests.fleet import databases
from tests.fleet.rabbit import Rabbits
from tests.fleet.reporters import Reporter, assert_all_is_stored
from tests.fleet.several import Several
from tests.fleet.stand import answer, model_state, wait_until
from tests.fleet.stored import ObjectStore
from tests.fleet.storm import KEEPS, Storm, Watch, rows, signed

pytestmark = [pytest.mark.long, pytest.mark.mosquitto, pytest.mark.alone, pytest.mark.timeout(400)]

TAKEN_OVER_WITHIN_S = 10.0
DEVICES = int(os.environ.get("EDGE_STORY_DEVICES", "120"))
SEED = int(os.environ.get("EDGE_STORY_SEED", "1"))
SPEED = 8.0
WAVES = (0.1, 0.4, 1.0)
"""Up to which part of the devices each wave goes; each is a group."""

BEHAVE = ("refusing=3%", "rolling-back=2%", "wrong-clock=2%")


@pytest.fixture(scope="module")
def database():
    with databases.cluster() as made:
        yield made


@pytest.fixture(scope="module")
def rabbits(database, tmp_path_factory):
    with contextlib.ExitStack() as stack:
        store = ObjectStore()
        stack.callback(store.close)

        def several(folder, **settings):
            return Several(folder, database, store.settings, rollouts={"silence_s": 20.0, "exclude_after": 0}, **settings)

        made = Rabbits(tmp_path_factory.mktemp("story"), 3, make=several, partitions=4)
        stack.callback(made.stop)
        yield made.start()


@pytest.fixture
def server(rabbits):
    return rabbits.server


def test_a_rollout_and_a_revocation_through_all_of_them(server):
    device, other = server.enrol("d1"), server.enrol("d2")
    for one in (device, other):
        one.connect(protocol=mqtt.MQTTv311)
    manifest = server.publish_simple("m", 1)
    try:
        rollout = server.post("/rollouts", {"release": "m:1"})["id"]
        version = server.get("/assignment")["version"]
        wait_until(lambda: (poke := device.wait_for_poke())["news"] and poke["assignment_version"] == version, "a poke with it")
        for one in (device, other):
            one.report({"m": model_state(manifest, answers=(answer(manifest),))})
        wait_until(lambda: server.get(f"/rollouts/{rollout}")["state"] == "completed", "the rollout is over")

        at = time.monotonic()
        server.post("/devices/d2/revoke")
        wait_until(lambda: not other.mqtt.is_connected(), "it is thrown off")
        print(f"\nthrown off {time.monotonic() - at:.2f} s after it was revoked")
        assert device.mqtt.is_connected()
    finally:
        for one in (device, other):
            one.disconnect()
    status = wait_until(
        lambda: (found := server.get("/status"))["broker"]["queues"] and found, "who stores says how the cluster is", within=30
    )
    assert sorted(one["kind"] for one in status["processes"]) == ["api", "api", "decide", "decide", "ingest", "ingest"]
    assert [node["problem"] for node in status["broker"]["nodes"]] == ["", "", ""]
    assert status["warnings"] == []


def test_who_floods_one_that_ingests_is_refused_by_each(rabbits, server):
    """The one that stores for a device finds that it floods; the nodes may ask another one whether it may come in."""
    files = rabbits.files / rabbits.nodes[0].name
    node = (str(files / "node.crt"), str(files / "node.key"))

    def answers():
        asked = [f"https://127.0.0.1:{port}/broker/user" for port in server.ask_ports]
        options = {"data": {"username": "flooder"}, "cert": node, "verify": str(server.ca), "timeout": 10}
        return [requests.post(url, **options).text for url in asked]

    device = server.enrol("flooder").connect(protocol=mqtt.MQTTv311)
    try:
        assert answers() == ["allow", "allow"]
        for _ in range(8000):
            device.mqtt.publish(topics.up("flooder", "telemetry"), b"x" * 200)
        wait_until(lambda: answers() == ["deny", "deny"], "each knows of it")
    finally:
        device.disconnect()


class Patient(Client):
    """Repeats what was not answered, as a program does that heeds Retry-After."""

    def _json(self, method, path, **options):
        options["headers"] = {"Idempotency-Key": uuid.uuid4().hex} if method == "POST" else {}
        until = time.monotonic() + 60
        while True:
            try:
                return super()._json(method, path, **options)
            except ServerRefused as refused:
                if refused.code != "already_done" or path != "/rollouts":
                    raise
                return next(one for one in self.get("/rollouts") if one["release"] == options["json"]["release"])
            except Unavailable:
                if time.monotonic() > until:
                    raise
            time.sleep(0.3)


class InAStorm(Story):
    """The storm ends with the rollout: what the devices come to afterwards is looked at in the calm."""

    storm: Storm

    async def settle(self):
        await asyncio.to_thread(self.storm.stop)
        return await super().settle()


def describe(one):
    version = one.device.assignment.version if one.device.assignment is not None else None
    return (
        one.member.id,
        one.member.behaviour.value,
        one.link.connected,
        one.link.problem,
        one.link.connections,
        version,
        one.device.busy,
    )


def crowd_of(client, folder, seed):
    """The devices, enrolled, in a group for each wave: members, papers, address."""
    shares = tuple(parse(text) for text in BEHAVE)
    made = members.made_up(DEVICES, "story", 1, shares, seed)
    all_of_them, papers, begin = [], {}, 0
    for number, share in enumerate(WAVES, 1):
        end = round(share * DEVICES)
        group = [msgspec.structs.replace(one, groups=(f"wave-{number}",), runs={}) for one in made[begin:end]]
        server = Borrowed(client, folder / f"wave-{number}")
        papers |= server.enrol(group, lambda _: None)
        all_of_them, begin = all_of_them + group, end
    return all_of_them, papers, server.address()


def reporting(server, count):
    """Devices that report without end; no wave reaches them."""
    found = []
    for number in range(count):
        device = server.enrol(f"reporter-{number}")
        context = ssl.create_default_context(cafile=str(server.ca))
        context.load_cert_chain(device.certificate, device.key_file)
        found.append(Reporter(device, [server.mqtt_front], context, pause_s=0.2).start())
    return found


# What was connected to a node that is killed ends without a word.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_a_rollout_while_everything_is_killed(rabbits, database, tmp_path):
    server = rabbits.server
    for statement in KEEPS:
        server.execute(statement)
    server.publish_simple("story", 1)
    client = Patient(Profile.read(server.profile))
    began = time.monotonic()
    people, papers, address = crowd_of(client, tmp_path, SEED)
    print(f"\n{DEVICES} devices enrolled in {time.monotonic() - began:.1f} s")
    groups = [Stage(group=f"wave-{number}") for number in range(1, len(WAVES) + 1)]
    plan = Plan((*groups, Stage(permille=EVERYONE)), max_failures=DEVICES)  # as the server reads it: the last wave is everybody
    order = Order(
        members=people, release=ReleaseRef("story", 1), plan=plan, seed=SEED, realism=Realism(verify=0.05, speed=SPEED, beats_s=5.0),
        silence_s=60.0, timeout_s=240.0,
    )  # fmt: skip
    reporters = reporting(server, 8)
    wait_until(lambda: all(len(one.acknowledged) > 5 for one in reporters), "all report", within=30)
    storm = Storm(rabbits, database, reporters, SEED)

    async def tell():
        crowd = Crowd(address, people, papers, tmp_path, realism=order.realism, seed=SEED, bad={order.release})
        try:
            story = InAStorm(client, crowd, order, Nobody(), lambda: False)
            await story.connect()
            story.storm = storm.start()
            report = await story.roll_out()
            return report, [describe(one) for one in crowd.devices if one.member.id in report.lost or not one.link.connected]
        finally:
            await crowd.close(politely=False)

    with Watch(server) as watch:
        try:
            report, odd = asyncio.run(tell())
        finally:
            storm.stop()
            assert_all_is_stored(server, reporters)
    client.close()
    print("\n" + "\n".join(storm.said))
    took = collections.defaultdict(list)
    for kind, seconds in storm.took:
        took[kind].append(seconds)
    print({kind: sorted(seconds) for kind, seconds in took.items()}, dict(watch.counts))
    print(report.ended, report.expected, f"over after {report.over_s} s, settled {report.settled_s} s", report.sent)
    print(*odd, sep="\n")
    signed_versions = assert_signed_once(server)
    print(
        f"{DEVICES} devices, seed {SEED}: {sum(map(len, took.values()))} measured, {len(storm.said)} blows, {signed_versions} documents signed"
    )
    assert storm.failed == []
    assert watch.wrong == []
    assert report.as_expected, (report.ended, report.expected, report.lost, report.sent.distrusted, report.why)
    ended, expected = report.ended.counts, report.expected.counts
    assert ended["good"] + ended["bad"] + ended["lost"] == DEVICES, "all of them were told, and each counts once"
    assert ended["good"] <= expected["good"]
    assert ended["bad"] <= expected["bad"], "who was cut off when the last wave passed may not have answered yet"
    assert max(took["leader"]) <= TAKEN_OVER_WITHIN_S
    assert len(server.get("/rollouts")) == 2, "the one of the test before, and this one"
    assert_told_once(server, {one.id for one in people if one.behaviour is Behaviour.HONEST})


def assert_signed_once(server):
    """Of each role a version is signed once, versions only grow, and no earlier leader signs after a later one."""
    newest, words, numbers = {}, {}, []
    for name, role, version, data, number in signed(server):
        key = (name.rpartition("/")[2].lstrip("0123456789."), version)
        assert words.setdefault(key, data) == data, f"{key} was signed twice"
        assert version >= newest.get((key[0], role), 0), f"{name} went back to version {version}"
        newest[key[0], role] = version
        numbers.append(number)
    assert numbers == sorted(numbers)
    assert len(words) > 3, "something was signed"
    return len(words)


def assert_told_once(server, devices):
    """Each device that does nothing wrong was told to update once, did so once, and all that it said is stored once."""
    said = collections.Counter(
        (device, name)
        for device, name in rows(server, "SELECT device, name FROM events WHERE model = 'story' AND device IS NOT NULL")
        if device in devices
    )
    twice = {key: number for key, number in said.items() if number > 1}
    assert not twice
    assert {device for device, name in said if name == "committed"} <= devices
