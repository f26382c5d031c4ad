"""What a poke costs the fleet server for each device: heard from the poke itself, and asked for over HTTPS as older agents do.

A real `edge-fleet serve` with mosquitto, pinned to one processor; on the others so many devices with certificates of their own. Most
are light: they read the poke, or make the requests of one look, all of them at once, and when they are sent away come again as agents
do. Some are the agent's own link, follower and trust, with every signature verified. Each round starts a rollout that concerns
one device, which is not there. What the rollout costs by itself is measured first, with no device there, and taken off.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import selectors
import ssl
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import psutil
from paho.mqtt.enums import CallbackAPIVersion

from agent.contract import enrolment, topics
from agent.contract.codec import convert
from agent.contract.news import read_poke, unpack
from agent.host.clock import LastKnownGood, SignedClock, SystemClock
from agent.sync import identity as identities
from agent.sync.fleet.link import Broker, Link, tls_context
from agent.sync.http import FleetHttp
from agent.sync.trust.client import Trust
from agent.sync.trust.follower import Follower
from tests.fleet.stand import Device, Server

PATIENCE_S = 240.0
MODEL = "bench"


class Nothing:
    """An empty outbox."""

    def first(self, _count: int, _after: int = 0) -> list[Any]:
        return []

    def delivered(self, item: int) -> None:  # noqa: ARG002
        return


class Light:
    """A device that trusts what it reads. `known` has the assignment's version, `asked` the requests, `refused` those with 503."""

    def __init__(self, device: Device, *, hears: bool) -> None:
        self.device, self.hears = device, hears
        self.known, self.known_at = 0, 0.0
        self.asked = self.refused = self.handshakes = 0
        self.context = ssl.create_default_context(cafile=str(device.server.ca))
        self.context.load_cert_chain(device.certificate, device.key_file)

    def poked(self, payload: bytes) -> bool:
        """Whether the poke was enough."""
        poke = read_poke(payload)
        if not (self.hears and poke.news):
            return False
        said = next(text for name, text in unpack(poke.news).documents.items() if name.startswith("targets/assignments/"))
        self.learnt(json.loads(said)["version"])
        return True

    def learnt(self, version: int) -> None:
        if version > self.known:
            self.known, self.known_at = version, time.monotonic()

    def look(self) -> None:
        """The requests of an agent's look, until one ends well; the pauses are those of the follower after a failure."""
        for failures in range(10):
            if failures:
                time.sleep(min(5.0 * 2 ** (failures - 1), 60.0) * (0.75 + 0.5 * random.random()))
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self._look_once():
                    return

    def _look_once(self) -> bool:
        self.handshakes += 1
        with contextlib.closing(
            http.client.HTTPSConnection("127.0.0.1", self.device.server.device, context=self.context, timeout=30)
        ) as connection:
            self._get(connection, "/metadata/2.root.json", (404,))
            stamp = json.loads(self._get(connection, "/metadata/timestamp.json"))["signed"]
            number = stamp["meta"]["snapshot.json"]["version"]
            meta = json.loads(self._get(connection, f"/metadata/{number}.snapshot.json"))["signed"]["meta"]
            role = json.loads(self._get(connection, f"/metadata/{meta['assignments.json']['version']}.assignments.json"))[
                "signed"
            ]
            sha256 = role["targets"]["assignments/fleet.json"]["hashes"]["sha256"]
            assignment = json.loads(self._get(connection, f"/targets/assignments/{sha256}.fleet.json"))
            self._get(connection, "/record")
        self.learnt(assignment["version"])
        return True

    def _get(self, connection: http.client.HTTPSConnection, path: str, good: tuple[int, ...] = (200,)) -> bytes:
        self.asked += 1
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status not in good:
            self.refused += answer.status == 503
            raise http.client.HTTPException(f"{path}: {answer.status}")
        return body


