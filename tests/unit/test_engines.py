"""TensorRT engines are built by the real builder of TensorRT-RTX, which needs no GPU; what it refuses is told in words."""

from __future__ import annotations

import itertools
import json
import platform
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtimes.contract import ModelInvalid, RuntimeUnavailable
from runtimes.tensorrt import building, header
from runtimes.tensorrt.engines import Builder, Library, Limits, OverLimit, Refused, key
from runtimes.tensorrt.order import Order, Profile

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="TensorRT-RTX's libraries are on PyPI for x86-64 only"),
    pytest.mark.timeout(240),
]

EDGE_FLEET = (sys.executable, "-m", "fleet_server.cli")


def save(path, nodes, inputs, outputs, weights=(), opset=17):
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(array, name) for name, array in weights])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def tensor(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two layers, any number of rows."""
    return save(
        tmp_path_factory.mktemp("small") / "small.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        [tensor("x", ["n", 4])], [tensor("y", ["n", 3])], [("w", np.ones((4, 3), np.float32))],
    )  # fmt: skip


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    return Builder(tmp_path_factory.mktemp("engines"), Limits(120.0))


def refusal(builder, order):
    with pytest.raises(Refused) as refused:
        builder.build(order)
    return str(refused.value)


def test_an_engine_is_built_once_for_a_gpu_that_is_not_here(builder, small):
    told = []
    engine = builder.build(Order(small, "sm86", (1, 8, 32)), lambda *said: told.append(said))
    said = header.read(engine.path)
    assert (said.library, said.version, said.capabilities) == ("TensorRT-RTX", builder.library().version, ("sm86",))
    assert not engine.kept
    assert engine.seconds > 0
    assert any(phase == "Building engine" and 0 < done <= of for phase, done, of in told)
    again = builder.build(Order(small, "sm86", (1, 8, 32)), lambda *_: pytest.fail("nothing is built"))
    assert again.kept
    assert again.path == engine.path
    other = builder.build(Order(small, "sm120", (1, 8, 32)))
    assert header.read(other.path).capabilities == ("sm120",)
    everywhere = builder.build(Order(small))
    assert {"sm80", "sm86", "sm89", "sm120"} <= set(everywhere.capabilities)


def test_what_the_process_that_builds_says(small, tmp_path, capsys):
    """In this process, where what is done can be seen."""

    def said(order):
        status = building.answer(order.encoded(tmp_path / "engine"))
        return status, [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    status, lines = said(Order(small, "sm86", (1, 2, 4), {"x": Profile((1, 4), (2, 4), (3, 4))}, level=1, memory_bytes=1 << 28))
    assert (status, lines[0]["library"], lines[-1]) == (0, "TensorRT-RTX", {"built": True})
    assert all(0 <= line["done"] <= line["of"] for line in lines[1:-1])
    assert header.read(tmp_path / "engine").capabilities == ("sm86",)
    for order, words in (
        (Order(small, "sm87"), "does not build for sm87"),
        (Order(small, profiles={"x": Profile((1, 5), (1, 5), (1, 5))}), "which [1, 5] is not"),
        (Order(small, profiles={"y": Profile((1,), (1,), (1,))}), "no input 'y'"),
        (Order(quantized(tmp_path / "q.onnx", activation=np.uint8, zero_point=128, bias=False)), "zero points that are not 0"),
    ):
        status, lines = said(order)
        assert (status, words in lines[-1]["refused"]) == (1, True), lines[-1]


def test_a_damaged_engine_is_built_again(builder, small):
    order = Order(small, "sm89")
    path = builder.build(order).path
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert not builder.build(order).kept
    assert len(path.read_bytes()) == len(whole)


def test_what_an_engine_is_found_again_by(tmp_path, small):
    library = Library("TensorRT-RTX", "1.7")
    orders = [
        Order(small), Order(small, "sm86"), Order(small, batch=(1, 2, 3)), Order(small, level=3), Order(small, memory_bytes=1),
        Order(small, profiles={"x": Profile((1, 4), (2, 4), (3, 4))}),
    ]  # fmt: skip
    keys = [key(order, library) for order in orders] + [key(orders[0], Library("TensorRT-RTX", "1.8"))]
    assert len(set(keys)) == len(keys)
    copy = tmp_path / "other-name.onnx"
    copy.write_bytes(small.read_bytes())
    assert key(Order(copy), library) == keys[0]
    model = onnx.load(small)
    onnx.save(model, tmp_path / "apart.onnx", save_as_external_data=True, location="apart.bin", size_threshold=0)
    before = key(Order(tmp_path / "apart.onnx"), library)
    (tmp_path / "apart.bin").write_bytes(b"\0" * 48)
    assert key(Order(tmp_path / "apart.onnx"), library) != before
    with pytest.raises(ModelInvalid, match="cannot be read"):
        key(Order(tmp_path / "missing.onnx"), library)


def quantized(path, *, activation, zero_point, bias):
    """A convolution in QDQ."""
    signed = activation == np.int8
    zero = np.array(zero_point, activation)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"], name="x_dequantized"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"]),
    ]
    weights = [
        ("s", np.float32(0.1)), ("z", zero), ("ws", np.float32(0.1)), ("wz", np.int8(0)), ("w", np.ones((8, 8, 3, 3), np.int8)),
    ]  # fmt: skip
    given = ["xd", "wd"]
    if bias:
        nodes.append(helper.make_node("DequantizeLinear", ["b", "bs"], ["bd"], name="bias_dequantized"))
        weights += [("b", np.ones(8, np.int32)), ("bs", np.float32(0.01))]
        given.append("bd")
    nodes.append(helper.make_node("Conv", given, ["y"]))
    assert signed or activation == np.uint8
    return save(path, nodes, [tensor("x", [1, 8, 6, 6])], [tensor("y", [1, 8, 4, 4])], weights)


def test_int8_in_the_way_that_tensorrt_takes(builder, tmp_path):
    model = quantized(tmp_path / "q.onnx", activation=np.int8, zero_point=0, bias=False)
    assert builder.build(Order(model, "sm86")).capabilities == ("sm86",)


def test_int8_made_for_tensorrt_by_the_quantizer(builder, shared_models, tmp_path):
    """The way that docs/how-to/build-engines.md shows."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    images = np.load(shared_models / "datasets/digits-calib.npz")
    rows = iter(next(iter(images.values()))[:32].reshape(32, 1, 1, 8, 8).astype(np.float32))

    class Reader(CalibrationDataReader):
        def get_next(self):
            row = next(rows, None)
            return None if row is None else {"image": row}

    quantize_static(
        shared_models / "onnx/digits-v1-fp32.onnx", tmp_path / "digits-trt.onnx", Reader(), quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    )  # fmt: skip
    assert builder.build(Order(tmp_path / "digits-trt.onnx", "sm86", (1, 8, 32))).capabilities == ("sm86",)


@pytest.mark.parametrize(
    ("activation", "zero_point", "bias", "words"),
    [
        (np.int8, 0, True, ("'bias_dequantized' (node", "Int32", "its bias is quantized", "leave the bias in float")),
        (np.int8, 3, False, ("zero points that are not 0", "symmetric int8")),
        (np.uint8, 128, False, ("uint8", "signed, symmetric int8")),
    ],
)
def test_int8_in_other_ways_is_refused_with_what_to_change(builder, tmp_path, activation, zero_point, bias, words):
    model = quantized(tmp_path / "q.onnx", activation=activation, zero_point=zero_point, bias=bias)
    said = refusal(builder, Order(model, "sm86"))
    assert all(word.lower() in said.lower() for word in words), said
    assert not any(noise in said for noise in (".cpp", "Error Code", "cudaError", str(tmp_path))), said


def test_operators_of_onnx_runtime_are_refused_by_name(builder, shared_models):
    said = refusal(builder, Order(shared_models / "onnx/digits-v1-int8-qop.onnx", "sm86"))
    assert "QLinearConv (node 1) is not supported" in said
    assert "more nodes" in said
    assert "save it with QuantizeLinear and DequantizeLinear (QDQ)" in said


def test_control_flow_is_refused(builder, shared_models):
    assert "without control flow" in refusal(builder, Order(shared_models / "onnx/silero_vad_16k_op15.onnx", "sm86"))


def test_a_gpu_without_kernels_for_the_model_is_refused_and_others_are_built(shared_models, tmp_path):
    model = shared_models / "onnx/digits-v1-fp32.onnx"
    done = subprocess.run(
        [*EDGE_FLEET, "build", model, "--for", "sm75,sm86", "--out", tmp_path, "--cache", tmp_path / "cache"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "sm75: refused: TensorRT cannot build it: Cannot compile operation" in done.stderr
    assert "export the model in FP16" in done.stderr
    assert "sm86: " in done.stdout
    assert (tmp_path / "digits-v1-fp32.sm86.engine").is_file()
    assert not (tmp_path / "digits-v1-fp32.sm75.engine").exists()


def test_what_does_not_fit_the_model_is_refused(builder, small, tmp_path):
    assert "does not build for sm87; it does for sm75, sm80" in refusal(builder, Order(small, "sm87"))
    nobody = {"nobody": Profile((1, 4), (1, 4), (1, 4))}
    assert "no input 'nobody' has a free size; those that have: x" in refusal(builder, Order(small, profiles=nobody))
    wide = {"x": Profile((1, 5), (1, 5), (1, 5))}
    assert "input 'x' has shape [-1, 4], which [1, 5] is not" in refusal(builder, Order(small, profiles=wide))
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"# not a model" * 100)
    assert "Failed to parse the ONNX model" in refusal(builder, Order(garbage, "sm86"))


@pytest.mark.parametrize("profile", [((2,), (1,), (3,)), ((0,), (1,), (3,)), ((1, 1), (1,), (3,))])
def test_profiles_that_no_engine_can_have(profile):
    with pytest.raises(ValueError, match="shapes"):
        Profile(*profile)


def test_a_build_that_takes_too_long_or_too_much_is_ended(tmp_path, small):
    with pytest.raises(OverLimit, match="took longer than 0 s"):
        Builder(tmp_path, Limits(0.05)).build(Order(small, "sm86"))
    with pytest.raises(OverLimit, match="took more than 1 MB of memory"):
        Builder(tmp_path, Limits(60.0, 1_000_000)).build(Order(small, "sm86"))
    cancelled = Builder(tmp_path, Limits(60.0))
    threading.Timer(0.1, cancelled.cancel).start()
    with pytest.raises(OverLimit, match="cancelled"):
        _build_for_ever(cancelled, small)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def _build_for_ever(builder, model):
    for number in itertools.count(1):
        builder.build(Order(model, "sm86", (number, number, number)))


def test_a_library_that_ends_its_process_is_told(tmp_path, monkeypatch):
    (tmp_path / "tensorrt.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeUnavailable, match="ended its process"):
        Builder(tmp_path).library()


def test_no_library_is_told_with_what_to_install(tmp_path, monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError('no such module')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeUnavailable, match=r"no TensorRT library .* pip install 'edge-inference-agent\[tensorrt-rtx\]'"):
        Builder(tmp_path).library()


@pytest.mark.long
def test_a_build_that_is_killed_goes_on_where_it_was(tmp_path, small):
    """Ten times at a random moment; whatever has an engine's name is one, and what was finished is not built again."""
    rng, cache = random.Random(7), tmp_path / "cache"
    command = [
        *EDGE_FLEET,
        "build",
        small,
        "--for",
        "sm80,sm86,sm89,sm120",
        "--out",
        tmp_path / "out",
        "--cache",
        cache,
        "--json",
    ]
    done = set()
    for _ in range(10):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.2, 2.5))
        child.send_signal(signal.SIGKILL)
        child.wait()
        now = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.engine")} if cache.exists() else {}
        for name in now:
            header.read(cache / name)
        assert done <= set(now.items()), "an engine was built again"
        done = set(now.items())
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert [one["for"] for one in found] == ["sm80", "sm86", "sm89", "sm120"]
    assert sum(one["kept"] for one in found) == len(done)
    assert all(header.read(Path(one["file"])).capabilities == (one["for"],) for one in found)
    assert not [path for path in cache.iterdir() if path.name.startswith(".")], "nothing unfinished is left"
    again = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert all(one["kept"] for one in again)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--for", "ampere"), "'ampere' is not a compute capability"),
        (("--batch", "1,2"), "neither one size nor three"),
        (("--batch", "4,2,1"), "grow from the least to the most"),
        (("--size", "1x2"), "is not INPUT=LEAST,USUAL,MOST"),
        (("--memory", "much"), "is not a size"),
    ],
)
def test_options_that_mean_nothing(small, options, words):
    done = subprocess.run([*EDGE_FLEET, "build", small, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert words in done.stderr


def test_headers_that_lie_or_are_cut_off(builder, small, tmp_path):
    whole = builder.build(Order(small, "sm86")).path.read_bytes()
    file = tmp_path / "x.engine"
    for length in (*range(header.HEADER_BYTES + 8), len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelInvalid, match=r"cut off|not a TensorRT engine|is empty"):
            header.read(file)
    for offset in (16, 20):  # the size, little and huge
        lying = bytearray(whole)
        lying[offset : offset + 4] = b"\xff\xff\xff\xff"
        file.write_bytes(lying)
        with pytest.raises(ModelInvalid, match=r"its header says [0-9]+ bytes"):
            header.read(file)
    file.write_bytes(whole[:28] + b"rubb" + whole[32:])
    with pytest.raises(ModelInvalid, match="damaged header"):
        header.read(file)
    file.write_bytes(b"ftrt" + struct.pack("<I", 1))
    assert header.read(file).library == "TensorRT"
    file.write_bytes(small.read_bytes())
    with pytest.raises(ModelInvalid, match="not a TensorRT engine"):
        header.read(file)
