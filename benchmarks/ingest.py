"""What the fleet server does with what devices say: storing reports and events, judging a rollout by them, and showing it.

In one process, without a broker, on a database on disk: the time is that of `Intake.store`, `Judge.evaluate` and of the views, and
"per core" is per second of this process's processor time. Reports are signed by keys of their own kind, each by one of a few
hundred; the first reading of a device's key is not counted.

`python -m benchmarks.ingest [--devices 1500 10000] [--json FILE]`. To compare two versions run it in both checkouts in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import load_pem_x509_csr

from agent.contract import topics
from agent.contract.codec import encode
from agent.contract.names import ReleaseRef
from agent.contract.reports import Answer, Event, Hardware, ModelState, Outcome, Phase, Presence, StateReport
from benchmarks.kept import usual
from fleet_server.access import SERVER
from fleet_server.app import Fleet
from fleet_server.config import FleetConfig, Folder
from fleet_server.devices import envelopes
from fleet_server.ingest.intake import Message
from fleet_server.releases import keys, publisher
from fleet_server.setup import init
from fleet_server.storage.models import Certificate, Device
from tests.fleet.stand import make_csr, sha256, signed_event, signed_report, simple_manifest
from tests.fleet.tellers import signed_telemetry, telemetry

KEYS = 256
BATCHES = 8  # that are judged, of each phase that devices go through
MODEL = "bench"
HARDWARE = Hardware(
    arch="aarch64", machine="Raspberry Pi 5", os="Linux 6.6", cpus=4, memory_bytes=8 << 30, runtimes={"onnx": "1.22"}
)


class Bench:
    """A fleet of so many devices, and what each of them would say."""

    def __init__(self, base: Path, devices: int) -> None:
        folder, config = Folder(base / "fleet"), FleetConfig(fleet="bench", hosts=("127.0.0.1",))
        init(folder, config, offline_keys=base / "offline", profile=base / "profile.yaml")
        self.fleet = Fleet(folder, config)
        self.fleet.recover()
        self.releases_key = keys.load(base / "offline" / "releases.key")
        self.devices = [f"camera-{n:05}" for n in range(devices)]
        self.counter = 0
        self.manifests = [self._publish(version) for version in (1, 2)]
        self._keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(min(KEYS, devices))]
        self._join()

    def _publish(self, version: int) -> Any:
        data = f"bench {version}".encode()
        (self.fleet.folder.blobs / sha256(data)).write_bytes(data)
        manifest = simple_manifest(MODEL, version, data)
        self.fleet.catalogue.publish(
            SERVER, *publisher.add(self.fleet.repository.releases(), manifest, self.releases_key, time.time())
        )
        return manifest

    def _join(self) -> None:
        now, pems = time.time(), []
        for key in self._keys:
            certificate = self.fleet.authority.issue_device("bench", load_pem_x509_csr(make_csr(key).encode()), 90 * 86400.0)
            pems.append(certificate.public_bytes(serialization.Encoding.PEM).decode())
            envelopes.key_of(pems[-1])
        with self.fleet.database.session() as session:
            for n, name in enumerate(self.devices):
                session.add(Device(id=name, created=now, groups=[f"site-{n % 20}"], revoked=False, serial=1, record="{}" * 300))
                session.add(
                    Certificate(serial=f"{n:x}", device=name, pem=pems[n % len(pems)], issued=now, expires=now + 80 * 86400)
                )
        births = [
            Message(topics.up(name, "presence"), encode(Presence(device=name, session=1, online=True))) for name in self.devices
        ]
        for batch in _pieces(births, 1000):
            self.fleet.intake.store(batch)

    def reports(self, *, phase: Phase = Phase.STEADY, version: int = 1, answers: Sequence[Answer] = ()) -> list[Message]:
        """A report of each device."""
        self.counter += 1
        state = ModelState(
            serving=version, sha256=self.manifests[version - 1].files["model.onnx"].sha256, phase=phase, variant="cpu",
            wanted=version, placement="cpu", requests=self.counter * 1000, p95_ms=1.5, answers=tuple(answers),
        )  # fmt: skip
        found = []
        for n, name in enumerate(self.devices):
            report = StateReport(
                device=name, counter=self.counter, session=1, at=time.time(), agent_version="0.1.0", models={MODEL: state},
                hardware=HARDWARE, run="abcdef", assignment_version=3, record_serial=1,
            )  # fmt: skip
            found.append(Message(topics.up(name, "state"), signed_report(report, self._keys[n % len(self._keys)])))
        return found

    def telemetry(self) -> list[Message]:
        """What each device tells of five minutes."""
        self.counter += 1
        figures = ((1, usual(1000)),)
        return [
            Message(
                topics.up(name, "telemetry"),
                signed_telemetry(
                    telemetry(name, self.counter, time.time(), *figures, model=MODEL), self._keys[n % len(self._keys)]
                ),
            )
            for n, name in enumerate(self.devices)
        ]

    def events(self) -> list[Message]:
        """An event of each device."""
        self.counter += 1
        found = []
        for n, name in enumerate(self.devices):
            event = Event(
                id=f"e{self.counter}", device=name, at=time.time(), name="update_committed", message=f"{MODEL}:1 stays", model=MODEL, release=1
            )  # fmt: skip
            found.append(Message(topics.up(name, "events"), signed_event(event, self._keys[n % len(self._keys)])))
        return found


def _pieces(messages: list[Message], size: int) -> Iterator[list[Message]]:
    for start in range(0, len(messages), size):
        yield messages[start : start + size]


def _cost(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the processor, and by the wall."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def _rates(bench: Bench, messages: list[Message], batch: int) -> dict[str, float]:
    """Messages per second of processor and of wall time."""
    cpu, wall = _cost(lambda: [bench.fleet.intake.store(piece) for piece in _pieces(messages, batch)])
    assert not bench.fleet.intake.dropped, bench.fleet.intake.dropped
    return {"per_core": len(messages) / cpu, "per_second": len(messages) / wall}


def _verifying(bench: Bench, messages: list[Message]) -> float:
    """Verifications of a signature per second of processor time: nothing can be faster than this."""
    signers = [bench.fleet.inventory.signers(message.topic.split("/")[2]) for message in messages]
    kind = "application/vnd.edge-agent.state+json"
    cpu, _ = _cost(lambda: [envelopes.opened(m.payload, kind, s, "it") for m, s in zip(messages, signers, strict=True)])
    return len(messages) / cpu


def storing(bench: Bench, rounds: int) -> dict[str, Any]:
    """Rates of storing, a number for each round."""
    bench.fleet.intake.store(bench.reports())
    found: dict[str, list[Any]] = {}
    for number in range(rounds):
        found.setdefault("verify a signature", []).append({"per_core": _verifying(bench, bench.reports()[:1000])})
        for batch in (256, 1024):
            found.setdefault(f"reports as before, batches of {batch}", []).append(_rates(bench, bench.reports(), batch))
        phase = Phase.FETCHING if number % 2 else Phase.WATCHING
        found.setdefault("reports that change a model, batches of 1024", []).append(
            _rates(bench, bench.reports(phase=phase), 1024)
        )
        found.setdefault("reports one by one", []).append(_rates(bench, bench.reports()[:200], 1))
        found.setdefault("telemetry, batches of 256", []).append(_rates(bench, bench.telemetry(), 256))
        for batch in (256, 1024):
            found.setdefault(f"events, batches of {batch}", []).append(_rates(bench, bench.events(), batch))
        found.setdefault("events one by one", []).append(_rates(bench, bench.events()[:200], 1))
    return found


def judging(bench: Bench) -> dict[str, Any]:
    """Milliseconds of judging after each batch of 256 while a rollout reaches everybody, and the sizes of what is shown."""
    fleet, now = bench.fleet, time.time()
    rollout = fleet.rollouts.start(SERVER, ReleaseRef(MODEL, 2)).id
    committed = Answer(release=2, outcome=Outcome.COMMITTED, at=now, rollout=rollout)
    said = [
        *list(_pieces(bench.reports(phase=Phase.FETCHING), 256))[:BATCHES],
        *list(_pieces(bench.reports(phase=Phase.WATCHING, version=2), 256))[:BATCHES],
        *list(_pieces(bench.reports(version=2, answers=(committed,)), 256))[: min(BATCHES, (len(bench.devices) - 1) // 256)],
    ]  # the last devices are waited for, so that the rollout goes on
    cpu_ms, wall_ms = [], []
    for batch in said:
        models = fleet.intake.store(batch).models
        cpu, wall = _cost(lambda models=models: fleet.judge.evaluate(models))  # type: ignore[misc]
        cpu_ms.append(1000 * cpu)
        wall_ms.append(1000 * wall)
    assert fleet.views.rollout(rollout).state == "running"
    tick, _ = _cost(fleet.judge.evaluate)
    status_cpu, _ = _cost(fleet.status.view)
    return {
        "judging_ms": cpu_ms, "judging_wall_ms": wall_ms, "tick_ms": [1000 * tick], "status_ms": [1000 * status_cpu],
        "rollout_view_bytes": [len(encode(fleet.views.rollout(rollout)))], "rollout_list_bytes": [len(encode(fleet.views.rollouts()))],
    }  # fmt: skip


@contextlib.contextmanager
def a_bench(devices: int) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="bench-ingest-") as base:
        made = Bench(Path(base), devices)
        yield made
        made.fleet.close()


def _said(values: list[float]) -> str:
    return f"{statistics.median(values):>10.1f}  ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1500, 10_000], help="sizes of the fleet that is judged")
    parser.add_argument("--rounds", type=int, default=5, help="of storing")
    parser.add_argument("--json", type=Path, help="write every number there, too")
    options = parser.parse_args()
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    found: dict[str, Any] = {}
    with a_bench(min(options.devices)) as bench:
        print(f"storing, {len(bench.devices)} devices, {options.rounds} rounds: median (least to most)")
        found["storing"] = storing(bench, options.rounds)
        for what, rounds in found["storing"].items():
            for unit in rounds[0]:
                print(f"  {what:<46}{unit:<12}{_said([one[unit] for one in rounds])}")
    for devices in options.devices:
        with a_bench(devices) as bench:
            print(f"a rollout to {devices} devices: median (least to most)")
            found[str(devices)] = judging(bench)
            for what, values in found[str(devices)].items():
                print(f"  {what:<58}{_said(values)}")
    if options.json is not None:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