class Crowd:
    """Light devices on one thread for the broker, and one for each look."""

    def __init__(self, devices: list[Light]) -> None:
        self.devices = devices
        self._looks = concurrent.futures.ThreadPoolExecutor(max_workers=len(devices))
        self._selector = selectors.DefaultSelector()
        self._ready = self._looking = 0
        self._stop, self._lock, self._done = threading.Event(), threading.Lock(), 0
        self._clients = [self._connect(device) for device in devices]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _connect(self, light: Light) -> mqtt.Client:
        client = mqtt.Client(CallbackAPIVersion.VERSION2, light.device.id, protocol=mqtt.MQTTv5)
        client.tls_set_context(light.context)
        client.on_connect = lambda c, *_: c.subscribe([(topics.down_poke(light.device.id), 1), (topics.POKE_ALL, 1)])
        client.on_subscribe = lambda *_: setattr(self, "_ready", self._ready + 1)
        client.on_message = lambda _c, _u, message: self._poked(light, message.payload)
        client.connect("127.0.0.1", light.device.server.broker, keepalive=600)
        self._selector.register(client.socket(), selectors.EVENT_READ, client)
        return client

    def _poked(self, light: Light, payload: bytes) -> None:
        if not light.poked(payload):
            self._looking += 1
            self._looks.submit(light.look).add_done_callback(self._looked)

    def _looked(self, _: object) -> None:
        with self._lock:
            self._done += 1

    def _run(self) -> None:
        while not self._stop.is_set():
            for key, _ in self._selector.select(0.5):
                key.data.loop_read()
            for client in self._clients:
                if client.want_write():
                    client.loop_write()

    def wait_ready(self) -> None:
        until(lambda: self._ready == len(self.devices), "the devices are connected")
        time.sleep(0.5)  # the poke that a broker kept comes right behind
        self.wait_idle()

    def wait_idle(self) -> None:
        until(lambda: self._done == self._looking, "no look is under way")

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)
        for client in self._clients:
            with contextlib.suppress(Exception):
                client.disconnect()
        self._looks.shutdown(wait=False, cancel_futures=True)


class Counting(FleetHttp):
    asked = 0

    @contextlib.contextmanager
    def open(self, url: str, **options: Any) -> Iterator[Any]:
        self.asked += 1
        with super().open(url, **options) as response:
            yield response


class Real:
    """The agent's own link, follower and trust."""

    def __init__(self, device: Device, folder: Path) -> None:
        identities.write(folder, convert(device.response, enrolment.EnrolmentResponse), device.key, time.time())
        who = identities.load(folder)
        clock = SignedClock(SystemClock(), LastKnownGood(folder / "trust" / "clock.json", floor=who.not_before))
        self.http = Counting(who.address.device_url, clock, ca=who.ca_file, certificate=who.certificate_file, key=who.key_file)
        self.known_at = 0.0
        self.follower = Follower(Trust(folder / "trust", who, self.http, clock), 3600.0, self._changed, device=device.id)
        files = (str(who.ca_file), str(who.certificate_file), str(who.key_file))
        self.link = Link(
            device.id,
            Broker("127.0.0.1", device.server.broker, lambda: tls_context(*files)),
            Nothing(),
            lambda: 1,
            self.follower.poked,
        )
        threading.Thread(target=self.follower.run, daemon=True).start()
        self.link.start()

    def _changed(self) -> None:
        self.known_at = time.monotonic()

    @property
    def known(self) -> int:
        return self.follower.current.assignment.version if self.follower.current is not None else 0

    def close(self) -> None:
        self.link.stop()
        self.follower.stop()


class Stand:
    """A server, what it and its broker have used of the processor, and rollouts that concern a device which is not there."""

    def __init__(self, base: Path, checkout: Path | None) -> None:
        with _elsewhere(checkout):
            base.mkdir()
            self.server = Server(base).start()
        self.pin()
        self.server.publish_simple(MODEL, 1)
        self.server.enrol("silent", ["silent"])

    def pin(self) -> None:
        """Gives the server that runs, and its broker, one processor."""
        self.process = psutil.Process(self.server.process.pid)
        for process in (self.process, *self.process.children()):
            process.cpu_affinity([min(os.sched_getaffinity(0))])

    def cpu_s(self) -> tuple[float, float]:
        """Of the server, and of its broker."""
        children = self.process.children()
        return _used(self.process), sum(map(_used, children))

    def change(self) -> int:
        """Another assignment; its version."""
        self.rollout = self.server.post("/rollouts", {"release": f"{MODEL}:1", "groups": ["silent"]})["id"]
        return self.version()

    def end(self) -> int:
        self.server.post(f"/rollouts/{self.rollout}/abort", {"reason": "benchmark"})
        return self.version()

    def version(self) -> int:
        folder = self.server.data / "repository" / "targets" / "assignments"
        return max(json.loads(path.read_bytes())["version"] for path in folder.glob("*.fleet.json"))


@contextlib.contextmanager
def _elsewhere(checkout: Path | None) -> Iterator[None]:
    """Processes begun meanwhile have the code of another checkout."""
    here = Path.cwd()
    os.chdir(checkout or here)  # `python -m` looks there first
    try:
        yield
    finally:
        os.chdir(here)


def _used(process: psutil.Process) -> float:
    """Seconds on a processor, also of threads that ended; in steps of 10 ms."""
    times = process.cpu_times()
    return float(times.user + times.system)


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"not within {PATIENCE_S:.0f} s: {what}")
        time.sleep(0.01)


