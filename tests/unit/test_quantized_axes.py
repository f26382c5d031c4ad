"""Which axis a scale per axis belongs to, behind operators that only move elements: what is read of the file against what the engine computes."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from agent.client.quantization import dequantize
from runtimes import registry
from runtimes.contract import LoadOptions
from tests.serving.onnx_models import value

SHAPE = (2, 3, 4)
rng = np.random.default_rng(3)


def move(op, **attributes):
    return op, attributes, None


def told(op, *numbers):
    """What newer opsets say in a second input."""
    return op, {}, np.int64(numbers)


# The operators between the input and the DequantizeLinear; its axis; the input's axis that has the scales, None where none has.
INPUTS = [
    ([], 1, SHAPE, 1),
    ([], -1, SHAPE, 2),
    ([move("Identity")], 0, SHAPE, 0),
    ([move("Transpose", perm=[2, 0, 1])], 1, SHAPE, 0),
    ([move("Transpose", perm=[2, 0, 1])], -1, SHAPE, 1),
    ([move("Transpose")], 0, SHAPE, 2),
    ([move("Transpose", perm=[2, 0, 1]), move("Transpose", perm=[2, 0, 1])], 1, SHAPE, 2),
    ([move("Flatten", axis=1)], 0, SHAPE, 0),
    ([move("Flatten", axis=1)], 1, SHAPE, None),
    ([move("Flatten", axis=2)], 1, SHAPE, 2),
    ([move("Flatten", axis=-1)], 1, SHAPE, 2),
    ([move("Flatten", axis=1)], 1, (2, 1, 4), 2),
    ([told("Unsqueeze", 0)], 2, SHAPE, 1),
    ([told("Unsqueeze", -1)], -2, SHAPE, 2),
    ([told("Squeeze", 1)], 1, (2, 1, 4), 2),
    ([told("Reshape", 2, 1, 3, 4)], 2, SHAPE, 1),
    ([told("Reshape", 0, 12)], 0, SHAPE, None),
    ([told("Reshape", 6, 4)], 0, SHAPE, None),
]
# The same from the QuantizeLinear to the output.
OUTPUTS = [
    ([], 1, SHAPE, 1),
    ([move("Identity")], -1, SHAPE, 2),
    ([move("Transpose", perm=[2, 0, 1])], 1, SHAPE, 2),
    ([move("Transpose", perm=[2, 0, 1])], 2, SHAPE, 0),
    ([move("Transpose", perm=[2, 0, 1]), move("Transpose", perm=[1, 0, 2])], 2, SHAPE, 1),
    ([move("Flatten", axis=1)], 0, SHAPE, 0),
    ([move("Flatten", axis=1)], 1, SHAPE, None),
    ([told("Unsqueeze", 0)], 1, SHAPE, 2),
    ([told("Squeeze", 1)], 2, (2, 1, 4), 1),
    ([told("Reshape", 6, 4)], 0, SHAPE, None),
]


def chain(path, movers, axis, shape, *, quantizes):
    """x through a QuantizeLinear and then the movers; or through these and then a DequantizeLinear."""
    nodes, initializers, name, counted = [], [], "x", np.zeros(shape)
    if quantizes:
        nodes.append(helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], axis=axis))
        name, sizes = "q", shape
    for number, (op, attributes, numbers) in enumerate(movers):
        inputs = [name]
        if numbers is not None:
            initializers.append(numpy_helper.from_array(numbers, f"n{number}"))
            inputs.append(f"n{number}")
        name = f"m{number}"
        nodes.append(helper.make_node(op, inputs, [name], **attributes))
        counted = moved(counted, op, attributes, numbers)
    if not quantizes:
        nodes.append(helper.make_node("DequantizeLinear", [name, "scale", "zero"], ["d"], axis=axis))
        name, sizes = "d", counted.shape
    count = sizes[axis]
    scales, zeros = (rng.uniform(0.05, 0.5, count)).astype(np.float32), rng.integers(-5, 5, count).astype(np.int8)
    initializers += [numpy_helper.from_array(scales, "scale"), numpy_helper.from_array(zeros, "zero")]
    kinds = (TensorProto.FLOAT, TensorProto.INT8) if quantizes else (TensorProto.INT8, TensorProto.FLOAT)
    nodes[-1].output[0] = "y"
    graph = helper.make_graph(nodes, "g", [value("x", kinds[0], shape)], [value("y", kinds[1], counted.shape)], initializers)
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())
    return registry.find("onnx").load(path, LoadOptions())


def moved(array, op, attributes, numbers):
    if op == "Transpose":
        return array.transpose(attributes.get("perm"))
    if op == "Flatten":
        at = attributes["axis"] % array.ndim
        return array.reshape(int(np.prod(array.shape[:at])), -1)
    if op == "Unsqueeze":
        return np.expand_dims(array, tuple(numbers))
    if op == "Squeeze":
        return np.squeeze(array, tuple(numbers))
    if op == "Reshape":
        return array.reshape([array.shape[at] if size == 0 else size for at, size in enumerate(numbers)])
    return array


def metadata(spec):
    quantization = spec.quantization
    told = {"scale": list(quantization.scales), "zero_point": list(quantization.zero_points), "axis": quantization.axis}
    return {"datatype": spec.datatype, "parameters": {"quantization": told}}


@pytest.mark.parametrize(("movers", "axis", "shape", "expected"), INPUTS)
def test_of_an_input(tmp_path, movers, axis, shape, expected):
    model = chain(tmp_path / "m.onnx", movers, axis, shape, quantizes=False)
    (spec,) = model.inputs
    assert (spec.quantization.axis if spec.quantization else None) == expected
    if expected is None:
        return
    x = rng.integers(-100, 100, shape).astype(np.int8)
    real = dequantize(x, metadata(spec))
    for op, attributes, numbers in movers:
        real = moved(real, op, attributes, numbers)
    np.testing.assert_allclose(model.run({"x": x})[0], real, rtol=1e-6)


@pytest.mark.parametrize(("movers", "axis", "shape", "expected"), OUTPUTS)
def test_of_an_output(tmp_path, movers, axis, shape, expected):
    model = chain(tmp_path / "m.onnx", movers, axis, shape, quantizes=True)
    (spec,) = model.outputs
    assert (spec.quantization.axis if spec.quantization else None) == expected
    if expected is None:
        return
    x = rng.uniform(-2, 2, shape).astype(np.float32)
    real = x
    for op, attributes, numbers in movers:
        real = moved(real, op, attributes, numbers)
    found = dequantize(model.run({"x": x})[0], metadata(spec))
    assert np.abs(found - real).max() <= max(spec.quantization.scales)
