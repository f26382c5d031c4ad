"""The runtimes through their contract, on models made here."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, external_data_helper, helper, load_model, numpy_helper, save_model

from runtimes import onnx as onnx_runtime
from runtimes import registry, sums
from runtimes.contract import InputInvalid, LoadOptions, ModelInvalid, Quantization, RuntimeUnavailable
from runtimes.onnx_graph import read_quantization
from runtimes.onnx_weights import has_wide_weights
from tests.serving import onnx_models, tflite_models
from tests.serving.onnx_models import _save, value


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
    model = load(_save(tmp_path / "m.onnx", nodes, [value("x", TensorProto.BFLOAT16, ["n"])], outputs))
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
    available = onnx_runtime._engine().get_available_providers()
    if "CUDAExecutionProvider" not in available:
        placement = load(path, provider="cuda").placement
        assert (placement.requested, placement.actual) == ("cuda", "cpu")
        assert "has no CUDAExecutionProvider (it has: cpu)" in placement.fallback
    with pytest.raises(ModelInvalid, match="provider='abacus' is not one of auto, cpu, cuda, tensorrt"):
        load(path, provider="abacus")


def test_types_that_cannot_cross_the_socket_are_refused(tmp_path):
    sequence = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    path = _save(
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
    path = _save(
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
    path = _save(
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


ONE = {"counter": np.float32([1]), "recurrent": np.float32([[1]])}


@pytest.mark.parametrize(("build", "begin"), [("counter", 5), ("recurrent", 0)])
def test_a_request_sees_the_state_of_its_own_sequence_only(tmp_path, build, begin):
    """Whether it is kept in resources that a subgraph begins, or in variable tensors."""
    model = load(getattr(tflite_models, build)(tmp_path / "m.tflite"))
    feeds = {"x": ONE[build]}
    assert model.stateful
    first, second = model.sequence(), model.sequence()
    found = [float(who.run(feeds)[0].item()) for who in (model, first, model, first, second, model, first)]
    assert [value - begin for value in found] == [1, 1, 1, 2, 1, 1, 3]


def test_a_sequence_may_go_through_several_signatures(tmp_path):
    model = load(tflite_models.stages(tmp_path / "m.tflite"))
    look = {"look/y": np.float32([0])}
    sequence = model.sequence()
    found = [
        sequence.run({"x": np.float32([3])}), sequence.run(look, ["look/seen"]), sequence.run({"x": np.float32([4])}),
        sequence.run(look, ["look/seen"]), model.run(look, ["look/seen"]),
    ]  # fmt: skip
    assert [value.item() for (value,) in found] == [3, 3, 7, 7, 0]


TEXTS = [b"hello", b"", b"a\0b\0", "é".encode(), b"\xff\xfe", b"long " * 5000]


@pytest.mark.parametrize(("before", "after"), [([], []), ([], [1]), ([1], []), ([1], [1, 1])])
def test_texts_of_any_rank_come_out_of_tflite_as_they_went_in(tmp_path, before, after):
    model = load(tflite_models.reshaped(tmp_path / "m.tflite", tflite_models.TEXT, before, after))
    for text in TEXTS:
        array = np.empty(before, np.object_)
        array[...] = text
        (result,) = model.run({"x": array})
        assert (result.shape, result.dtype, result.item()) == (tuple(after), np.object_, text)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,)])
def test_texts_of_any_rank_come_out_of_onnx_as_they_went_in(tmp_path, shape):
    model = load(onnx_models.identity(tmp_path / "m.onnx", TensorProto.STRING, [None] * len(shape)))
    array = np.empty(shape, np.object_)
    array[...] = "é\0".encode()
    (result,) = model.run({"x": array})
    assert (result.shape, result.tolist()) == (shape, array.tolist())


def test_numbers_without_dimensions_are_arrays_too(tmp_path):
    model = load(tflite_models.reshaped(tmp_path / "m.tflite", tflite_models.FLOAT, [1], []))
    (result,) = model.run({"x": np.float32([3])})
    assert (type(result), result.shape, result.item()) == (np.ndarray, (), 3)


def test_an_initializer_that_may_be_overridden_is_an_optional_input(tmp_path):
    path = onnx_models.scale_by_default(tmp_path / "m.onnx", 2.0)
    model = load(path)
    assert [(spec.name, spec.optional) for spec in model.inputs] == [("x", False), ("k", True)]
    x = np.float32([1, 2])
    assert model.run({"x": x})[0].tolist() == [2, 4]
    assert model.run({"x": x, "k": np.float32([10])})[0].tolist() == [10, 20]
    with pytest.raises(InputInvalid, match="input 'k' has datatype FP64, expected FP32"):
        model.run({"x": x, "k": np.zeros(1)})
    assert [spec.optional for spec in load(onnx_models.scale_by_default(tmp_path / "old.onnx", 2.0, ir_version=3)).inputs] == [
        False
    ]


@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 2)])
def test_an_input_of_unknown_rank_takes_any(tmp_path, shape):
    array = np.ones(shape, np.float32)
    model = load(onnx_models.identity(tmp_path / "m.onnx", TensorProto.FLOAT, None))
    assert [(spec.any_rank, spec.shape) for spec in (*model.inputs, *model.outputs)] == [(True, (-1,))] * 2
    assert model.run({"x": array})[0].shape == shape
    scalar = load(onnx_models.identity(tmp_path / "scalar.onnx", TensorProto.FLOAT, []))
    assert (scalar.inputs[0].any_rank, scalar.inputs[0].shape) == (False, ())


def test_an_input_of_unknown_rank_takes_any_in_tflite(tmp_path):
    path = tflite_models.reshaped(tmp_path / "m.tflite", tflite_models.FLOAT, [], [-1], has_rank=False)
    model = load(path)
    assert (model.inputs[0].any_rank, model.inputs[0].shape) == (True, (-1,))
    for shape in [(), (3,), (2, 2)]:
        array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        assert model.run({"x": array})[0].tolist() == array.ravel().tolist()


def test_an_output_that_is_listed_twice_is_one(tmp_path):
    outputs = [value("y", TensorProto.FLOAT, [2])] * 2
    path = _save(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], [value("x", TensorProto.FLOAT, [2])], outputs)
    for model in (load(path), load(tflite_models.twice(tmp_path / "m.tflite"))):
        assert [len(model.inputs), len(model.outputs), len(model.run({"x": np.float32([1, 2])}))] == [1, 1, 1]


def test_sizes_that_only_the_shape_signature_frees(tmp_path):
    """The file's own shape is too small for the model."""
    model = load(tflite_models.windows(tmp_path / "m.tflite"))
    assert model.inputs[0].shape == (-1, -1)
    for size in (4, 8, 400, 4):
        x = np.arange(size, dtype=np.float32).reshape(1, size)
        assert np.array_equal(model.run({"x": x})[0], x.reshape(-1, 4))
    with pytest.raises(InputInvalid, match="the engine refused inputs of these shapes"):
        model.run({"x": np.zeros((1, 3), np.float32)})
    assert model.run({"x": np.zeros((1, 4), np.float32)})[0].shape == (1, 4)


