"""Scale and zero point of an ONNX model's quantized inputs and outputs, and which of them have any rank, read from the file
itself.

ONNX Runtime does not expose the graph and the `onnx` package is not something a device needs, so this reads just enough of the
protobuf wire format: the nodes next to the graph's inputs and outputs and the constants they name. Everything else is skipped
unread. A file that is not understood yields nothing: quantization is information, never a reason to refuse a model.

Field numbers are those of onnx.proto (ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.contract import Quantization
from runtimes.onnx_axes import Axes
from runtimes.protobuf import UNREADABLE, Malformed, Wire, fields, mapped, message, packed, signed, text, text_of

MODEL_GRAPH = 7
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT = 1, 5, 11, 12
NODE_INPUT, NODE_OUTPUT, NODE_OP, NODE_ATTRIBUTE = 1, 2, 4, 5
ATTRIBUTE_NAME, ATTRIBUTE_INT, ATTRIBUTE_TENSOR, ATTRIBUTE_INTS = 1, 3, 5, 8
TENSOR_DIMS, TENSOR_TYPE, TENSOR_FLOATS, TENSOR_INTS, TENSOR_NAME, TENSOR_RAW = 1, 2, 4, 5, 8, 9
VALUE_NAME, VALUE_TYPE = 1, 2
TYPE_TENSOR, TENSOR_TYPE_SHAPE, SHAPE_DIM, DIM_VALUE = 1, 2, 1, 1

MAX_CONSTANT_BYTES = 1 << 20  # a scale per channel of the widest layer is far below; weights are far above
ELEMENT_TYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64, 10: np.float16}

# Which operand of an operator is quantized by which scale and zero point: (data, scale, zero point) positions.
READS = {
    "QuantizeLinear": ((0, 1, 2),),
    "DequantizeLinear": ((0, 1, 2),),
    "QLinearConv": ((0, 1, 2),),
    "QLinearMatMul": ((0, 1, 2), (3, 4, 5)),
    "QLinearAdd": ((0, 1, 2), (3, 4, 5)),
    "QLinearMul": ((0, 1, 2), (3, 4, 5)),
    "QGemm": ((0, 1, 2),),
}
WRITES = {
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
    "QLinearConv": (6, 7),
    "QLinearMatMul": (6, 7),
    "QLinearAdd": (6, 7),
    "QLinearMul": (6, 7),
    "QLinearSoftmax": (3, 4),
    "QLinearSigmoid": (3, 4),
    "QLinearLeakyRelu": (3, 4),
    "QLinearGlobalAveragePool": (3, 4),
    "QLinearAveragePool": (3, 4),
    "QGemm": (7, 8),
}
# Operators that move elements without changing them, so that the scale of the tensor before holds after.
MOVES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Transpose"})
AXIS_DEFAULT = 1


@dataclass(slots=True)
class _Node:
    op: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    numbers: dict[str, list[int]] = field(default_factory=dict)  # attributes of integers
    value: Wire | None = None


@dataclass(slots=True)
class _Graph:
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    sizes: dict[str, list[int] | None] = field(default_factory=dict)  # of inputs and outputs; None: of any rank
    nodes: list[_Node] = field(default_factory=list)
    constants: dict[str, Wire] = field(default_factory=dict)


def read_quantization(path: Path) -> dict[str, Quantization]:
    """Graph input or output name → its quantization parameters; only those that are constants in the file."""
    try:
        return _quantization(mapped(path))
    except UNREADABLE:
        return {}


def read_rankless(path: Path) -> frozenset[str]:
    """Graph inputs and outputs that may have any number of dimensions: the file says no shape for them."""
    try:
        return frozenset(
            text_of(message(value), VALUE_NAME)
            for number, graph in fields(mapped(path))
            if number == MODEL_GRAPH
            for part, value in fields(message(graph))
            if part in (GRAPH_INPUT, GRAPH_OUTPUT) and not _has_shape(message(value))
        )
    except UNREADABLE:
        return frozenset()


def _has_shape(value: memoryview) -> bool:
    return _sizes(value) is not None


def _sizes(value: memoryview) -> list[int] | None:
    """The shape of an input or output, -1 where any size goes; None when it may have any rank."""
    for number, kind in fields(value):
        if number != VALUE_TYPE:
            continue
        for tensor, content in fields(message(kind)):
            if tensor != TYPE_TENSOR:
                continue
            for part, shape in fields(message(content)):
                if part == TENSOR_TYPE_SHAPE:
                    return [_size(message(size)) for _, size in fields(message(shape))]
    return None


def _size(dimension: memoryview) -> int:
    return next((size for number, size in fields(dimension) if number == DIM_VALUE and isinstance(size, int)), -1)


def _quantization(data: memoryview) -> dict[str, Quantization]:
    graph = _Graph()
    for number, value in fields(data):
        if number == MODEL_GRAPH:
            _read_graph(graph, message(value))
    found = {name: q for name in graph.inputs if (q := _of_input(graph, name)) is not None}
    found.update({name: q for name in graph.outputs if (q := _of_output(graph, name)) is not None})
    return found


def _of_input(graph: _Graph, name: str) -> Quantization | None:
    """Only when every reader of the input agrees: a float input that is also read unquantized is not a quantized input."""
    agreed: Quantization | None = None
    axes = {name: Axes.of(graph.sizes.get(name))}
    for node in graph.nodes:  # ONNX lists nodes in topological order
        if axes.keys().isdisjoint(node.inputs):
            continue
        if node.op in MOVES and node.inputs[0] in axes:
            axes.update(dict.fromkeys(node.outputs, axes[node.inputs[0]].after(_mover(graph, node))))
            continue
        quantization = next(
            (
                _parameters(graph, node, scale, zero, axes[node.inputs[data]])
                for data, scale, zero in READS.get(node.op, ())
                if len(node.inputs) > data and node.inputs[data] in axes
            ),
            None,
        )
        if quantization is None or (agreed is not None and agreed != quantization):
            return None
        agreed = quantization
    return agreed


def _of_output(graph: _Graph, name: str) -> Quantization | None:
    axes = Axes.of(graph.sizes.get(name))
    for node in reversed(graph.nodes):
        if name not in node.outputs:
            continue
        if node.op in MOVES and node.inputs:
            name, axes = node.inputs[0], axes.before(_mover(graph, node))
            continue
        at = WRITES.get(node.op)
        return _parameters(graph, node, *at, axes) if at else None
    return None


def _mover(graph: _Graph, node: _Node) -> _Node:
    """The node with what its second input says, where that is a constant: the axes or the shape of newer opsets."""
    if len(node.inputs) > 1 and node.inputs[1] in graph.constants:
        said = [int(n) for n in _tensor(graph.constants[node.inputs[1]]).flat]
        return _Node(node.op, node.inputs, node.outputs, {**node.numbers, "shape" if node.op == "Reshape" else "axes": said})
    return node


def _parameters(graph: _Graph, node: _Node, scale: int, zero: int, axes: Axes) -> Quantization | None:
    """Scales per axis only where they belong to one axis of the input or output itself (`axes`: those of what the node reads or
    writes).
    """
    scale_bytes = graph.constants.get(node.inputs[scale]) if len(node.inputs) > scale else None
    if scale_bytes is None:
        return None
    scales = _tensor(scale_bytes)
    zeros: NDArray[Any] = np.zeros(scales.size, np.int64)
    if len(node.inputs) > zero and node.inputs[zero]:
        zero_bytes = graph.constants.get(node.inputs[zero])
        if zero_bytes is None:
            return None
        zeros = _tensor(zero_bytes)
    if scales.size == 0 or scales.size != zeros.size:
        return None
    axis = None
    if scales.size > 1:
        if any(node.numbers.get("block_size", ())):
            return None  # a scale for each block of an axis
        axis = axes.end(node.numbers.get("axis", [AXIS_DEFAULT])[0])
        if axis is None or axes.sizes[axis] not in (-1, scales.size):
            return None
    return Quantization(tuple(float(s) for s in scales.flat), tuple(int(z) for z in zeros.flat), axis)


def _read_graph(graph: _Graph, data: memoryview) -> None:
    for number, value in fields(data):
        if number == GRAPH_NODE:
            node = _read_node(message(value))
            graph.nodes.append(node)
            if node.op == "Constant" and node.outputs and node.value is not None:
                graph.constants[node.outputs[0]] = node.value
        elif number == GRAPH_INITIALIZER:
            tensor = message(value)
            if len(tensor) <= MAX_CONSTANT_BYTES:
                graph.constants[text_of(tensor, TENSOR_NAME)] = tensor
        elif number in (GRAPH_INPUT, GRAPH_OUTPUT):
            name = text_of(message(value), VALUE_NAME)
            (graph.inputs if number == GRAPH_INPUT else graph.outputs).append(name)
            graph.sizes[name] = _sizes(message(value))


def _read_node(data: memoryview) -> _Node:
    node = _Node()
    for number, value in fields(data):
        if number == NODE_INPUT:
            node.inputs.append(text(value))
        elif number == NODE_OUTPUT:
            node.outputs.append(text(value))
        elif number == NODE_OP:
            node.op = text(value)
        elif number == NODE_ATTRIBUTE:
            _read_attribute(node, message(value))
    return node


def _read_attribute(node: _Node, data: memoryview) -> None:
    name, numbers, tensor = "", [], None
    for number, value in fields(data):
        if number == ATTRIBUTE_NAME:
            name = text(value)
        elif number in (ATTRIBUTE_INT, ATTRIBUTE_INTS):
            numbers += [signed(n) for n in ([value] if isinstance(value, int) else packed(value))]
        elif number == ATTRIBUTE_TENSOR:
            tensor = message(value)
    if name == "value" and tensor is not None and len(tensor) <= MAX_CONSTANT_BYTES:
        node.value = tensor
    elif numbers:
        node.numbers[name] = numbers


def _tensor(data: Wire) -> NDArray[Any]:
    kind, raw, floats, ints = 0, b"", [], []
    for number, value in fields(memoryview(data)):
        if number == TENSOR_TYPE and isinstance(value, int):
            kind = value
        elif number == TENSOR_RAW:
            raw = bytes(message(value))
        elif number == TENSOR_FLOATS:
            floats.append(value)
        elif number == TENSOR_INTS:
            ints.append(value)
    dtype = ELEMENT_TYPES.get(kind)
    if dtype is None:
        return np.zeros(0)
    if raw:
        if len(raw) % np.dtype(dtype).itemsize:
            raise Malformed
        return np.frombuffer(raw, dtype)
    if floats:
        return np.frombuffer(b"".join(struct.pack("<I", f) if isinstance(f, int) else bytes(f) for f in floats), np.float32)
    numbers = [n for value in ints for n in ([value] if isinstance(value, int) else packed(value))]
    return np.array([signed(n) for n in numbers], dtype=np.int64)
