"""Downloads beside what they cannot beat: reading, hashing, writing and syncing the same bytes on the same disk.

A fleet server and its broker as the demo runs them, on the loopback, and an enrolled device's downloader in this process. Reported are the
time of a large file as a multiple of the floor in the same round, the bytes that a new release costs whose head alone changed, and the bytes
that a download asks for again after it was cut off.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/demo"))

from device import Device
from fleet import Fleet
from processes import processes

from agent.contract.codec import encode
from agent.contract.manifest import File, ReleaseManifest, Variant
from agent.host.clock import SystemClock
from agent.host.priority import in_background
from agent.store import Store
from agent.sync import identity
from agent.sync.fetching.downloader import Downloader
from agent.sync.fetching.https import HttpBlobs
from agent.sync.fetching.mqtt import MqttBlobs, Transfers
from agent.sync.fleet.link import Broker, Link, tls_context
from agent.sync.fleet.outbox import Outbox
from agent.sync.http import FleetHttp
from agent.sync.problems import Stopped
from fleet_server.releases import blocks

LARGE_BYTES = 100_000_000
COPY_BYTES = 1 << 20
CLASSES = 1001
COLLECTION = Path(__file__).parents[2] / "shared/models/onnx"


class Counting(HttpBlobs):
    """Notes the stretches that were asked for."""

    def __init__(self, connect: Callable[[], FleetHttp]) -> None:
        super().__init__(connect)
        self.asked = 0

    @contextmanager
    def open(self, sha256: str) -> Iterator[Any]:
        with super().open(sha256) as read:

            def counted(start: int, end: int) -> Any:
                self.asked += end - start
                return read(start, end)

            yield counted


class Bench:
    """A running fleet, an enrolled device, and a store for each measurement."""

    def __init__(self, folder: Path, fleet: Fleet, device: Device) -> None:
        self.folder, self.fleet = folder, fleet
        self.who = who = identity.load(device.folder / "identity")
        clock = SystemClock()
        self.clock = clock
        self.connect = lambda: FleetHttp(
            who.address.device_url, clock, ca=who.ca_file, certificate=who.certificate_file, key=who.key_file
        )
        self._stores = 0

    def publish(self, model: str, version: int, path: Path) -> File:
        release = self.folder / "release.yaml"
        variant = {"name": "cpu", "runtime": "onnx", "file": "model"}
        release.write_text(
            yaml.safe_dump({"model": model, "version": version, "files": {"model": str(path)}, "variants": [variant]})
        )
        self.fleet.publish(release)
        return blocks.describe(path)

    def store(self) -> Store:
        self._stores += 1
        return Store.create(self.folder / f"store-{self._stores}")

    def downloads(self, store: Store) -> tuple[Downloader, Counting]:
        source = Counting(self.connect)
        return Downloader(store, [source], self.clock, reserve_bytes=0, min_bytes_per_s=1), source


def keep(store: Store, file: File, path: Path) -> None:
    """A release in the store whose file is at `path`."""
    store.blob(file.sha256).write_bytes(path.read_bytes())
    manifest = ReleaseManifest(
        model="m", version=1, files={"model": file}, variants=(Variant(name="cpu", runtime="onnx", file="model"),)
    )
    store.write_manifest(encode(manifest))


def floor_s(path: Path, target: Path) -> float:
    """Reads, hashes, writes and syncs."""
    began = time.perf_counter()
    digest, buffer = hashlib.sha256(), bytearray(COPY_BYTES)
    with path.open("rb", buffering=0) as source, target.open("wb", buffering=0) as out:
        while count := source.readinto(buffer):
            view = memoryview(buffer)[:count]
            digest.update(view)
            out.write(view)
        os.fsync(out.fileno())
    took = time.perf_counter() - began
    target.unlink()
    return took


def large(bench: Bench, repeats: int, size: int) -> dict[str, list[float]]:
    path = bench.folder / "large"
    path.write_bytes(random.Random(1).randbytes(size))
    file = bench.publish("large", 1, path)
    found: dict[str, list[float]] = {"floor_s": [], "fetch_s": [], "ratio": []}
    for _ in range(repeats):
        os.sync()
        in_background(lambda: found["floor_s"].append(floor_s(path, bench.folder / "copy")))  # where downloads run, too
        store = bench.store()
        downloads, _source = bench.downloads(store)
        os.sync()
        began = time.perf_counter()
        downloads.fetch(file, lambda _: None, lambda: False)
        found["fetch_s"].append(time.perf_counter() - began)
        found["ratio"].append(found["fetch_s"][-1] / found["floor_s"][-1])
        store.blob(file.sha256).unlink()
    return found


def heads(bench: Bench, folder: Path) -> dict[str, dict[str, float]]:
    """A release whose classifier was trained anew (all its weights, biases and their scales), beside the one before it in the store."""
    found = {}
    for number, path in enumerate(sorted(folder.glob("mobilenet*.onnx"))):
        changed = bench.folder / "changed"
        changed_bytes = retrain(path, changed)
        store = bench.store()
        keep(store, blocks.describe(path), path)
        file = bench.publish(f"head-{number}", 2, changed)
        downloads, source = bench.downloads(store)
        downloads.fetch(file, lambda _: None, lambda: False)
        found[path.name] = {
            "file": file.size_bytes, "changed": changed_bytes, "fetched": source.asked, "ratio": source.asked / changed_bytes,
            "manifest_blocks": len(file.blocks),
        }  # fmt: skip
    return found


def retrain(path: Path, target: Path) -> int:
    """Writes the model with other numbers for its 1001 classes; the bytes of the tensors that changed."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model, count, random_numbers = onnx.load(path), 0, np.random.default_rng(1)
    for tensor in model.graph.initializer:
        if CLASSES in tensor.dims:
            before = numpy_helper.to_array(tensor)
            after = random_numbers.integers(0, 256, before.nbytes, np.uint8).view(before.dtype).reshape(before.shape)
            tensor.CopyFrom(numpy_helper.from_array(after, tensor.name))
            count += after.nbytes
    last = [node for node in model.graph.node if node.op_type == "DequantizeLinear"][-1]
    for tensor in model.graph.initializer:
        if tensor.name == last.input[1]:
            after = numpy_helper.to_array(tensor) * np.float32(1.01)
            tensor.CopyFrom(numpy_helper.from_array(after, tensor.name))
            count += after.nbytes
    target.write_bytes(model.SerializeToString())
    return count


