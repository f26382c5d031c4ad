"""A model file cut at any place is refused; the process that tried lives on."""

import subprocess
import sys

import pytest

from tests.serving import onnx_models

CHILD = """
import sys
from pathlib import Path
import numpy as np
from runtimes import registry
from runtimes.contract import LoadOptions, ModelInvalid
whole, cut = Path(sys.argv[1]), Path(sys.argv[2])
data = whole.read_bytes()
runtime = registry.for_file(whole)
def answer(model):
    rng = np.random.default_rng(1)
    shapes = {s.name: [1 if n == -1 else n for n in s.shape] for s in model.inputs}
    feeds = {s.name: rng.integers(0, 100, shapes[s.name]).astype(s.dtype) for s in model.inputs}
    return [a.tobytes() for a in model.run(feeds)]
model = runtime.load(whole, LoadOptions())
expected = answer(model) if whole.suffix == ".tflite" else None
model.close()
cuts = sorted({len(data) * k // 40 for k in range(40)} | {1, 7, 8, 9, len(data) - 1})
loaded = []
for at in cuts:
    cut.write_bytes(data[:at])
    try:
        model = runtime.load(cut, LoadOptions())
    except ModelInvalid as error:
        assert cut.name in str(error), error
        continue
    loaded.append(at)
    assert answer(model) == expected, f"cut at {at} it gives other answers"
    model.close()
print(len(cuts), loaded)
"""


def attempts(whole, cut):
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(whole), str(cut)], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    count, loaded = run.stdout.split(" ", 1)
    assert int(count) >= 40
    return loaded.strip()


def test_a_model_made_here(tmp_path):
    whole = onnx_models.slow(tmp_path / "m.onnx", side=100)
    assert attempts(whole, tmp_path / "cut.onnx") == "[]"


@pytest.mark.shared
@pytest.mark.parametrize("name", ["onnx/digits-v2-int8-qdq.onnx", "onnx/silero_vad_16k_op15.onnx", "onnx/digits-v1-fp32.onnx"])
def test_onnx(shared_models, tmp_path, name):
    assert attempts(shared_models / name, tmp_path / "cut.onnx") == "[]"


@pytest.mark.shared
@pytest.mark.parametrize("name", ["digits-v2-int8", "trained_lstm_int8", "mobilenet_v1_0.25_128_quant"])
def test_tflite(shared_models, tmp_path, name):
    loaded = attempts(shared_models / f"tflite/{name}.tflite", tmp_path / "cut.tflite")
    if name != "mobilenet_v1_0.25_128_quant":  # its last bytes are used by nothing: without them it is the same model
        assert loaded == "[]"
