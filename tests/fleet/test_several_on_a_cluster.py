"""Everything that a server of several processes is made of, at once: three RabbitMQ nodes, PostgreSQL, an object store, two processes of each
kind, and a HAProxy before them.
"""

from __future__ import annotations

import contextlib
import time

import paho.mqtt.client as mqtt
import pytest
import requests

from agent.contract import topics
from tests.fleet import databases
from tests.fleet.rabbit import Rabbits
from tests.fleet.several import Several
from tests.fleet.stand import answer, model_state, wait_until
from tests.fleet.stored import ObjectStore

pytestmark = [pytest.mark.long, pytest.mark.mosquitto, pytest.mark.alone, pytest.mark.timeout(400)]


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