def names(specs):
    return [spec.name for spec in specs]


def test_every_signature_of_a_file_can_be_run(tmp_path):
    model = load(tflite_models.coder(tmp_path / "m.tflite"))
    encode, decode = model.signatures
    assert (encode.name, decode.name) == ("encode", "decode")
    assert [names(model.inputs), names(model.outputs)] == [["encode_x:0"], ["Call:0"]]
    assert encode.inputs == {"x": model.inputs[0]}
    rows = np.ones((3, 2), np.float32)
    assert model.run({encode.inputs["x"].name: rows})[0].tolist() == (rows * 2).tolist()
    given = {decode.inputs["a"].name: np.float32([3, 2, 1]), decode.inputs["b"].name: np.float32([1, 1, 1])}
    difference, total = model.run(given, [decode.outputs[name].name for name in ("difference", "sum")])
    assert (total.tolist(), difference.tolist()) == ([4, 3, 2], [2, 1, 0])
    with pytest.raises(InputInvalid, match="has shape"):
        model.run({**given, decode.inputs["a"].name: np.zeros(4, np.float32)}, [decode.outputs["sum"].name])


@pytest.mark.parametrize(("extra", "default"), [({}, True), ({"signature": "decode"}, False)])
def test_the_default_signature_need_not_be_the_first(tmp_path, extra, default):
    model = load(tflite_models.coder(tmp_path / "m.tflite", default=default), **extra)
    assert [sorted(names(model.inputs)), names(model.outputs)] == [["decode_a:0", "decode_b:0"], ["Call_1:0", "Call_1:1"]]
    feeds = {"decode_a:0": np.float32([3, 2, 1]), "decode_b:0": np.float32([1, 1, 1])}
    assert [array.tolist() for array in model.run(feeds)] == [[4, 3, 2], [2, 1, 0]]