def resumed(bench: Bench, size: int, cuts: int) -> dict[str, Any]:
    """Bytes asked for beyond the file's own, for downloads that were stopped somewhere in the middle."""
    path = bench.folder / "large"
    file = blocks.describe(path)
    again = []
    for number in range(cuts):
        store = bench.store()
        downloads, source = bench.downloads(store)
        end = int(size * (number + 0.5) / cuts)
        seen = [0]
        try:
            downloads.fetch(file, seen.append, lambda seen=seen, end=end: seen[-1] >= end)  # type: ignore[misc]
        except Stopped:
            source.asked = seen[-1]
        downloads.fetch(file, lambda _: None, lambda: False)
        again.append(source.asked - size)
        store.blob(file.sha256).unlink()
    return {"again": again, "largest_block": max(block.size_bytes for block in file.blocks)}


def brokered(bench: Bench, repeats: int, size: int) -> dict[str, list[float]]:
    """Bytes per second of a file over the broker's port alone, and over HTTPS in the same round."""
    path = bench.folder / "brokered"
    path.write_bytes(random.Random(2).randbytes(size))
    file = bench.publish("brokered", 1, path)
    found: dict[str, list[float]] = {"mqtt": [], "https": [], "ratio": []}
    with linked(bench) as transfers:
        for _ in range(repeats):
            for name, source in (("https", HttpBlobs(bench.connect)), ("mqtt", MqttBlobs(transfers))):
                store = bench.store()
                downloads = Downloader(store, [source], bench.clock, reserve_bytes=0, min_bytes_per_s=1)
                began = time.perf_counter()
                downloads.fetch(file, lambda _: None, lambda: False)
                found[name].append(size / 1e6 / (time.perf_counter() - began))
                store.blob(file.sha256).unlink()
            found["ratio"].append(found["mqtt"][-1] / found["https"][-1])
    return found


@contextmanager
def linked(bench: Bench) -> Iterator[Transfers]:
    who = bench.who
    link = Link(
        who.device,
        Broker(
            who.address.broker_host,
            who.address.broker_port,
            lambda: tls_context(str(who.ca_file), str(who.certificate_file), str(who.key_file)),
        ),
        Outbox(bench.folder / "outbox.db"),
        lambda: 1,
        on_poke=lambda: None,
    )
    transfers = Transfers(link.ask, lambda: link.connected)
    link.on_blocks, link.busy = transfers.received, lambda: transfers.active
    link.start()
    try:
        while not link.connected:
            time.sleep(0.05)
        yield transfers
    finally:
        link.stop()
        link.outbox.close()  # type: ignore[attr-defined]


@contextmanager
def running(folder: Path) -> Iterator[Bench]:
    environment = {"EDGE_FLEET_PROFILE": str(folder / "profile.yaml"), "PYTHONUNBUFFERED": "1"}
    with processes(folder / "logs", environment) as started:
        fleet, device = Fleet(folder, started, lambda _: None, lambda: None), Device("press-1", folder, started)
        fleet.init()
        fleet.serve()
        device.prepare()
        device.enrol(fleet.run("token", "create", "--device", device.name, quiet=True).strip())
        yield Bench(folder, fleet, device)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fetching", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few and small: to see that it runs")
    parser.add_argument("--models", type=Path, default=COLLECTION, help="a folder with mobilenet*.onnx")
    options = parser.parse_args()
    repeats, size = (2, 10_000_000) if options.quick else (7, LARGE_BYTES)
    with tempfile.TemporaryDirectory(prefix="edge-fetch-") as name, running(Path(name)) as bench:
        found = large(bench, repeats, size)
        print(
            f"{size / 1e6:.0f} MB over HTTPS on the loopback: {spread(found['fetch_s'])} s; reading, hashing, writing and syncing them: "
            f"{spread(found['floor_s'])} s; ratio {spread(found['ratio'])}"
        )
        for model, row in heads(bench, options.models).items():
            print(
                f"{model}: {row['file']:.0f} bytes in {row['manifest_blocks']:.0f} blocks, {row['changed']:.0f} changed, "
                f"{row['fetched']:.0f} fetched: {row['ratio']:.3f}"
            )
        slow = brokered(bench, min(3, repeats), size // 2)
        print(
            f"{size / 2e6:.0f} MB over the broker's port alone: {spread(slow['mqtt'])} MB/s, over HTTPS {spread(slow['https'])} MB/s; "
            f"ratio {spread(slow['ratio'])}"
        )
        cut = resumed(bench, size, 5)
        print(f"cut off and resumed: {cut['again']} bytes asked for again; the largest block has {cut['largest_block']}")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
