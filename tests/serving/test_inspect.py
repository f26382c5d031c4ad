"""`edge-agent inspect` on real files, good and bad."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from onnx import TensorProto

from tests.serving import onnx_models, tflite_models

DIGITS = Path(__file__).resolve().parents[2] / "examples/digits/models"


def inspect(*words):
    return subprocess.run(
        [sys.executable, "-m", "agent.cli", "inspect", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def document(file):
    done = inspect(file, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def quantized(suffix):
    return next(path for path in sorted(DIGITS.glob(f"*int8*{suffix}")) if "v2" in path.name)


@pytest.mark.parametrize("suffix", [".onnx", ".tflite"])
def test_a_model_is_described(suffix):
    found = document(quantized(suffix))
    assert [tensor["name"] for tensor in found["inputs"]]
    assert all({"name", "datatype", "shape"} <= set(tensor) for tensor in (*found["inputs"], *found["outputs"]))
    assert sum(found["operators"].values()) > 3
    assert sum(found["providers"].values()) == sum(found["operators"].values())
    assert found["load_ms"] > 0
    assert found["run_on_zeros_ms"] > 0
    assert 0 < found["memory_bytes"] < 2**30


def test_quantization_is_told():
    found = document(quantized(".tflite"))
    assert len(found["inputs"][0]["quantization"]["scales"]) == 1


def test_signatures_and_what_is_left_open_are_told(tmp_path):
    path = tflite_models.coder(tmp_path / "coder.tflite")
    found = document(path)
    assert {name: [t["name"] for t in s["inputs"]] for name, s in found["signatures"].items()} == {
        "encode": ["x"],
        "decode": ["b", "a"],
    }
    shown = " ".join(inspect(path).stdout.split())
    assert "signature encode (default): x FP32 any × 2 → y FP32 any × 2" in shown
    assert "decode: b FP32 3, a FP32 3 → sum FP32 3, difference FP32 3" in shown
    optional = onnx_models.scale_by_default(tmp_path / "optional.onnx", 2.0)
    assert [tensor.get("optional", False) for tensor in document(optional)["inputs"]] == [False, True]
    assert "optional input" in inspect(optional).stdout
    assert "any shape" in inspect(onnx_models.identity(tmp_path / "any.onnx", TensorProto.FLOAT, None)).stdout
    assert document(tflite_models.windows(tmp_path / "windows.tflite"))["inputs"][0]["shape"] == [-1, -1]


def test_people_get_a_table():
    done = inspect(quantized(".onnx"))
    assert done.returncode == 0
    for word in ("input", "output", "operators", "provider   CPU takes", "one run"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("cut.onnx", b"\x08\x07\x12\x04only", "is not a model that onnxruntime"),
        ("empty.tflite", b"", "is not a TFLite model"),
        ("model.bin", b"x", "no runtime takes files ending in '.bin'"),
    ],
)
def test_a_file_that_is_no_model_says_why(tmp_path, name, data, words):
    path = tmp_path / name
    path.write_bytes(data)
    done = inspect(path)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_engine_that_dies_takes_only_the_child_with_it(tmp_path, monkeypatch):
    """A runtime that ends its process as a crashing engine does."""
    (tmp_path / "crash_runtime.py").write_text(
        "import os, signal\n"
        "class Crash:\n"
        "    contract_version, name, suffixes = 1, 'crash', ('.crash',)\n"
        "    def version(self): return 'crash 1'\n"
        "    def load(self, path, options): os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    metadata = tmp_path / "crash_runtime-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: crash-runtime\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[edge_agent.runtimes]\ncrash = crash_runtime:Crash\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = tmp_path / "model.crash"
    path.write_bytes(b"x")
    done = inspect(path)
    assert done.returncode == 1
    assert "loading it kills the process (SIGSEGV)" in done.stderr


# -- what is inside -------------------------------------------------------------------------------------------------------------------


def test_weights_and_operators_are_counted_wherever_they_are(tmp_path):
    """In other files, in constants, in the bodies of If and Loop."""
    found = document(onnx_models.scattered(tmp_path / "m/model.onnx", (1, 2, 4)))
    assert found["weights_bytes"] == 3 * 2 * 4 + 4
    assert found["operators"] == {"Mul": 3, "Add": 2, "Constant": 1, "GreaterOrEqual": 1, "If": 1, "Neg": 1, "ReduceMax": 1}
    assert found["other_files"] == dict.fromkeys(onnx_models.SCATTERED, 72)
    assert found["size_bytes"] == (tmp_path / "m/model.onnx").stat().st_size + 3 * 72
    assert "with       sub/body.bin, 72 B" in inspect(tmp_path / "m/model.onnx").stdout
    looping = document(onnx_models.loops(tmp_path / "loops.onnx"))
    assert (looping["operators"], looping["weights_bytes"]) == ({"Add": 1, "Greater": 1, "Loop": 1}, 4 + 4 + 1)
    assert document(onnx_models.trees(tmp_path / "trees.onnx", 50))["weights_bytes"] > 50 * 4
    counting = document(tflite_models.counts(tmp_path / "counts.tflite", "constant"))
    assert (counting["operators"], counting["weights_bytes"]) == ({"ADD": 1, "LESS": 1, "WHILE": 1}, 3 * 4)
    assert document(tflite_models.reshaped(tmp_path / "t.tflite", tflite_models.FLOAT, [4], [2, 2]))["weights_bytes"] == 8


def test_what_a_request_could_do_is_told(tmp_path):
    found = document(onnx_models.loops(tmp_path / "loops.onnx"))
    assert len(found["hazards"]) == 1
    assert f"isolated   {found['hazards'][0]}" in " ".join(inspect(tmp_path / "loops.onnx").stdout.split()).replace(
        "isolated ", "isolated   "
    )
    assert document(quantized(".onnx"))["hazards"] == []


def test_why_zeros_do_not_run_and_what_is_not_served_are_told(tmp_path):
    path = onnx_models.crops(tmp_path / "crops.onnx")
    found = document(path)
    assert found["run_on_zeros_ms"] is None
    assert "Reshape" in found["run_problem"]
    assert f"not possible on zeros ({found['run_problem']})" in " ".join(inspect(path).stdout.split())


@pytest.mark.parametrize(
    ("build", "goes_on", "words"),
    [
        ("kills_at_load", None, "loading it kills the process (SIGFPE)"),
        ("loops", "zeros", "a run on zeros was not done within 4 s"),
    ],
)
def test_what_hangs_or_kills_is_told_with_what_the_file_says(tmp_path, build, goes_on, words):
    if build == "kills_at_load" and platform.machine() != "x86_64":
        words = ""  # only x86 ends a process that divides so
    path = getattr(onnx_models, build)(tmp_path / "m.onnx", *([goes_on] if goes_on else []))
    done = inspect(path, "--timeout", "4", "--json")
    found = json.loads(done.stdout)
    if words:
        assert done.returncode == 1
        assert words in done.stderr
        assert found["problem"] in done.stderr
    assert found["operators"]
    assert found["weights_bytes"] > 0
    assert ("inputs" in found) == ("a run" in words or not words)