def test_a_signature_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(
        ModelInvalid, match=r"option signature='train': m.tflite has no such signature \(it has: 'encode', 'decode'\)"
    ):
        load(tflite_models.coder(tmp_path / "m.tflite"), signature="train")


@pytest.mark.parametrize(
    ("given", "signed", "expected"),
    [
        (("", "", "same", "same"), True, ["a", "b", "sum", "difference"]),
        (("x", "x", None, None), True, ["a", "b", "sum", "difference"]),
        (("", "", "same", "same"), False, ["input_0", "input_1", "output_0", "output_1"]),
        (("p", "", "output_1", ""), False, ["p", "input_1", "output_1", "output_1_"]),
    ],
)
def test_tensors_without_names_of_their_own(tmp_path, given, signed, expected):
    model = load(tflite_models.nameless(tmp_path / "m.tflite", given, signed=signed))
    assert names((*model.inputs, *model.outputs)) == expected
    feeds = dict(zip(expected[:2], (np.float32([3, 4]), np.float32([1, 1])), strict=True))
    assert [array.tolist() for array in model.run(feeds)] == [[4, 5], [2, 3]]


@pytest.mark.parametrize("kind", [tflite_models.FLOAT, tflite_models.TEXT])
def test_an_output_that_nothing_writes_is_refused(tmp_path, kind):
    with pytest.raises(ModelInvalid, match="nothing in the model writes its output 'nothing'"):
        load(tflite_models.unwritten(tmp_path / "m.tflite", kind))


DIGITS = Path(__file__).resolve().parents[2] / "examples/digits"


def with_weights(folder, top):
    """The digits classifier with int8 weights up to `top`."""
    model = load_model(DIGITS / "models/digits-v2-int8-qdq.onnx")
    for weights in model.graph.initializer:
        if weights.data_type == TensorProto.INT8 and len(weights.dims) > 1:
            values = np.clip(numpy_helper.to_array(weights), -top, top).astype(np.int8)
            weights.CopyFrom(numpy_helper.from_array(values, weights.name))
    path = folder / f"{top}.onnx"
    save_model(model, path)
    return path


def precision(model):
    try:
        return model._session.get_session_options().get_session_config_entry("session.x64quantprecision")
    except RuntimeError:  # it was not set
        return None


def test_where_sums_overflow_the_engine_is_told_of_weights_that_can(tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "overflow", lambda _: True)
    assert precision(load(with_weights(tmp_path, 65))) == "1"
    assert precision(load(with_weights(tmp_path, 64))) is None


def test_where_sums_are_exact_nothing_makes_the_engine_slower(tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "overflow", lambda _: False)
    assert precision(load(with_weights(tmp_path, 127))) is None


def test_whether_sums_overflow_is_asked_once_and_only_for_weights_that_can(tmp_path, monkeypatch):
    asked, whole = [], sums.product_model()
    monkeypatch.setattr(sums, "product_model", lambda: asked.append(1) or whole)
    sums.overflow.cache_clear()
    load(onnx_models.scale(tmp_path / "floats.onnx", 2.0))
    load(with_weights(tmp_path, 64))
    assert not asked
    load(with_weights(tmp_path, 127))
    load(with_weights(tmp_path, 127))
    assert len(asked) == 1


