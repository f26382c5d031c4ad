"""The runtimes through their contract, on models made here."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from runtimes import onnx as onnx_runtime
from runtimes import registry
from runtimes.contract import InputInvalid, LoadOptions, ModelInvalid, Quantization, RuntimeUnavailable
from runtimes.onnx_graph import read_quantization
from tests.serving import onnx_models
from tests.serving.onnx_models import save, value


def load(path, **extra):
    return registry.for_file(path).load(path, LoadOptions(extra=extra))


@pytest.mark.parametrize(
    ("kind", "array"),
    [
        (TensorProto.BOOL, np.array([True, False])),
        (TensorProto.FLOAT16, np.array([1.5, -2], np.float16)),
        (TensorProto.UINT16, np.array([65535], np.uint16)),
        (TensorProto.DOUBLE, np.array([1e300])),
        (TensorProto.STRING, np.array([b"a", "é".encode()], np.object_)),
    ],
)
def test_every_kind_of_tensor_goes_through(tmp_path, kind, array):
    model = load(onnx_models.identity(tmp_path / "m.onnx", kind))
    assert model.inputs[0].dtype == array.dtype
    assert model.inputs[0].shape == (-1,)
    (result,) = model.run({"x": array})
    assert result.tolist() == array.tolist()
    model.close()


def test_bf16_crosses_as_its_bits(tmp_path):
    """Every bit pattern, NaNs and infinities too, as the engine sees it and back."""
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT)]
    outputs = [value("y", TensorProto.BFLOAT16, ["n"]), value("f", TensorProto.FLOAT, ["n"])]
    model = load(save(tmp_path / "m.onnx", nodes, [value("x", TensorProto.BFLOAT16, ["n"])], outputs))
    assert [t.datatype for t in (*model.inputs, *model.outputs)] == ["BF16", "BF16", "FP32"]
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    same, floats = model.run({"x": bits})
    assert (same.dtype, np.array_equal(same, bits)) == (np.uint16, True)
    finite = ~np.isnan(floats)
    assert np.array_equal(floats.view(np.uint32)[finite], (bits.astype(np.uint32) << 16)[finite])
    assert model.run({"x": bits[:0]}, ["y"])[0].shape == (0,)
    with pytest.raises(InputInvalid, match="input 'x' has datatype FP32, expected BF16"):
        model.run({"x": np.zeros(1, np.float32)})
    model.close()


def test_text_that_is_not_utf8_is_refused(tmp_path):
    model = load(onnx_models.identity(tmp_path / "m.onnx", TensorProto.STRING))
    with pytest.raises(InputInvalid, match="input 'x' has an element that is not UTF-8"):
        model.run({"x": np.array([b"\xff"], np.object_)})


@pytest.mark.parametrize(
    ("feeds", "text"),
    [
        ({"x": np.zeros((1, 4))}, "input 'x' has datatype FP64, expected FP32"),
        ({"x": np.zeros((1, 5), np.float32)}, r"input 'x' has shape \[1,5\], expected \[-1,4\]"),
        ({}, "input 'x' is missing"),
        ({"x": np.zeros((1, 4), np.float32), "z": np.zeros(1)}, "input 'z' is not known; the model takes 'x'"),
    ],
)
def test_inputs_that_do_not_fit_are_named(tmp_path, feeds, text):
    model = load(onnx_models.scale(tmp_path / "m.onnx", 2.0))
    with pytest.raises(InputInvalid, match=text):
        model.run(feeds)


def test_what_a_model_really_runs_on(tmp_path):
    path = onnx_models.scale(tmp_path / "m.onnx", 2.0)
    assert load(path, provider="cpu").placement.fallback is None
    available = onnx_runtime.engine().get_available_providers()
    if "CUDAExecutionProvider" not in available:
        placement = load(path, provider="cuda").placement
        assert (placement.requested, placement.actual) == ("cuda", "cpu")
        assert "has no CUDAExecutionProvider (it has: cpu)" in placement.fallback
    with pytest.raises(ModelInvalid, match="provider='abacus' is not one of auto, cpu, cuda, tensorrt"):
        load(path, provider="abacus")


def test_types_that_cannot_cross_the_socket_are_refused(tmp_path):
    sequence = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("SequenceConstruct", ["x"], ["y"])],
        [value("x", TensorProto.FLOAT, [1])],
        [sequence],
    )
    with pytest.raises(ModelInvalid, match=r"output 'y' has type seq\(tensor\(float\)\)"):
        load(path)


def test_files_that_are_no_models(tmp_path):
    for name, data, text in (
        ("empty.onnx", b"", "empty.onnx is empty"),
        ("text.onnx", b"hello, this is text", "text.onnx is not a model that onnxruntime"),
        ("empty.tflite", b"", "it has only 0 bytes"),
        ("text.tflite", b"hello, this is text", "expected b'TFL3'"),
        ("lies.tflite", b"\x1c\0\0\0TFL3" + bytes(100), "lies.tflite is not a model that the TFLite engine can load"),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ModelInvalid, match=text):
            load(path)
    with pytest.raises(ModelInvalid, match="cannot be read: No such file"):
        load(tmp_path / "none.onnx")
    with pytest.raises(ModelInvalid, match=r"no runtime takes files ending in '.pt' \(known: .*\.onnx"):
        load(tmp_path / "model.pt")


def test_runtimes_are_found_by_name():
    assert {"onnx", "tflite"} <= set(registry.names())
    assert registry.find("onnx").version().startswith("onnxruntime ")
    with pytest.raises(RuntimeUnavailable, match="no runtime 'abacus' is installed"):
        registry.find("abacus")


def test_a_runtime_of_another_contract_is_refused(monkeypatch):
    class Old:
        contract_version = 0

    class Point:
        value = "old:Old"

        @staticmethod
        def load():
            return Old

    monkeypatch.setattr(registry, "_registered", lambda: {"old": Point})
    with pytest.raises(RuntimeUnavailable, match="contract version 0, this agent needs 1"):
        registry.find.__wrapped__("old")


def test_quantization_per_tensor_and_per_channel(tmp_path):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("Transpose", ["q"], ["t"], perm=[1, 0]),
        helper.make_node("DequantizeLinear", ["t", "scales", "zeros"], ["y"], axis=0),
    ]
    initializers = [
        ("s", np.float32(0.5)), ("z", np.int8(-3)),
        ("scales", np.array([1, 2, 4], np.float32)), ("zeros", np.array([0, 1, -1], np.int8)),
    ]  # fmt: skip
    path = save(
        tmp_path / "m.onnx",
        nodes,
        [value("x", TensorProto.FLOAT, [2, 3])],
        [value("y", TensorProto.FLOAT, [3, 2])],
        initializers,
    )
    assert read_quantization(path) == {
        "x": Quantization((0.5,), (-3,)),
        "y": Quantization((1.0, 2.0, 4.0), (0, 1, -1), axis=0),
    }
    model = load(path)
    assert model.inputs[0].quantization == Quantization((0.5,), (-3,))
    assert model.outputs[0].quantization.axis == 0


def test_an_input_that_is_also_read_unquantized_is_not_quantized(tmp_path):
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]), helper.make_node("Relu", ["x"], ["y"])]
    outputs = [value("y", TensorProto.FLOAT, [2]), value("q", TensorProto.INT8, [2])]
    path = save(
        tmp_path / "m.onnx", nodes, [value("x", TensorProto.FLOAT, [2])], outputs, [("s", np.float32(0.5)), ("z", np.int8(1))]
    )
    assert read_quantization(path) == {"q": Quantization((0.5,), (1,))}


def test_files_that_are_not_understood_have_no_quantization(tmp_path):
    path = tmp_path / "m"
    whole = onnx_models.scale(tmp_path / "m.onnx", 2.0).read_bytes()
    for data in [b"", b"\xff" * 40, *(whole[:cut] for cut in range(0, len(whole), 7))]:
        path.write_bytes(data)
        assert read_quantization(path) == {}


@pytest.mark.shared
def test_interpreters_are_pooled_and_follow_the_shapes(shared_models):
    import threading

    model = load(shared_models / "tflite/digits-v2-int8.tflite")
    name = model.inputs[0].name
    rng = np.random.default_rng(3)
    batches = [rng.integers(-128, 127, (size, 8, 8, 1)).astype(np.int8) for size in (1, 2, 3, 5, 8, 1, 2, 1)]
    expected = [np.concatenate([model.run({name: row[None]})[0] for row in batch]) for batch in batches]
    failures = []

    def work():
        for _ in range(20):
            for batch, want in zip(batches, expected, strict=True):
                if not np.array_equal(model.run({name: batch})[0], want):
                    failures.append(batch.shape)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    with pytest.raises(InputInvalid, match=r"has shape \[1,8,8\], expected \[-1,8,8,1\]"):
        model.run({name: np.zeros((1, 8, 8), np.int8)})
    with pytest.raises(InputInvalid, match="has datatype FP32, expected INT8"):
        model.run({name: np.zeros((1, 8, 8, 1), np.float32)})
    with pytest.raises(InputInvalid, match="is missing"):
        model.run({})
    model.close()


@pytest.mark.shared
def test_a_recurrent_model_does_not_remember_the_caller_before(shared_models):
    model = load(shared_models / "tflite/trained_lstm_int8.tflite")
    rng = np.random.default_rng(4)
    name = model.inputs[0].name
    first, second = (rng.integers(-128, 127, (1, 28, 28)).astype(np.int8) for _ in range(2))
    alone = model.run({name: second})[0]
    model.run({name: first})
    assert np.array_equal(model.run({name: second})[0], alone)
