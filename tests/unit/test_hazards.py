"""With which operators a request could end or hang the process of a model, and that it is so with this engine."""

import platform
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtimes import hazards
from tests.serving import onnx_models, tflite_models

F, I32, I64, B = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86 ends a process that divides so")


def value(name, kind, shape=("n",)):
    return helper.make_tensor_value_info(name, kind, shape)


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs.split(" ") if inputs else [], [output], **attributes)


def model(path, nodes, inputs, output, constants=(), functions=(), **settings):
    graph = helper.make_graph(nodes, "g", inputs, [output], [numpy_helper.from_array(np.asarray(a), n) for n, a in constants])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions, **settings), path)
    return path


def find(path, runtime="onnx"):
    return " ".join(text.split()[0] for text in hazards.find(runtime, path))


X, Z = value("x", I32), value("z", I32)
FLOATS = value("x", F)
CONSTANTS = [("minus", np.int32([-1])), ("two", np.int32([2])), ("big", np.int64([2**40])), ("few", np.int64(3))]

ROWS = {
    "a division by an input": ([node("Div", "x z", "y")], [X, Z], "Div"),
    "a remainder": ([node("Mod", "x z", "y")], [X, Z], "Mod"),
    "a division by what an input becomes": ([node("Add", "z two", "a"), node("Neg", "a", "b"), node("Div", "x b", "y")], [X, Z], "Div"),
    "by a constant that is minus one": ([node("Div", "x minus", "y")], [X], "Div"),
    "by another constant": ([node("Div", "x two", "y")], [X], ""),
    "of a constant": ([node("Div", "two x", "y")], [X], ""),
    "of numbers that have no trap": ([node("Div", "x z", "y")], [FLOATS, value("z", F)], ""),
    "of eight bits": ([node("Div", "x z", "y")], [value("x", TensorProto.INT8), value("z", TensorProto.INT8)], ""),
    "of a cast": ([node("Cast", "x", "i", to=I64), node("Cast", "z", "j", to=I64), node("Div", "i j", "y")], [FLOATS, value("z", F)], "Div"),
    "of shapes": ([node("Shape", "x", "s"), node("Shape", "z", "t"), node("Div", "s t", "y")], [X, Z], ""),
    "a size that an input says": ([node("Expand", "x s", "y")], [FLOATS, value("s", I64)], "Expand"),
    "a size that a shape says": ([node("Shape", "x", "s"), node("Expand", "z s", "y")], [X, Z], ""),
    "filled": ([node("ConstantOfShape", "s", "y")], [value("s", I64)], "ConstantOfShape"),
    "what is filled holds nothing of it": (
        [node("ConstantOfShape", "s", "c"), node("Cast", "c", "d", to=I64), node("Expand", "x d", "y")], [FLOATS, value("s", I64)], "ConstantOfShape",
    ),
    "a size of a constant": ([node("Constant", "", "s", value_ints=[3]), node("Expand", "x s", "y")], [FLOATS], ""),
    "resized by an input": ([node("Resize", "x  s", "y")], [value("x", F), value("s", F)], "Resize"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_what_is_found(tmp_path, monkeypatch, name):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    nodes, inputs, found = ROWS[name]
    assert find(model(tmp_path / "m.onnx", nodes, inputs, value("y", I32), CONSTANTS)) == (
        found if x86.args[0] is False else ""
    )


def in_ort_format(path):
    """The same model as the engine itself writes it in its own format."""
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.optimized_model_filepath = str(path.with_suffix(".ort"))
    settings.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    return path.with_suffix(".ort").rename(path.with_suffix(""))  # blobs have no suffix


def a_row(name):
    return lambda path: model(path, *ROWS[name][:2], value("y", I32), CONSTANTS)


ORT = {
    "a division": (onnx_models.divides, "Div"),
    "by a constant that is minus one": (a_row("by a constant that is minus one"), "Div"),
    "by another constant": (a_row("by another constant"), ""),
    "of shapes": (lambda path: model(path, ROWS["of shapes"][0], [X, Z], value("y", I64)), ""),
    "of a cast": (lambda path: model(path, ROWS["of a cast"][0], ROWS["of a cast"][1], value("y", I64)), "Div"),
    "of floats": (lambda path: onnx_models.scale(path, 2.0), ""),
    "a size": (onnx_models.sized, "Expand"),
    "a loop": (onnx_models.loops, "Loop"),
    "a loop that nothing is asked": (lambda path: onnx_models.loops(path, "endless"), ""),
}


@pytest.mark.parametrize("name", ORT)
def test_what_is_found_in_files_of_orts_own_format(tmp_path, monkeypatch, name):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    make, found = ORT[name]
    path = in_ort_format(make(tmp_path / "m.onnx"))
    assert find(path) == found
    content = path.read_bytes()
    for end in range(0, len(content), 61):
        path.write_bytes(content[:end])
        hazards.find("onnx", path)  # never raises


def body(nodes, *, carried=F, goes_on=B):
    return helper.make_graph(
        nodes,
        "body",
        [value("i", I64, []), value("c", B, []), value("v", carried)],
        [value("go", goes_on, None), value("w", carried)],
    )


KEEP, ON = node("Identity", "v", "w"), node("Identity", "c", "go")
BELOW = node("Less", "x v", "go")
INNER = helper.make_graph([node("Less", "x v", "deep")], "inner", [], [value("deep", B, None)])
LOOPS = {
    "for as long as an input says": ("n t x", [KEEP, ON], "Loop"),
    "while an input is above": (" t x", [KEEP, BELOW], "Loop"),
    "while what it carries is": (" t x", [KEEP, node("Less", "v two", "go")], "Loop"),
    "while what another value becomes is": (" t two", [node("Add", "v x", "w"), node("Less", "v two", "go")], "Loop"),
    "while a body of its body says": (" t two", [KEEP, node("If", "c", "go", then_branch=INNER, else_branch=INNER)], "Loop"),
    "a number of times": ("few t x", [KEEP, ON], ""),
    "at most a number of times": ("few t x", [KEEP, BELOW], ""),
    "at most so often that it does not matter": ("big t x", [KEEP, BELOW], "Loop"),
    "as its own counter says": (" t x", [KEEP, node("Less", "i few", "go")], ""),
    "as often as an input is long": ("size t x", [KEEP, ON], ""),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops(tmp_path, name):
    inputs, nodes, found = LOOPS[name]
    loop = helper.make_node("Loop", inputs.split(" "), ["y"], body=body(nodes))
    path = model(
        tmp_path / "m.onnx",
        [node("Size", "x", "size"), loop],
        [FLOATS, value("n", I64, [])],
        value("y", F),
        [("t", np.bool_(True)), ("two", np.float32([2])), ("few", np.int64(3)), ("big", np.int64(2**40))],
    )
    assert find(path) == found


def test_what_is_inside_of_bodies_and_functions_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    divided = helper.make_graph([node("Div", "x z", "d")], "then", [], [value("d", I32)])
    path = model(
        tmp_path / "if.onnx",
        [node("If", "t", "y", then_branch=divided, else_branch=divided)],
        [X, Z, value("t", B, [])],
        value("y", I32),
    )
    function = helper.make_function("own", "Ratio", ["a", "b"], ["r"], [node("Div", "a b", "r")], [helper.make_opsetid("", 17)])
    called = model(
        tmp_path / "f.onnx", [node("Ratio", "x z", "y", domain="own")], [X, Z], value("y", I32), functions=[function]
    )
    assert [find(path), find(called)] == ["Div", "Div"]


TFLITE = {
    "a remainder": (tflite_models.remainder, {}, "FLOOR_MOD"),
    "of eight bits": (tflite_models.remainder, {"kind": tflite_models.KIND.INT8}, ""),
    "by a constant": (tflite_models.remainder, {"divisor": np.int32([7])}, ""),
    "by a constant that is minus one": (tflite_models.remainder, {"divisor": np.int32([-1])}, "FLOOR_MOD"),
    "a size that an input says": (tflite_models.filled, {}, "FILL"),
    "a size that a shape says": (tflite_models.filled, {"says": "shape"}, ""),
    "for as long as an input says": (tflite_models.counts, {}, "WHILE"),
    "a number of times": (tflite_models.counts, {"until": "constant"}, ""),
}


@pytest.mark.parametrize("name", TFLITE)
def test_what_is_found_in_tflite_files(tmp_path, monkeypatch, name):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    make, how, found = TFLITE[name]
    assert find(make(tmp_path / "m.tflite", **how), "tflite") == found


def loops_in_loops(path, depth):
    """y = x, behind loops within each other that go round no time."""
    inner = [helper.make_node("Identity", ["v0"], ["w0"])]
    for n in range(depth):
        given, told = (
            [value(f"i{n}", I64, []), value(f"c{n}", B, []), value(f"v{n}", F)],
            [value(f"c{n}", B, []), value(f"w{n}", F)],
        )
        last = n == depth - 1
        names = ["zero", "", "x" if last else f"v{n + 1}"], ["y" if last else f"w{n + 1}"]
        inner = [helper.make_node("Loop", *names, body=helper.make_graph(inner, f"b{n}", given, told))]
    return model(path, inner, [FLOATS], value("y", F), [("zero", np.int64(0))])


def functions_in_functions(path, depth):
    """Each calls the next one twice."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    calls = [(f"F{n + 1}", "own") for n in range(depth - 1)] + [("Identity", "")]
    made = [
        helper.make_function(
            "own", f"F{n}", ["x"], ["y"], [node(op, "x", "a", domain=domain), node(op, "a", "y", domain=domain)], opsets
        )
        for n, (op, domain) in enumerate(calls)
    ]
    return model(path, [node("F0", "x", "y", domain="own")], [FLOATS], value("y", F), functions=made)


def ifs_in_ifs(path, depth):
    """Each subgraph runs the next one eight times."""
    tensors = [tflite_models.tensor(name, tflite_models.KIND.BOOL, (1,)) for name in "xy"]
    graphs = []
    for n in range(1, depth + 1):
        of = {"thenSubgraphIndex": n, "elseSubgraphIndex": n}
        branch = tflite_models.operator(tflite_models.OP.IF, [0], [1], tflite_models.OPTIONS.IfOptions, **of)
        graphs.append(tflite_models.graph(tensors, [branch] * 4 if n < depth else [], [0], [1]))
    return tflite_models.save(path, graphs)


@pytest.mark.no_cover  # it would take two or three times as long
@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("make", "depth", "runtime"),
    [(loops_in_loops, 24, "onnx"), (functions_in_functions, 40, "onnx"), (ifs_in_ifs, 15, "tflite")],
)
def test_a_file_that_would_take_for_ever_to_look_through_is_a_hazard_itself(make, depth, runtime, tmp_path):
    """It is some KB, and the engine may load it at once."""
    assert hazards.find(runtime, make(tmp_path / "deep", depth)) == (hazards.UNSEEN,)
    assert hazards.find(runtime, make(tmp_path / "flat", 3)) == ()


def test_only_x86_traps(tmp_path, monkeypatch):
    path = model(tmp_path / "m.onnx", [node("Div", "x z", "y")], [X, Z], value("y", I32))
    for machine, found in (("x86_64", "Div"), ("aarch64", "")):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert find(path) == found


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"\xff" * 100, b"TFL3" * 30, b"\x04\0\0\0ORTM" * 30, b"\x3a\xff\xff\xff\xff\x0f"]
)
def test_nothing_is_found_in_what_is_not_understood(tmp_path, content):
    path = tmp_path / "m"
    path.write_bytes(content)
    assert hazards.find("onnx", path) == hazards.find("tflite", path) == hazards.find("other", path) == ()


@x86
@pytest.mark.parametrize("kind", [np.int32, np.int64])
@pytest.mark.parametrize("op", ["Div", "Mod"])
def test_the_engine_has_this_fault(tmp_path, op, kind):
    """Once it has not any more, its models need no processes of their own."""
    which = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    path = model(tmp_path / "m.onnx", [node(op, "x z", "y")], [value("x", which), value("z", which)], value("y", which))
    script = (
        "import sys, numpy, onnxruntime as o; k = getattr(numpy, sys.argv[2]);"
        "o.InferenceSession(sys.argv[1]).run(None, {'x': k([numpy.iinfo(k).min]), 'z': k([-1])})"
    )
    assert subprocess.run([sys.executable, "-c", script, path, kind.__name__], check=False, timeout=60).returncode == -8


@x86
@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_the_tflite_engine_has_it_too(tmp_path, kind):
    which = tflite_models.INT32 if kind is np.int32 else tflite_models.KIND.INT64
    path = tflite_models.remainder(tmp_path / "m.tflite", which)
    script = (
        "import sys, numpy; from ai_edge_litert.interpreter import Interpreter; k = getattr(numpy, sys.argv[2]);"
        "i = Interpreter(sys.argv[1]); i.allocate_tensors(); a, b = i.get_input_details();"
        "i.set_tensor(a['index'], k([numpy.iinfo(k).min])); i.set_tensor(b['index'], k([-1])); i.invoke()"
    )
    assert subprocess.run([sys.executable, "-c", script, path, kind.__name__], check=False, timeout=60).returncode == -8
