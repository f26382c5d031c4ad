"""A model that is several files, all the way with the real programs: built, fetched, tried, served, isolated, rolled back, mended."""

from __future__ import annotations

import json

import numpy as np
import pytest

from agent.client import Client
from agent.store import hash_file
from agent.sync.updating.journal import Journal
from fleet_server.releases.builder import build
from tests.serving import onnx_models
from tests.sync.conftest import eventually
from tests.sync.test_process import MODEL
from tests.sync.with_serve.conftest import Real, X

PADDING = 300_000
pytestmark = pytest.mark.timeout(90)


def offer(device: Real, version: int, factors: tuple[float, ...], *, expect: float | None = None, width: int = 2, **settings):
    """As a publisher does it: a folder with the model, the files beside it and below, and a description that names the model only."""
    folder = device.folder / f"release-{version}"
    onnx_models.scattered(folder / "model.onnx", factors, width=width)
    for location in onnx_models.SCATTERED:  # weights of some size, of which a release changes the first few
        with (folder / location).open("ab") as file:
            file.write(np.random.default_rng(len(location)).bytes(PADDING))
    x = np.ones((1, width), np.float32)
    np.savez(folder / "in.npz", x=x)
    np.savez(folder / "out.npz", y=x * np.float32(sum(factors) if expect is None else expect))
    case = {"name": "truth", "inputs": "in.npz", "expected": "out.npz", "compare": {"y": {"kind": "close", "rtol": 0.001}}}
    watch = settings.pop("watch", {"duration_s": 0.2})
    description = {
        "model": MODEL,
        "version": version,
        "variants": [{"name": "cpu", "runtime": "onnx", "file": "model.onnx", **settings}],
        "acceptance": {"golden": [case], "watch": watch},
    }
    (folder / "RELEASE.yaml").write_text(json.dumps(description))
    built = build(folder / "RELEASE.yaml")
    device.repository.publish(built.manifest, {name: path.read_bytes() for name, path in built.paths.items()})
    device.repository.assign(MODEL, version)
    return built.manifest


def factor(device: Real) -> float:
    with Client(device.socket) as client:
        return float(client.infer(MODEL, {"x": X})["y"][0, 0])


def served(device: Real) -> dict:
    with Client(device.socket) as client:
        status = client.status()["models"][MODEL]
        return status["versions"][str(status["active"])]


def serves_at_rest(device: Real, version: int) -> None:
    eventually(lambda: device.serves_at_rest(version), f"release {version}", 30)


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_all_the_way(device: Real, isolation: str):
    apart = {"serving": {"isolation": isolation}}
    first = offer(device, 1, (1, 2, 4), **apart)
    device.start()
    serves_at_rest(device, 1)
    assert factor(device) == 7
    assert served(device)["sha256"] == first.model_sha256(first.variants[0])

    second = offer(device, 2, (1, 2, 8), **apart)  # the model itself is the same, byte for byte
    assert first.files["model.onnx"] == second.files["model.onnx"]
    serves_at_rest(device, 2)
    journal = Journal(device.store.private / "journal").entries(MODEL)
    fetched = next(entry.evidence for entry in reversed(journal) if entry.gate == "fetch" and entry.release == 2)
    brought = sum(float(count) for name, count in fetched.items() if name.startswith("from "))
    assert 0 < brought < 50_000, "of the file that changed, only the block with the change is fetched"
    assert float(fetched["already_here_bytes"]) > 3 * PADDING - 50_000
    assert factor(device) == 11
    assert served(device)["sha256"] == second.model_sha256(second.variants[0]) != first.model_sha256(first.variants[0])

    offer(device, 3, (1, 2, 16), expect=7.0, **apart)
    eventually(lambda: device.answer()["release"] == 3, "the refusal", 30)
    assert device.answer()["reason"] == "golden_mismatch"
    assert factor(device) == 11

    device.repository.assign(MODEL, 1)
    serves_at_rest(device, 1)
    assert factor(device) == 7
    kept = {file.sha256 for manifest in (first, second) for file in manifest.files.values()}
    assert all(hash_file(device.store.blob(sha256)) == sha256 for sha256 in kept)


def test_one_that_is_rolled_back_leaves_all_files_of_the_one_before(device: Real):
    offer(device, 1, (1, 2, 4))
    device.start()
    serves_at_rest(device, 1)
    offer(device, 2, (3, 2, 8), watch={"duration_s": 60.0, "max_crashes": 0})
    eventually(lambda: device.phase() == "watching", "the watch", 30)
    device.real.kill()
    device.real.start()
    eventually(lambda: device.phase() == "quarantined", "the rollback", 30)
    assert device.answer()["outcome"] == "rolled_back"
    eventually(lambda: device.active == 1, "release 1", 30)
    assert factor(device) == 7


def test_a_data_file_that_was_damaged_is_not_served_and_is_fetched_again(device: Real):
    manifest = offer(device, 1, (1, 2, 4))
    device.start()
    serves_at_rest(device, 1)
    device.kill()
    device.real.stop()
    damaged = device.store.file(manifest, "weights.bin")
    damaged.write_bytes(bytes(damaged.stat().st_size))
    sound = device.store.file(manifest, "model.onnx").stat().st_ino
    device.real.start()
    assert device.active is None
    device.start()
    eventually(lambda: device.active == 1, "the repair", 30)
    assert factor(device) == 7
    assert device.store.file(manifest, "model.onnx").stat().st_ino == sound, "what was sound was not fetched again"
