"""Int8 weights and the processor: which sums may overflow, where they do, and what the engine is told."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, external_data_helper, helper, load_model, numpy_helper, save_model

from runtimes import int8_sums, registry
from runtimes import onnx as onnx_runtime
from runtimes.contract import LoadOptions, ModelInvalid
from runtimes.onnx_weights import has_wide_weights
from tests.serving import onnx_models
from tests.serving.onnx_models import save, value


def load(path):
    return registry.for_file(path).load(path, LoadOptions())


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
        return model.settings.get_session_config_entry("session.x64quantprecision")
    except RuntimeError:  # it was not set
        return None


def test_where_sums_overflow_the_engine_is_told_of_weights_that_can(tmp_path, monkeypatch):
    monkeypatch.setattr(int8_sums, "overflow", lambda _: True)
    assert precision(load(with_weights(tmp_path, 65))) == "1"
    assert precision(load(with_weights(tmp_path, 64))) is None


def test_where_sums_are_exact_nothing_makes_the_engine_slower(tmp_path, monkeypatch):
    monkeypatch.setattr(int8_sums, "overflow", lambda _: False)
    assert precision(load(with_weights(tmp_path, 127))) is None


def test_whether_sums_overflow_is_asked_once_and_only_for_weights_that_can(tmp_path, monkeypatch):
    asked, whole = [], int8_sums.product_model()
    monkeypatch.setattr(int8_sums, "product_model", lambda: asked.append(1) or whole)
    int8_sums.overflow.cache_clear()
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
    assert int8_sums.overflow(Engine(limit)) is wrong


def test_an_engine_that_cannot_be_asked_is_taken_to_overflow():
    assert int8_sums.overflow(object.__new__(type("Reduced", (), {"SessionOptions": onnxruntime.SessionOptions})))


def test_what_the_probe_says_is_what_the_engine_does():
    """Against a network of such weights: with the engine's defaults its answers are wrong where sums overflow, and only there."""
    path = DIGITS / "models/digits-v2-int8-qdq.onnx"
    (integers,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": digits()})
    step = load(path).outputs[0].quantization.scales[0]
    assert int8_sums.overflow(onnxruntime) == bool(np.abs(integers - in_floats(path)).max() > 1.5 * step)


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
    return save(path, nodes, *shapes, initializers)


def test_a_model_that_cannot_be_made_exact_is_loaded_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(int8_sums, "overflow", lambda _: True)
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
