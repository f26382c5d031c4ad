"""A rollout to simulated devices while everything is killed, on a server of several processes.

Three RabbitMQ nodes, PostgreSQL, an object store, two processes of each kind and a HAProxy before them, on this machine. Every few seconds one
of them, or two, get kill -9 and are started again as systemd would; the database crashes once. In the end nothing that was acknowledged is
lost, nothing was signed twice, nobody was told twice, nobody was answered wrongly, and every device knows what the fleet wants. How soon each
kind was made good is printed (pytest -s). EDGE_STORM_DEVICES is how many devices there are; EDGE_SEED makes a run again.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gc
import logging
import os
import random
import ssl
import statistics
import sys
import time
import uuid

import msgspec
import pytest

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
from tests.fleet.stand import wait_until
from tests.fleet.stored import ObjectStore
from tests.survival.blows import KEEPS, Storm, Watch, rows, signed

pytestmark = [
    pytest.mark.survival,
    pytest.mark.timeout(900),
    # paho leaves the sockets of handshakes that fail to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]

DEVICES = int(os.environ.get("EDGE_STORM_DEVICES", "300"))
SEED = int(os.environ.get("EDGE_SEED", str(random.randrange(1 << 32))))
TAKEN_OVER_WITHIN_S = 10.0
SPEED = 8.0
WAVES = (0.1, 0.4, 1.0)
"""Up to which part of the devices each wave goes; each is a group."""
BEHAVE = ("refusing=3%", "rolling-back=2%", "wrong-clock=2%")


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
                return next(one for one in self.get("/rollouts") if one["model"] == "story")
            except Unavailable:
                if time.monotonic() > until:
                    raise
            time.sleep(0.3)


class InAStorm(Story):
    """The storm ends with the rollout: what the devices come to afterwards is looked at in the calm."""

    storm: Storm

    async def settle(self):
        _say("the rollout is over; what everybody comes to in the calm …")
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


def crowd_of(client, folder, count, seed):
    """The devices, enrolled, in a group for each wave: members, papers, address."""
    shares = tuple(parse(text) for text in BEHAVE)
    made = members.made_up(count, "story", 1, shares, seed)
    all_of_them, papers, begin = [], {}, 0
    for number, share in enumerate(WAVES, 1):
        end = round(share * count)
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


def _say(text):
    print(f"  {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@pytest.fixture
def database():
    with databases.cluster() as made:
        yield made


@pytest.fixture
def rabbits(database, tmp_path):
    """A server of several processes with everything that belongs to it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # each request to the object store
    with contextlib.ExitStack() as stack:
        store = ObjectStore()
        stack.callback(store.close)

        def several(where, **settings):
            return Several(where, database, store.settings, rollouts={"silence_s": 60.0, "exclude_after": 0}, **settings)

        made = Rabbits(tmp_path, 3, make=several, partitions=4)
        stack.callback(made.stop)
        made.start()
        for statement in KEEPS:
            made.server.execute(statement)
        yield made


def test_a_rollout_in_a_storm(rabbits, database, tmp_path):
    server = rabbits.server
    server.publish_simple("story", 1)
    client = Patient(Profile.read(server.profile))
    _say(f"{DEVICES} devices enrol …")
    people, papers, address = crowd_of(client, tmp_path, DEVICES, SEED)
    reporters = reporting(server, 8)
    wait_until(lambda: all(len(one.acknowledged) > 5 for one in reporters), "all report", within=30)
    blows = Storm(rabbits, database, reporters, SEED)
    order = order_of(people)
    with Watch(server) as watch:
        try:
            report, lost = asyncio.run(
                tell(client, lambda: Crowd(address, people, papers, tmp_path, realism=order.realism, seed=SEED, bad={order.release}), order, blows)
            )  # fmt: skip
        finally:
            blows.stop()
        assert_all_is_stored(server, reporters)
    client.close()
    gc.collect()  # here, where it is allowed for
    written = signed(server)
    show(report, blows, watch, written)
    honest = {one.id for one in people if one.behaviour is Behaviour.HONEST}
    assert report.ended.state == report.expected.state, lost
    assert [one["model"] for one in server.get("/rollouts")].count("story") == 1
    assert not blows.failed
    assert blows.kinds >= {"leader", "ingest", "api", "node", "database"}, "each kind was hit"
    assert not watch.wrong
    assert_signed_once(written)
    assert not told_twice(server, honest)
    assert not lost, "these do not know what the fleet wants"
    assert max(seconds for kind, seconds in blows.took if kind == "leader") <= TAKEN_OVER_WITHIN_S


def order_of(people):
    groups = [Stage(group=f"wave-{number}") for number in range(1, len(WAVES) + 1)]
    plan = Plan(
        (*groups, Stage(permille=EVERYONE)), failure_share=0.49, at_once=True
    )  # the last wave is everybody, as the server reads it
    return Order(
        members=people, release=ReleaseRef("story", 1), plan=plan, seed=SEED, realism=Realism(verify=0.05, speed=SPEED, beats_s=15.0),
        silence_s=60.0, timeout_s=420.0,
    )  # fmt: skip


async def tell(client, crowd_there, order, blows):
    """The rollout, and the storm during it: the report, and the devices that do not know what the fleet wants."""
    crowd = crowd_there()
    try:
        story = InAStorm(client, crowd, order, Nobody(), lambda: False)
        await story.connect()
        _say("the rollout begins, and with it the storm …")
        story.storm = blows.start()
        report = await story.roll_out()
        return report, [describe(one) for one in crowd.devices if one.member.id in report.lost or not one.link.connected]
    finally:
        await crowd.close(politely=False)


def show(report, blows, watch, written):
    took = collections.defaultdict(list)
    for kind, seconds in blows.took:
        took[kind].append(seconds)
    print(
        f"\n{DEVICES} devices, EDGE_SEED={SEED}, {len(blows.said)} blows; {report.ended.state} after {report.over_s} s; {len(written)} documents signed"
    )
    for kind, seconds in sorted(took.items()):
        print(
            f"  {kind:10} good again after {min(seconds):.1f} to {max(seconds):.1f} s, median {statistics.median(seconds):.1f} ({len(seconds)})"
        )
    print(f"  answers: {dict(watch.counts)}")


def assert_signed_once(written):
    """Of each role a version is signed once, versions only grow, and no earlier leader signs after a later one."""
    newest, words, numbers = {}, {}, []
    for name, role, version, data, number in written:
        key = (name.rpartition("/")[2].lstrip("0123456789."), version)
        assert words.setdefault(key, data) == data, f"{key} was signed twice"
        assert version >= newest.get((key[0], role), 0), f"{name} went back to version {version}"
        newest[key[0], role] = version
        numbers.append(number)
    assert numbers == sorted(numbers)


def told_twice(server, devices):
    """What devices that do nothing wrong said more than once of the update, as it is stored."""
    said = collections.Counter(
        (device, name)
        for device, name in rows(server, "SELECT device, name FROM events WHERE model = 'story' AND device IS NOT NULL")
        if device in devices
    )
    return [f"{device} said {name!r} {number} times" for (device, name), number in said.items() if number > 1]