class Engine:
    """One whose sums are kept to what 16 bits hold, two products at a time."""

    SessionOptions = onnxruntime.SessionOptions

    def __init__(self, limit):
        self.limit = limit

    def InferenceSession(self, *_, **__):  # noqa: N802 - the engine's name
        return self

    def run(self, _, feeds):
        products = feeds["a"].astype(np.int64)[:, :, None] * feeds["b"].astype(np.int64)[None]
        pairs = products[:, 0::2] + products[:, 1::2]
        return [np.clip(pairs, -self.limit, self.limit - 1).sum(axis=1)]


@pytest.mark.parametrize(("limit", "wrong"), [(1 << 15, True), (1 << 31, False)])
def test_sums_that_overflow_are_seen(limit, wrong):
    assert sums.overflow(Engine(limit)) is wrong


def test_an_engine_that_cannot_be_asked_is_taken_to_overflow():
    assert sums.overflow(object.__new__(type("Reduced", (), {"SessionOptions": onnxruntime.SessionOptions})))


def test_what_the_probe_says_is_what_the_engine_does():
    """Against a network of such weights: with the engine's defaults its answers are wrong where sums overflow, and only there."""
    path = DIGITS / "models/digits-v2-int8-qdq.onnx"
    (integers,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": digits()})
    step = load(path).outputs[0].quantization.scales[0]
    assert sums.overflow(onnxruntime) == bool(np.abs(integers - in_floats(path)).max() > 1.5 * step)


def qlinear(path, activations):
    """A QLinearConv of weights that take all 8 bits."""
    zero = activations(0)
    initializers = [
        ("s", np.float32(0.1)), ("z", zero), ("w", np.full((4, 2, 1, 1), 127, np.int8)), ("ws", np.float32(0.01)),
        ("wz", np.int8(0)),
    ]  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("QLinearConv", ["q", "s", "z", "w", "ws", "wz", "s", "z"], ["p"]),
        helper.make_node("DequantizeLinear", ["p", "s", "z"], ["y"]),
    ]
    shapes = [value("x", TensorProto.FLOAT, [1, 2, 3, 3])], [value("y", TensorProto.FLOAT, [1, 4, 3, 3])]
    return _save(path, nodes, *shapes, initializers)


def test_a_model_that_cannot_be_made_exact_is_loaded_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "overflow", lambda _: True)
    path = qlinear(tmp_path / "m.onnx", np.int8)
    model = load(path)
    assert (model.placement.actual, model.placement.fallback) == ("cpu", onnx_runtime.INEXACT)
    assert model.run({"x": np.ones((1, 2, 3, 3), np.float32)})[0] == pytest.approx(2.5, abs=0.06)
    unsigned = load(qlinear(tmp_path / "u.onnx", np.uint8))
    assert (precision(unsigned), unsigned.placement.fallback) == ("1", None)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ModelInvalid, match=r"m.onnx is not a model that onnxruntime"):
        load(path)


def digits():
    with np.load(DIGITS / "data/digits-test.npz") as found:
        return (found["image_u8"] * found["scale"]).astype(np.float32)[:, None]


def in_floats(path):
    """The same steps without any integer kernels."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"image": digits()})[0]


@pytest.mark.parametrize("version", ["v1", "v2", "v3bad"])
def test_int8_sums_are_exact_on_every_processor(version):
    """Against the same steps in floats. Without VNNI the engine's default kernels are wrong by up to 0.83 here."""
    path = DIGITS / f"models/digits-{version}-int8-qdq.onnx"
    (integers,) = load(path).run({"image": digits()})
    step = load(path).outputs[0].quantization.scales[0]
    assert np.abs(integers - in_floats(path)).max() < 1.5 * step


