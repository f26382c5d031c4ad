"""Whether a request could end or hang the process that runs a model, found in the model's file before it is loaded.

Engines trust the values that they compute with. What was tried (ONNX Runtime 1.31 and LiteRT 2.3 on x86-64, over 600 calls of
90 operators with values at and beyond the edges, each in a process of its own) and came to harm:

- Integer division: the least INT32 or INT64 by -1 has no result, and the processor ends the process (SIGFPE); ONNX's Div and
  Mod, TFLite's FLOOR_MOD. Division by zero is refused by both engines, smaller integers are computed as larger ones. Only x86
  has this trap.
- Loops whose end depends on what was asked run for as long as that says, and nothing can stop them but the end of the process.
- Tensors whose size is a value of the request can take all memory: what the engine cannot allocate is refused, but what it can
  allocate and the machine does not have ends some process.

So a value is followed from the inputs through the graph; a size that comes from the shape of an input is bounded by the
request's own size and is not followed. Nothing is found in a file that is not understood, or of a runtime of a third party,
which may have `hazards(path)` itself.
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from runtimes import onnx_dataflow, ort_dataflow, tflite_dataflow
from runtimes.dataflow import CALL, Graph, Node

DIVIDES = frozenset({"Div", "Mod", "FLOOR_MOD"})
TRAPS = frozenset({"INT32", "INT64"})

SIZES: Mapping[str, Sequence[int]] = {
    "AffineGrid": (1,), "BlackmanWindow": (0,), "CenterCropPad": (1,), "Col2Im": (1, 2), "ConstantOfShape": (0,), "CropAndResize": (3,),
    "Expand": (1,), "HammingWindow": (0,), "HannWindow": (0,), "MaxUnpool": (2,), "MelWeightMatrix": (0, 1), "OneHot": (1,), "Pad": (1,),
    "Range": (0, 1, 2), "Resize": (2, 3), "Tile": (1,), "Upsample": (1,),
    "BATCH_TO_SPACE_ND": (1,), "BROADCAST_TO": (1,), "CONV_3D_TRANSPOSE": (0,), "FILL": (0,), "MIRROR_PAD": (1,), "MULTINOMIAL": (1,),
    "ONE_HOT": (1,), "PAD": (1,), "PADV2": (1,), "RANDOM_STANDARD_NORMAL": (0,), "RANDOM_UNIFORM": (0,), "RANGE": (0, 1, 2),
    "RESIZE_BILINEAR": (1,), "RESIZE_NEAREST_NEIGHBOR": (1,), "RFFT2D": (1,), "SCATTER_ND": (2,), "SEGMENT_SUM": (1,), "SPACE_TO_BATCH_ND": (1, 2),
    "SPARSE_TO_DENSE": (1,), "TILE": (1,), "TRANSPOSE_CONV": (0,), "UNSORTED_SEGMENT_MAX": (2,), "UNSORTED_SEGMENT_MIN": (2,),
    "UNSORTED_SEGMENT_PROD": (2,), "UNSORTED_SEGMENT_SUM": (2,),
}  # fmt: skip
"""Which inputs of an operator say how large its output is."""

SHAPES = frozenset({"Shape", "Size", "SHAPE", "RANK", "ConstantOfShape", "ZEROS_LIKE", "EyeLike"})
"""Operators whose results depend on the shapes of what they are given, not on its values."""

MOST_STEPS = 300_000
"""At nodes. Bodies within loops are walked again and again: 24 loops within each other, a file of 3 KB, would take days. This
is a second.
"""

UNSEEN = "it is nested too deeply to see what a request could do"

MANY = 1_000_000
"""A loop that may go round so often has no bound that helps."""

TRUTHS = frozenset(
    {"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Not", "Xor", "IsNaN", "IsInf", "LESS", "EQUAL"}
)


def find(runtime: str, path: Path) -> tuple[str, ...]:
    """What a request could do, in words, each once; empty when nothing was found."""
    if runtime == "onnx":
        read = ort_dataflow.read if _is_of_ort(path) else onnx_dataflow.read
    elif runtime == "tflite":
        read = tflite_dataflow.read
    else:
        return ()
    try:
        graphs = read(path)
    except RecursionError:
        return (UNSEEN,)
    return judge(graphs, traps=platform.machine().lower() in {"x86_64", "amd64", "i686", "i386"})


def _is_of_ort(path: Path) -> bool:
    """By its identifier, as the engine does: blobs have no suffix."""
    try:
        with path.open("rb") as file:
            return file.read(8)[4:] == b"ORTM"
    except OSError:
        return False


def judge(graphs: Sequence[Graph], *, traps: bool) -> tuple[str, ...]:
    """What a request could do with these graphs, in words, each once. `traps`: whether an integer division without a result
    ends a process on this machine.
    """
    found: dict[str, None] = {}
    steps = iter(range(MOST_STEPS))
    try:
        for graph in graphs:
            _Walk(found, steps, traps=traps).graph(graph, set(graph.inputs), dict(graph.types), {})
    except (_TooMuch, RecursionError):
        found[UNSEEN] = None
    return tuple(found)


class _TooMuch(Exception):
    """MOST_STEPS are through."""


class _Walk:
    """Follows the values that depend on those of a request (`told`) through a graph and what it runs."""

    def __init__(self, found: dict[str, None], steps: Iterator[int], *, traps: bool) -> None:
        self._found = found
        self._steps = steps
        self._traps = traps

    def graph(self, graph: Graph, told: set[str], types: dict[str, str], constants: Mapping[str, Collection[int]]) -> set[str]:
        """Adds to `told` what depends on it, and gives it back."""
        constants = {**constants, **graph.constants}
        for node in graph.nodes:
            if next(self._steps, None) is None:
                raise _TooMuch
            known = next((types[name] for name in node.inputs if name in types), "")
            for name in node.outputs[:1]:
                types.setdefault(name, node.type or ("BOOL" if node.op in TRUTHS else known))
            if node.bodies:
                depends = self._with_bodies(node, told, types, constants)
                told.update(name for name, does in zip(node.outputs, depends, strict=False) if does)
                continue
            self._judge(node, told, types, constants)
            if node.op not in SHAPES and not told.isdisjoint(node.inputs):
                told.update(node.outputs)
        return told

    def _judge(
        self, node: Node, told: Collection[str], types: Mapping[str, str], constants: Mapping[str, Collection[int]]
    ) -> None:
        inputs = node.inputs
        if self._traps and node.op in DIVIDES and len(inputs) > 1 and inputs[0] in told:
            kinds = {types.get(name, "") for name in inputs}
            if kinds & TRAPS and (inputs[1] in told or -1 in constants.get(inputs[1], ())):
                self._found[f"{node.op} of {min(kinds & TRAPS)} can be asked for the least number divided by -1"] = None
        if any(at < len(inputs) and inputs[at] in told for at in SIZES.get(node.op, ())):
            self._found[f"{node.op} makes a tensor as large as a value of the request says"] = None

    def _with_bodies(
        self, node: Node, told: set[str], types: dict[str, str], constants: Mapping[str, Collection[int]]
    ) -> list[bool]:
        """Whether each output depends on the request."""
        if node.op in {"Loop", "WHILE"}:
            return self._loop(node, told, types, constants)
        if node.op == "Scan":  # as often as its inputs are long
            given = any(name in told for name in node.inputs)
            body = node.bodies[0]
            after = self.graph(body, told | (set(body.inputs) if given else set()), {**types, **body.types}, constants)
            return [given or name in after for name in body.outputs]
        if node.op == CALL:
            return self._call(node, told, types, constants)
        chosen = bool(node.inputs) and node.inputs[0] in told  # an If's condition
        depends = [chosen] * len(node.outputs)
        for body in node.bodies:
            passed = {inner for inner, outer in zip(body.inputs, node.inputs[1:], strict=False) if outer in told}
            if node.op == "If":
                after = self.graph(body, told | passed, {**types, **body.types}, constants)
            else:
                after = self.graph(body, passed, dict(body.types), {})
            depends = [d or name in after for d, name in zip(depends, body.outputs, strict=False)]
        return depends

    def _call(self, node: Node, told: set[str], types: dict[str, str], constants: Mapping[str, Collection[int]]) -> list[bool]:
        body = node.bodies[0]
        pairs = list(zip(body.inputs, node.inputs, strict=False))
        inner_types = {inner: types[outer] for inner, outer in pairs if outer in types}
        inner_constants = {inner: constants[outer] for inner, outer in pairs if outer in constants}
        after = self.graph(body, {inner for inner, outer in pairs if outer in told}, inner_types, inner_constants)
        return [name in after for name in body.outputs]

    def _loop(self, node: Node, told: set[str], types: dict[str, str], constants: Mapping[str, Collection[int]]) -> list[bool]:
        """ONNX: inputs are most, condition, carried; the body has number, condition, carried → condition, carried, gathered.
        TFLite: all is carried, the condition is a graph of its own, and no graph knows the names of another.
        """
        of_onnx = node.op == "Loop"
        body = node.bodies[-1]
        carried = list(node.inputs[2:] if of_onnx else node.inputs)
        inner, outer = list(body.inputs[2:] if of_onnx else body.inputs), list(body.outputs[1:] if of_onnx else body.outputs)
        outside = (told, types, constants) if of_onnx else (set[str](), dict[str, str](), dict[str, Collection[int]]())

        def go_round(walk: _Walk, graph: Graph, depends: Sequence[bool], names: Sequence[str]) -> set[str]:
            begins = {name for name, does in zip(names, depends, strict=False) if does}
            return walk.graph(graph, outside[0] | begins, {**outside[1], **graph.types}, outside[2])

        depends, before = [name in told for name in carried], None
        while depends != before:
            before = depends
            after = go_round(_Walk({}, self._steps, traps=self._traps), body, depends, inner)
            depends = [does or name in after for does, name in zip(depends, outer, strict=False)]
        after = go_round(self, body, depends, inner)
        if of_onnx:
            ends = self._onnx_ends(node, told, after, constants)
            depends += [name in after for name in body.outputs[1 + len(carried) :]]
        else:
            test = node.bodies[0]
            ends = not go_round(self, test, depends, test.inputs).isdisjoint(test.outputs)
        if ends:
            self._found[f"{node.op} goes on for as long as a value of the request says"] = None
            return [True] * len(node.outputs)
        return depends

    @staticmethod
    def _onnx_ends(node: Node, told: Collection[str], after: Collection[str], constants: Mapping[str, Collection[int]]) -> bool:
        """Whether how often an ONNX Loop goes round depends on the request, and nothing bounds it. `after`: what does so in its
        body.
        """
        most = node.inputs[0] if node.inputs else ""
        if most in told:
            return True
        bounded = most and not any(value > MANY for value in constants.get(most, ()))
        goes_on = node.inputs[1] if len(node.inputs) > 1 else ""
        return not bounded and (node.bodies[0].outputs[0] in after or goes_on in told)