class Round:
    """What one poke cost, in ms of processor time for each device, and how long it took to be known, in s."""

    def __init__(self, stand: Stand, crowd: Crowd, others: list[Real], own_s: tuple[float, float]) -> None:
        devices: list[Light | Real] = [*crowd.devices, *others]
        asked = self._asked(crowd, others)
        before, began = stand.cpu_s(), time.monotonic()
        version = stand.change()
        until(lambda: all(device.known >= version for device in devices), "everybody knows")
        crowd.wait_idle()
        time.sleep(0.3)
        after = stand.cpu_s()
        took = sorted(device.known_at - began for device in devices)
        self.p50_s, self.p99_s = took[len(took) // 2], took[int(len(took) * 0.99)]
        self.server_ms = 1000 * (after[0] - before[0] - own_s[0]) / len(devices)
        self.broker_ms = 1000 * (after[1] - before[1] - own_s[1]) / len(devices)
        self.requests = (self._asked(crowd, others) - asked) / len(devices)
        version = stand.end()
        until(lambda: all(device.known >= version for device in devices), "everybody knows the end")
        crowd.wait_idle()

    def _asked(self, crowd: Crowd, others: list[Real]) -> int:
        return sum(light.asked for light in crowd.devices) + sum(real.http.asked for real in others)


def own_cost_s(stand: Stand, rounds: int) -> tuple[float, float]:
    """What a rollout costs with nobody there: seconds of the server and of the broker."""
    found = []
    for _ in range(rounds):
        before = stand.cpu_s()
        stand.change()
        time.sleep(0.6)
        after = stand.cpu_s()
        found.append((after[0] - before[0], after[1] - before[1]))
        stand.end()
        time.sleep(0.3)
    return statistics.median(s for s, _ in found), statistics.median(b for _, b in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=200, help="light devices")
    parser.add_argument("--real", type=int, default=10, help="devices with the agent's own trust, where pokes are heard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--old", type=Path, help="a checkout of an older version, whose server is measured as well")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        stands = {}
        if arguments.old is not None:  # first: its data folder is copied, and a newer version reads an older one's settings
            stands["older"] = Stand(base / "older", arguments.old.absolute())
        stands["this"] = Stand(base / "this", None)
        os.sched_setaffinity(0, cores[1:] or cores)
        ways = [("older", False)] * ("older" in stands) + [("this", False), ("this", True)]
        own = {name: own_cost_s(stand, arguments.rounds) for name, stand in stands.items()}
        enrolled = {
            name: [stand.server.enrol(f"device-{number}") for number in range(arguments.devices + arguments.real)]
            for name, stand in stands.items()
        }
        results: dict[tuple[str, bool], list[Round]] = {way: [] for way in ways}
        for number in range(arguments.rounds):
            for name, hears in ways:
                stand, devices = stands[name], enrolled[name]
                crowd = Crowd([Light(device, hears=hears) for device in devices[arguments.real :]])
                others = [Real(device, base / f"{name}-{number}-{device.id}") for device in devices[: arguments.real] if hears]
                crowd.wait_ready()
                version = stand.version()
                until(lambda all_=others, version=version: all(real.known >= version for real in all_), "a first look")
                results[name, hears].append(Round(stand, crowd, others, own[name]))
                crowd.close()
                for real in others:
                    real.close()
        _tell(results, own, arguments.devices)
        for stand in stands.values():
            stand.server.stop()


def _tell(results: dict[tuple[str, bool], list[Round]], own: dict[str, tuple[float, float]], devices: int) -> None:
    print(f"{devices} devices; per device and poke (median, smallest–largest of the rounds)")
    print(f"{'server':8}{'devices':12}{'server CPU':>22}{'broker CPU':>22}{'requests':>10}{'known p50':>12}{'p99':>10}")
    for (name, hears), rounds in results.items():
        print(
            f"{name:8}{'hear' if hears else 'look':12}{_spread([r.server_ms for r in rounds], 'ms'):>22}"
            f"{_spread([r.broker_ms for r in rounds], 'ms'):>22}{statistics.median(r.requests for r in rounds):>10.1f}"
            f"{statistics.median(r.p50_s for r in rounds):>10.2f} s{statistics.median(r.p99_s for r in rounds):>8.2f} s"
        )
    for name, (server_s, broker_s) in own.items():
        print(
            f"taken off: the rollout itself costs {name} server {1000 * server_s:.0f} ms and its broker {1000 * broker_s:.0f} ms"
        )


def _spread(found: list[float], unit: str) -> str:
    return f"{statistics.median(found):.2f} {unit} ({min(found):.2f}–{max(found):.2f})"


if __name__ == "__main__":
    main()
