"""Three real RabbitMQ nodes: one is killed while devices report, a process that stores is killed, a rollout goes through all of it. What was
acknowledged is stored, once, and in the order in which each device said it.
"""

from __future__ import annotations

import contextlib
import json
import ssl
import subprocess
import sys
import threading
import time

import pytest

from tests.fleet.rabbit import Balancer, Rabbits
from tests.fleet.reporters import Reporter, assert_all_is_stored, stored
from tests.fleet.stand import environment, wait_until

pytestmark = [pytest.mark.mosquitto, pytest.mark.alone, pytest.mark.long, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def rabbits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    with contextlib.ExitStack() as stack:
        made = Rabbits(folder, 3, partitions=6)
        stack.callback(made.stop)
        balancer = stack.enter_context(Balancer(folder, [node.mqtt for node in made.nodes]))
        made.server.set(public={"broker": f"127.0.0.1:{balancer.port}"})
        made.start()
        yield made


@pytest.fixture
def report(rabbits):
    """Devices that report until the test ends, each connected to a node of its own choice."""
    reporters = []

    def reporting(prefix, count, **options):
        ports = [node.mqtt for node in rabbits.nodes]
        for number in range(count):
            device = rabbits.server.enrol(f"{prefix}{number}")
            context = ssl.create_default_context(cafile=str(rabbits.server.ca))
            context.load_cert_chain(device.certificate, device.key_file)
            first = number % len(ports)
            reporters.append(Reporter(device, ports[first:] + ports[:first], context, **options).start())
        wait_until(lambda: all(len(one.acknowledged) > 20 for one in reporters), "all report")
        return reporters

    yield reporting
    for one in reporters:
        one.stop()


def test_a_node_that_is_killed_takes_nothing_along(rabbits, report):
    reporters = report("n", 12)
    node = rabbits.nodes[1]
    node.kill()
    before, at = {one: len(one.acknowledged) for one in reporters}, time.monotonic()
    try:
        wait_until(lambda: all(len(one.acknowledged) > before[one] for one in reporters), "all are heard again", within=60)
        print(f"\nall were heard again {time.monotonic() - at:.2f} s after a node was killed")
        wait_until(
            lambda: all(len(one.acknowledged) > before[one] + 50 for one in reporters),
            "all go on with the other nodes",
            within=60,
        )
        broker = wait_until(
            lambda: (found := rabbits.server.get("/status"))["broker"]["nodes"][1]["problem"] and found,
            "it is missed",
            within=60,
        )
        assert any("1 of 3 nodes" in text for text in broker["warnings"])
    finally:
        node.start()
    assert_all_is_stored(rabbits.server, reporters)
    wait_until(
        lambda: not any("nodes of the broker" in text for text in rabbits.server.get("/status")["warnings"]), "all is well"
    )


class Ingester:
    """A process that stores beside the server."""

    def __init__(self, server):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fleet.ingester", str(server.data)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        self.queues, self.count, self.at = set(), 0, 0.0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            at, queues, count = line.split()
            self.at, self.count = float(at), int(count)
            self.queues = set() if queues == "-" else set(queues.split(","))

    def kill(self):
        self.process.kill()
        self.process.wait(20)
        self.process.stdin.close()
        self.process.stdout.close()


def test_processes_share_the_queues_and_take_over_from_one_that_is_killed(rabbits, report):
    reporters = report("p", 12, pause_s=0.05)
    first, second = Ingester(rabbits.server), Ingester(rabbits.server)
    try:
        wait_until(lambda: first.queues and second.queues, f"each has its share: {first.queues}, {second.queues}", within=40)
        assert not first.queues & second.queues
        killed, at = set(first.queues), time.monotonic()
        first.kill()
        before = {one: len(stored(rabbits.server, one.device)) for one in reporters}
        wait_until(
            lambda: all(len(stored(rabbits.server, one.device)) > before[one] for one in reporters), "its queues go to others"
        )
        print(f"\nqueues {sorted(killed)} were taken over within {time.monotonic() - at:.2f} s")
    finally:
        first.kill()
        try:
            assert_all_is_stored(rabbits.server, reporters)
        finally:
            second.kill()


def test_a_rollout_goes_through_while_a_node_is_killed(rabbits):
    server = rabbits.server
    server.publish_simple("m", 1)
    release = ["--release", "m:1", "--devices", "30"]
    words = ["simulate", "--on-server", "--yes", *release, "--speed", "20", "--json", "-"]
    command = [sys.executable, "-m", "fleet_server.cli", "--profile", str(server.profile), *words]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    try:
        wait_until(lambda: server.get("/status")["devices"]["online"] >= 25, "the devices are there", within=60)
        rabbits.nodes[0].kill()
        said, failed = running.communicate(timeout=80)
    finally:
        running.kill()
        running.communicate()
    assert running.returncode == 0, failed
    assert json.loads(said)["ended"]["state"] in {"completed", "waiting"}, said
