"""Which variant of a release fits this device, and which of its files are needed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from agent.contract.fitting import needed_files, satisfies
from agent.contract.manifest import ReleaseManifest, Requires, Variant
from agent.contract.reasons import Reason
from agent.contract.reports import (
    Hardware,
)
from agent.sync.gates.variants import choose
from agent.sync.problems import Problem
from tests.sync.fleet import script_release

PI = Hardware(arch="aarch64", memory_bytes=1 << 30, runtimes={"tflite": "ai-edge-litert 2.3.0"})
JETSON = Hardware(
    arch="arm64",
    memory_bytes=8 << 30,
    accelerator="cuda",
    runtimes={"onnx": "onnxruntime 1.31.1", "tensorrt": "tensorrt 10.3.0"},
)


@pytest.fixture
def manifest(tmp_path: Path) -> ReleaseManifest:
    manifest, _ = script_release(tmp_path / "r", 1, "scale 1", expect=1.0)
    script = manifest.files["model.script"]
    variants = (
        Variant(name="engine", runtime="tensorrt", file="a.plan", requires=Requires(arch=("aarch64",), accelerator="cuda", runtime_version="~10")),
        Variant(name="engine10", runtime="tensorrt", file="b.plan", requires=Requires(arch=("aarch64",), accelerator="cuda", runtime_version=">=10,<11")),
        Variant(name="big", runtime="tflite", file="c.tflite", requires=Requires(memory_bytes=4 << 30)),
        Variant(name="small", runtime="tflite", file="d.tflite"),
    )  # fmt: skip
    files = {**manifest.files, **dict.fromkeys(("a.plan", "b.plan", "c.tflite", "d.tflite"), script)}
    return msgspec.structs.replace(manifest, variants=variants, files=files)


def test_the_first_variant_that_fits(manifest: ReleaseManifest):
    assert choose(manifest, JETSON).name == "engine10", "a demand that cannot be read is not met"
    assert choose(manifest, PI).name == "small"


def test_no_variant_says_why_for_each(manifest: ReleaseManifest):
    with pytest.raises(Problem) as caught:
        choose(manifest, Hardware(arch="riscv64", runtimes={"tensorrt": "tensorrt 10.3"}))

    assert caught.value.reason is Reason.NO_VARIANT
    assert "'engine10': needs aarch64, this is riscv64" in caught.value.message
    assert "'small': runtime 'tflite' does not work here (working: tensorrt)" in caught.value.message


def test_only_the_files_of_the_chosen_variant_are_needed(manifest: ReleaseManifest):
    assert needed_files(manifest, manifest.variant("small")) == {"d.tflite", "model.script", "in.npz", "out.npz"}


def test_all_files_of_the_chosen_variant_are_needed_and_none_of_the_others(manifest: ReleaseManifest):
    extra = ("a.data", "b.data", "shared.data", "a.so", "b.so")
    variants = (
        Variant(name="a", runtime="script", file="a.plan", data={"w": "a.data", "v": "shared.data"}, libraries=("a.so",)),
        Variant(name="b", runtime="script", file="b.plan", data={"w": "b.data", "v": "shared.data"}, libraries=("b.so",)),
    )
    files = {**manifest.files, **dict.fromkeys(extra, manifest.files["a.plan"])}
    for unused in ("c.tflite", "d.tflite", "model.script"):
        del files[unused]
    several = msgspec.structs.replace(manifest, variants=variants, files=files)
    assert needed_files(several, variants[0]) == {"a.plan", "a.data", "shared.data", "a.so", "in.npz", "out.npz"}


@pytest.mark.parametrize(
    ("version", "demand", "met"),
    [
        ("onnxruntime 1.31.1", ">=1.20", True), ("onnxruntime 1.9.0", ">=1.20", False), ("x 2.3.0", ">=2,<3", True),
        ("x 3.0", ">=2,<3", False), ("x 1.2.9", "==1.2", True), ("x 1.3.0", "1.2", False), ("x 2", ">1.9.9", True),
        ("x 1.0", ">=banana", False), ("unknown", ">=0", True), ("unknown", ">0", False),
    ],
)  # fmt: skip
def test_version_demands(version, demand, met):
    assert satisfies(version, demand) is met