def test_weights_outside_of_the_file_are_taken_to_be_wide(tmp_path):
    path = with_weights(tmp_path, 10)
    assert not has_wide_weights(path)
    model = load_model(path)
    external_data_helper.convert_model_to_external_data(model, location="weights", size_threshold=0)
    save_model(model, tmp_path / "split.onnx")
    assert has_wide_weights(tmp_path / "split.onnx")


def constant(name, top, *, listed=False):
    tensor = helper.make_tensor(name, TensorProto.INT8, [2, 2], [top, 0, 0, -top])
    return tensor if listed else numpy_helper.from_array(np.array([[top, 0], [0, -top]], np.int8), name)


def constant_node(top, **how):
    return helper.make_node("Constant", [], ["w"], value=constant("w", top, **how))


def body(*nodes):
    use = helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT)
    return helper.make_graph([*nodes, use], "body", [], [value("f", TensorProto.FLOAT, [2, 2])])


def branches(*nodes):
    return [helper.make_node("If", ["c"], ["y"], then_branch=body(*nodes), else_branch=body(constant_node(1)))]


def function(top):
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_function("own", "F", [], ["w"], [constant_node(top)], opsets)


def quantized(floats, zero_type):
    weights = numpy_helper.from_array(np.ones((2, 2), floats), "f")
    zero = numpy_helper.from_array(zero_type(0), "z")
    scale_ = numpy_helper.from_array(np.float32(1), "s")
    return {"nodes": [helper.make_node("QuantizeLinear", ["f", "s", "z"], ["y"])], "weights": [weights, zero, scale_]}


HIDDEN = {
    "an initializer": lambda top: {"weights": [constant("w", top)]},
    "one written number by number": lambda top: {"weights": [constant("w", top, listed=True)]},
    "a constant": lambda top: {"nodes": [constant_node(top)]},
    "a constant written number by number": lambda top: {"nodes": [constant_node(top, listed=True)]},
    "a constant in a branch": lambda top: {"nodes": branches(constant_node(top))},
    "an initializer of a branch": lambda top: {"nodes": branches_with(constant("w", top))},
    "a branch in a branch": lambda top: {"nodes": branches(*branches(constant_node(top)))},
    "a function": lambda top: {"functions": [function(top)]},
}


def branches_with(weights):
    then = body()
    then.initializer.append(weights)
    return [helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=body(constant_node(1)))]


def written(path, *, nodes=(), weights=(), functions=()):
    outputs = [value("y", TensorProto.FLOAT, [2, 2])]
    graph = helper.make_graph(list(nodes), "g", [value("c", TensorProto.BOOL, [])], outputs, list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], functions=list(functions))
    save_model(model, path)
    return path


@pytest.mark.parametrize("where", HIDDEN)
def test_weights_are_found_wherever_they_are(where, tmp_path):
    assert has_wide_weights(written(tmp_path / "wide.onnx", **HIDDEN[where](100)))
    assert not has_wide_weights(written(tmp_path / "narrow.onnx", **HIDDEN[where](64)))


@pytest.mark.parametrize(("zero", "wide"), [(np.int8, True), (np.uint8, False)])
def test_weights_that_the_engine_quantizes_are_taken_to_be_wide(zero, wide, tmp_path):
    assert has_wide_weights(written(tmp_path / "m.onnx", **quantized(np.float32, zero))) is wide


@pytest.mark.parametrize("dims", [b"\x08\x02\x08\x02", b"\x0a\x02\x02\x02"], ids=["plain", "packed"])
@pytest.mark.parametrize(("value", "wide"), [(-65, True), (65, True), (-64, False)])
def test_however_a_shape_is_written(dims, value, wide, tmp_path):
    data = np.full((2, 2), value, np.int8).tobytes()
    tensor = dims + b"\x10\x03" + b"\x4a" + bytes([len(data)]) + data
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x3a" + bytes([len(graph)]) + graph)
    assert has_wide_weights(path) is wide


@pytest.mark.parametrize("data", [b"\x3a\xff", b"\x3a\x04\x2a\x02\x4a\x05", b"text"])
def test_what_is_no_model_has_no_wide_weights(data, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    assert not has_wide_weights(path)
