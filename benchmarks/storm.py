"""A rollout to simulated devices while everything is killed: `python -m benchmarks.storm --devices 300`.

Three RabbitMQ nodes, PostgreSQL, an object store, two processes of each kind and a HAProxy before them, on this machine. Every few seconds one
of them, or two, get kill -9 and are started again as systemd would; the database crashes once. Prints how soon each kind was made good and what
is wrong in the end: what was acknowledged and not stored, signed twice, told twice, answered wrongly, and which devices do not know what
the fleet wants. Exit status 1 when anything is. Needs the packages of `make test-packages`.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import logging
import ssl
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec

from agent.contract.assignment import EVERYONE
from agent.contract.names import ReleaseRef
from benchmarks.blows import KEEPS, Storm, Watch, rows, signed
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

TAKEN_OVER_WITHIN_S = 10.0
SPEED = 8.0
WAVES = (0.1, 0.4, 1.0)
"""Up to which part of the devices each wave goes; each is a group."""
BEHAVE = ("refusing=3%", "rolling-back=2%", "wrong-clock=2%")


class Patient(Client):
    """Repeats what was not answered, as a program does that heeds Retry-After."""

    def _json(self, method: Any, path: Any, **options: Any) -> Any:
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

    async def settle(self) -> Any:
        _say("the rollout is over; what everybody comes to in the calm …")
        await asyncio.to_thread(self.storm.stop)
        return await super().settle()


def describe(one: Any) -> Any:
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


def crowd_of(client: Any, folder: Any, count: Any, seed: Any) -> Any:
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


def reporting(server: Any, count: Any) -> Any:
    """Devices that report without end; no wave reaches them."""
    found = []
    for number in range(count):
        device = server.enrol(f"reporter-{number}")
        context = ssl.create_default_context(cafile=str(server.ca))
        context.load_cert_chain(device.certificate, device.key_file)
        found.append(Reporter(device, [server.mqtt_front], context, pause_s=0.2).start())
    return found


def _say(text: str) -> None:
    print(f"  {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def storm(devices: Any, seed: Any, folder: Any) -> Any:
    """What is wrong in the end."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # each request to the object store
    _say("three RabbitMQ nodes, PostgreSQL, an object store, HAProxy and two processes of each kind are started …")
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(databases.cluster())
        store = ObjectStore()
        stack.callback(store.close)

        def several(where: Any, **settings: Any) -> Any:
            return Several(where, database, store.settings, rollouts={"silence_s": 20.0, "exclude_after": 0}, **settings)

        rabbits = Rabbits(folder, 3, make=several, partitions=4)
        stack.callback(rabbits.stop)
        rabbits.start()
        return in_a_storm(rabbits, database, devices, seed, folder)


def in_a_storm(rabbits: Any, database: Any, devices: Any, seed: Any, folder: Any) -> Any:
    server = rabbits.server
    for statement in KEEPS:
        server.execute(statement)
    server.publish_simple("story", 1)
    client = Patient(Profile.read(server.profile))
    _say(f"{devices} devices enrol …")
    people, papers, address = crowd_of(client, folder, devices, seed)
    groups = [Stage(group=f"wave-{number}") for number in range(1, len(WAVES) + 1)]
    plan = Plan((*groups, Stage(permille=EVERYONE)), max_failures=devices)  # as the server reads it: the last wave is everybody
    order = Order(
        members=people, release=ReleaseRef("story", 1), plan=plan, seed=seed, realism=Realism(verify=0.05, speed=SPEED, beats_s=5.0),
        silence_s=60.0, timeout_s=600.0,
    )  # fmt: skip
    reporters = reporting(server, 8)
    wait_until(lambda: all(len(one.acknowledged) > 5 for one in reporters), "all report", within=30)
    blows = Storm(rabbits, database, reporters, seed)

    async def tell() -> Any:
        crowd = Crowd(address, people, papers, folder, realism=order.realism, seed=seed, bad={order.release})
        try:
            story = InAStorm(client, crowd, order, Nobody(), lambda: False)
            await story.connect()
            _say("the rollout begins, and with it the storm …")
            story.storm = blows.start()
            report = await story.roll_out()
            return report, [describe(one) for one in crowd.devices if one.member.id in report.lost or not one.link.connected]
        finally:
            await crowd.close(politely=False)

    wrong = []
    with Watch(server) as watch:
        try:
            report, odd = asyncio.run(tell())
        finally:
            blows.stop()
        try:
            assert_all_is_stored(server, reporters)
        except AssertionError as error:
            wrong.append(f"what was acknowledged: {error}")
    client.close()
    documents, about_signing = signing(server)
    began = [one["model"] for one in server.get("/rollouts")].count("story")
    honest = {one.id for one in people if one.behaviour is Behaviour.HONEST}
    wrong += [*blows.failed, *watch.wrong, *about_signing, *told_twice(server, honest)]
    wrong += [f"the rollout was begun {began} times"] if began != 1 else []
    wrong += [f"{report.ended.state}, expected {report.expected.state}"] if report.ended.state != report.expected.state else []
    wrong += [f"does not know what the fleet wants: {one}" for one in odd]
    took = collections.defaultdict(list)
    for kind, seconds in blows.took:
        took[kind].append(seconds)
    print(
        f"{devices} devices, seed {seed}, {len(blows.said)} blows; {report.ended.state} after {report.over_s} s; {documents} documents signed"
    )
    for kind, seconds in sorted(took.items()):
        print(
            f"  {kind:10} good again after {min(seconds):.1f} to {max(seconds):.1f} s, median {statistics.median(seconds):.1f} ({len(seconds)})"
        )
    print(f"  answers: {dict(watch.counts)}")
    if max(took["leader"], default=0) > TAKEN_OVER_WITHIN_S:
        wrong.append(f"a leader was taken over after {max(took['leader'])} s")
    return wrong


def signing(server: Any) -> Any:
    """How many documents were signed, and what is wrong with them: of each role a version is signed once, versions only grow, and no
    earlier leader signs after a later one.
    """
    newest, words, numbers, wrong = {}, {}, [], []
    for name, role, version, data, number in signed(server):
        key = (name.rpartition("/")[2].lstrip("0123456789."), version)
        if words.setdefault(key, data) != data:
            wrong.append(f"{key} was signed twice")
        if version < newest.get((key[0], role), 0):
            wrong.append(f"{name} went back to version {version}")
        newest[key[0], role] = version
        numbers.append(number)
    if numbers != sorted(numbers):
        wrong.append(f"leaders signed in the order {numbers}")
    return len(words), wrong


def told_twice(server: Any, devices: Any) -> Any:
    """What devices that do nothing wrong said more than once of the update, as it is stored."""
    said = collections.Counter(
        (device, name)
        for device, name in rows(server, "SELECT device, name FROM events WHERE model = 'story' AND device IS NOT NULL")
        if device in devices
    )
    return [f"{device} said {name!r} {number} times" for (device, name), number in said.items() if number > 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="storm-") as folder:
        wrong = storm(arguments.devices, arguments.seed, Path(folder))
    for one in wrong:
        print(f"WRONG: {one}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
