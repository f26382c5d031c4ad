"""Small models made on the spot, so that the suite runs without the model collection."""

import re

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save(path, nodes, inputs, outputs, initializers=()):
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(a, n) for n, a in initializers])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def value(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def scale(path, factor, width=4):
    """y = factor * x, float32 [n, width]."""
    return save(
        path,
        [helper.make_node("Mul", ["x", "k"], ["y"])],
        [value("x", TensorProto.FLOAT, ["n", width])],
        [value("y", TensorProto.FLOAT, ["n", width])],
        [("k", np.float32(factor))],
    )


def scale_by_default(path, factor, ir_version=8):
    """y = k * x, float32 [n]; `k`, float32 [1], is `factor` unless the caller gives it."""
    inputs = [value("x", TensorProto.FLOAT, ["n"]), value("k", TensorProto.FLOAT, [1])]
    weights = [numpy_helper.from_array(np.float32([factor]), "k")]
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "k"], ["y"])], "g", inputs, [value("y", TensorProto.FLOAT, ["n"])], weights
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=ir_version), path)
    return path


def many_by_default(path, count):
    """y = x + count ones, float32 [n], each of which the caller may give."""
    names = [f"a-weight-with-a-name-as-exporters-make-them-{number}" for number in range(count)]
    inputs = [value("x", TensorProto.FLOAT, ["n"]), *(value(name, TensorProto.FLOAT, [1]) for name in names)]
    graph = helper.make_graph(
        [helper.make_node("Sum", ["x", *names], ["y"])], "g", inputs, [value("y", TensorProto.FLOAT, ["n"])],
        [numpy_helper.from_array(np.float32([1]), name) for name in names],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def pair(path):
    """total = a + b, difference = a - b, int64 [n]; both inputs have the same n."""
    return save(
        path,
        [helper.make_node("Add", ["a", "b"], ["total"]), helper.make_node("Sub", ["a", "b"], ["difference"])],
        [value("a", TensorProto.INT64, ["n"]), value("b", TensorProto.INT64, ["n"])],
        [value("total", TensorProto.INT64, ["n"]), value("difference", TensorProto.INT64, ["n"])],
    )


def identity(path, kind, shape=("n",), name="x"):
    return save(path, [helper.make_node("Identity", [name], ["y"])], [value(name, kind, shape)], [value("y", kind, shape)])


def constant(path, number):
    """y = number, float32 [1], whatever it is asked: it has no input."""
    return save(
        path,
        [helper.make_node("Identity", ["k"], ["y"])],
        [],
        [value("y", TensorProto.FLOAT, [1])],
        [("k", np.array([number], np.float32))],
    )


def slow(path, side=1500, rounds=1):
    """A matrix product that takes a few hundred milliseconds; x float32 [1] is added to its last element's sum. The products keep
    their size: with subnormal numbers a run takes twenty seconds on some processors.
    """
    rng = np.random.default_rng(7)
    matrix = (rng.standard_normal((side, side)) / np.sqrt(side)).astype(np.float32)
    nodes = [helper.make_node("Add", ["m", "x"], ["h0"])]
    nodes += [helper.make_node("MatMul", [f"h{i}", "m"], [f"h{i + 1}"]) for i in range(rounds)]
    nodes.append(helper.make_node("ReduceMean", [f"h{rounds}"], ["y"], keepdims=0))
    return save(path, nodes, [value("x", TensorProto.FLOAT, [1])], [value("y", TensorProto.FLOAT, [])], [("m", matrix)])


def total(path, factor=1.0):
    """sum = factor * x + before, float32 [n, 1]; `before` is what a release may declare as state."""
    return save(
        path,
        [helper.make_node("Mul", ["x", "k"], ["scaled"]), helper.make_node("Add", ["scaled", "before"], ["sum"])],
        [value("x", TensorProto.FLOAT, ["n", 1]), value("before", TensorProto.FLOAT, ["n", 1])],
        [value("sum", TensorProto.FLOAT, ["n", 1])],
        [("k", np.float32(factor))],
    )


def slow_total(path, side=500, rounds=4):
    """The same after a while."""
    matrix = (np.random.default_rng(7).standard_normal((side, side)) / side).astype(np.float32)
    nodes = [helper.make_node("ReduceSum", ["x"], ["h"], keepdims=0), helper.make_node("Add", ["m", "h"], ["h0"])]
    nodes += [helper.make_node("MatMul", [f"h{i}", "m"], [f"h{i + 1}"]) for i in range(rounds)]
    nodes += [
        helper.make_node("ReduceMean", [f"h{rounds}"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Add", ["x", "before"], ["added"]),
        helper.make_node("Add", ["added", "nothing"], ["sum"]),
    ]
    return save(
        path,
        nodes,
        [value("x", TensorProto.FLOAT, ["n", 1]), value("before", TensorProto.FLOAT, ["n", 1])],
        [value("sum", TensorProto.FLOAT, ["n", 1])],
        [("m", matrix), ("zero", np.float32(0))],
    )


def lookup(path, rows=10):
    """y = 100 + x, for int64 x [n] from 0 to `rows` - 1; any other x fails the whole run."""
    return save(
        path,
        [helper.make_node("Gather", ["t", "x"], ["y"])],
        [value("x", TensorProto.INT64, ["n"])],
        [value("y", TensorProto.INT64, ["n"])],
        [("t", np.arange(100, 100 + rows))],
    )


def divides(path):
    """y = x / z, int32 [n]: the least number by -1 has no result, and x86 processors end the process."""
    return save(
        path,
        [helper.make_node("Div", ["x", "z"], ["y"])],
        [value("x", TensorProto.INT32, ["n"]), value("z", TensorProto.INT32, ["n"])],
        [value("y", TensorProto.INT32, ["n"])],
    )


def kills_at_load(path):
    """The same of two constants: the engine computes it when it loads the file."""
    return save(
        path,
        [helper.make_node("Div", ["a", "b"], ["q"]), helper.make_node("Add", ["x", "q"], ["y"])],
        [value("x", TensorProto.INT32, [1])],
        [value("y", TensorProto.INT32, [1])],
        [("a", np.int32([-(2**31)])), ("b", np.int32([-1]))],
    )


def loops(path, goes_on="asked"):
    """y = x + the number of rounds, float32 [1]; the body's condition is x > 0 (`asked`), x <= 0 (`zeros`), or true for ever (`endless`)."""
    test = {
        "asked": [helper.make_node("Greater", ["x", "zero"], ["go"])],
        "zeros": [helper.make_node("LessOrEqual", ["x", "zero"], ["go"])],
        "endless": [helper.make_node("Identity", ["c"], ["go"])],
    }[goes_on]
    shape = [] if goes_on == "endless" else [1]
    body = helper.make_graph(
        [helper.make_node("Add", ["v", "one"], ["next"]), *test],
        "body",
        [value("i", TensorProto.INT64, []), value("c", TensorProto.BOOL, []), value("v", TensorProto.FLOAT, [1])],
        [value("go", TensorProto.BOOL, shape), value("next", TensorProto.FLOAT, [1])],
    )
    return save(
        path,
        [helper.make_node("Loop", ["", "yes", "x"], ["y"], body=body)],
        [value("x", TensorProto.FLOAT, [1])],
        [value("y", TensorProto.FLOAT, [1])],
        [("one", np.float32([1])), ("zero", np.float32(0)), ("yes", np.bool_(True))],
    )


def chain(path):
    """y = the sum of 5 x, x float32 [n], with tensors between them that the engine keeps the memory of."""
    nodes = [helper.make_node("Mul", ["x", "one"], ["h0"])]
    nodes += [helper.make_node("Add", [f"h{i}", "x"], [f"h{i + 1}"]) for i in range(4)]
    nodes += [helper.make_node("ReduceSum", ["h4"], ["y"], keepdims=1)]
    return save(
        path,
        nodes,
        [value("x", TensorProto.FLOAT, ["n"])],
        [value("y", TensorProto.FLOAT, [1])],
        [("one", np.float32([1]))],
    )


SCATTERED = ("weights.bin", "model.onnx_data", "sub/body.bin")


def scattered(path, factors, locations=SCATTERED, width=2):
    """y = x times the sum of `factors`, float32 [n, width]. Each is in a file of its own: an initializer, a Constant, one in an If's body."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def outside(name, factor, location):
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[width], data_location=TensorProto.EXTERNAL)
        values = np.full(width, factor, np.float32).tobytes()
        for key, said in (("location", location), ("offset", "64"), ("length", str(len(values)))):
            tensor.external_data.add(key=key, value=said)
        if re.fullmatch(r"(sub/)?[\w #]+\.\w+", location):
            (path.parent / location).parent.mkdir(exist_ok=True)
            (path.parent / location).write_bytes(bytes(64) + values)
        return tensor

    a, b, c = (outside(name, *pair) for name, *pair in zip("abc", factors, locations, strict=True))
    told = value("z", TensorProto.FLOAT, ["n", width])
    then = helper.make_graph(
        [helper.make_node("Mul", ["x", "c"], ["xc"]), helper.make_node("Add", ["xab", "xc"], ["z"])], "then", [], [told], [c]
    )
    otherwise = helper.make_graph([helper.make_node("Neg", ["xab"], ["z"])], "otherwise", [], [told])
    nodes = [
        helper.make_node("Constant", [], ["b"], value=b),
        helper.make_node("Mul", ["x", "a"], ["xa"]),
        helper.make_node("Mul", ["x", "b"], ["xb"]),
        helper.make_node("Add", ["xa", "xb"], ["xab"]),
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("GreaterOrEqual", ["most", "zero"], ["is"]),
        helper.make_node("If", ["is"], ["y"], then_branch=then, else_branch=otherwise),
    ]
    tensors = [value("x", TensorProto.FLOAT, ["n", width]), value("y", TensorProto.FLOAT, ["n", width])]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:], [a, numpy_helper.from_array(np.float32(0), "zero")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def trees(path, leaves):
    """y is the value of the leaf that x, float32 [n, 1], falls into: a chain of decisions, which are attributes of one operator."""
    count, ids = 2 * leaves - 1, list(range(2 * leaves - 1))
    inner = [number < leaves - 1 for number in ids]
    node = helper.make_node(
        "TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", n_targets=1,
        nodes_treeids=[0] * count, nodes_nodeids=ids, nodes_featureids=[0] * count,
        nodes_modes=["BRANCH_LEQ" if one else "LEAF" for one in inner], nodes_values=[float(n) for n in ids],
        nodes_truenodeids=[leaves - 1 + n if one else 0 for n, one in enumerate(inner)],
        nodes_falsenodeids=[(n + 1 if n + 1 < leaves - 1 else count - 1) if one else 0 for n, one in enumerate(inner)],
        target_treeids=[0] * leaves, target_nodeids=ids[leaves - 1 :], target_ids=[0] * leaves,
        target_weights=[float(n) for n in range(leaves)],
    )  # fmt: skip
    tensors = [value("x", TensorProto.FLOAT, ["n", 1]), value("y", TensorProto.FLOAT, ["n", 1])]
    graph = helper.make_graph([node], "g", tensors[:1], tensors[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def crops(path):
    """y is x, float32 [4], in the shape [s, 2]: zeros do not run, as 4 elements do not fit into a shape of none."""
    return save(
        path,
        [
            helper.make_node("Concat", ["s", "two"], ["shape"], axis=0),
            helper.make_node("Reshape", ["x", "shape"], ["y"], allowzero=1),
        ],
        [value("x", TensorProto.FLOAT, [4]), value("s", TensorProto.INT64, [1])],
        [value("y", TensorProto.FLOAT, [None, 2])],
        [("two", np.int64([2]))],
    )


def sized(path):
    """y is `v`, float32 [1], as often as the value n, int64 [1], says."""
    return save(
        path,
        [helper.make_node("Expand", ["v", "n"], ["y"])],
        [value("v", TensorProto.FLOAT, [1]), value("n", TensorProto.INT64, [1])],
        [value("y", TensorProto.FLOAT, ["n"])],
    )


def wide(path):
    """y = the sum of the four values of x, float32 [n, 4] of whole numbers, by int8 weights and activations that take all 8 bits."""
    initializers = [
        ("s", np.float32(1)), ("z", np.int8(0)), ("w", np.full((4, 1), 127, np.int8)), ("ws", np.float32(1 / 127)),
    ]  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("QLinearMatMul", ["q", "s", "z", "w", "ws", "z", "s", "z"], ["p"]),
        helper.make_node("DequantizeLinear", ["p", "s", "z"], ["y"]),
    ]
    shapes = [value("x", TensorProto.FLOAT, ["n", 4])], [value("y", TensorProto.FLOAT, ["n", 1])]
    return save(path, nodes, *shapes, initializers)


def classifier(path, *, only_maps=False):
    """What sklearn exporters make: the more probable of two classes for x, float32 [n, 2], and a map of class to probability for each row."""
    nodes = [
        helper.make_node(
            "LinearClassifier", ["x"], ["label", "p"], domain="ai.onnx.ml", classlabels_ints=[0, 1], post_transform="SOFTMAX",
            coefficients=[1.0, 0.0, 0.0, 1.0], intercepts=[0.0, 0.0],
        ),
        helper.make_node("ZipMap", ["p"], ["probs"], domain="ai.onnx.ml", classlabels_int64s=[0, 1]),
    ]  # fmt: skip
    kind = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    maps = helper.make_value_info("probs", helper.make_sequence_type_proto(kind))
    outputs = [maps] if only_maps else [value("label", TensorProto.INT64, ["n"]), maps]
    graph = helper.make_graph(nodes, "g", [value("x", TensorProto.FLOAT, ["n", 2])], outputs)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path
