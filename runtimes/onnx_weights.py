"""Whether an ONNX file has int8 weights that take more than 7 bits, wherever it keeps them. Two products of such a weight may
be more than 16 bits hold, which some processors' kernels add them in (see `sums`).

Weights are initializers and constants: of the graph, of the bodies of If, Loop and Scan, of functions. Those that are floats in
the file and go through QuantizeLinear become int8 when the engine loads them, and are taken to be wide, as are those kept
outside of the file. Field numbers are those of onnx.proto (ModelProto, GraphProto, FunctionProto, NodeProto, AttributeProto,
TensorProto).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtimes.protobuf import UNREADABLE, Wire, fields, mapped, message, packed, signed, text

MODEL_GRAPH, MODEL_FUNCTIONS = 7, 25
GRAPH_NODE, GRAPH_INITIALIZER = 1, 5
FUNCTION_NODE = 7
NODE_INPUT, NODE_OUTPUT, NODE_OP, NODE_ATTRIBUTE = 1, 2, 4, 5
ATTRIBUTE_NAME, ATTRIBUTE_INT, ATTRIBUTE_TENSOR, ATTRIBUTE_GRAPH, ATTRIBUTE_GRAPHS = 1, 3, 5, 6, 11
TENSOR_DIMS, TENSOR_TYPE, TENSOR_INTS, TENSOR_NAME, TENSOR_RAW = 1, 2, 5, 8, 9

INT8 = 3
FLOATS = frozenset({1, 10, 11, 16})  # float, float16, double, bfloat16
MATRIX = 2  # so many dimensions has what is multiplied; zero points have fewer
SEVEN_BITS = 64  # `reduce_range` of ONNX Runtime's quantizer keeps weights between -64 and 64
MAX_LISTED_BYTES = 1 << 20  # numbers written one by one are read one by one: larger weights are taken to be wide


@dataclass(frozen=True, slots=True)
class _Constant:
    type: int
    dimensions: int
    values: memoryview | None  # as they lie in memory
    listed: tuple[int | memoryview, ...]  # or one by one


Known = Mapping[str, _Constant]


def has_wide_weights(path: Path) -> bool:
    """As far as the file is understood; one that is not has none."""
    try:
        return any(_is_wide_part(number, message(value)) for number, value in fields(mapped(path)) if number in _PARTS)
    except UNREADABLE:
        return False


_PARTS = {MODEL_GRAPH: GRAPH_NODE, MODEL_FUNCTIONS: FUNCTION_NODE}


def _is_wide_part(number: int, part: memoryview) -> bool:
    return _is_wide_graph(part, _PARTS[number], {})


def _is_wide_graph(graph: memoryview, node_field: int, outside: Known) -> bool:
    """`outside` are the constants that a body may name too."""
    known, nodes = dict(outside), []
    for number, value in fields(graph):
        if number == GRAPH_INITIALIZER and node_field == GRAPH_NODE:
            name, constant = _constant(message(value))
            if _is_wide(constant):
                return True
            known[name] = constant
        elif number == node_field:
            nodes.append(message(value))
    return any(_is_wide_node(node, known) for node in nodes)  # in an order in which constants come before their readers


def _is_wide_node(node: memoryview, known: dict[str, _Constant]) -> bool:
    inputs, outputs, op, attributes = [], [], "", []
    for number, value in fields(node):
        if number == NODE_INPUT:
            inputs.append(text(value))
        elif number == NODE_OUTPUT:
            outputs.append(text(value))
        elif number == NODE_OP:
            op = text(value)
        elif number == NODE_ATTRIBUTE:
            attributes.append(message(value))
    integers: dict[str, int] = {}
    for attribute in attributes:
        for kind, name, content in _contents(attribute):
            if isinstance(content, int):
                integers[name] = content
            elif kind == ATTRIBUTE_TENSOR:
                _, constant = _constant(content)
                if _is_wide(constant):
                    return True
                if op == "Constant" and outputs:
                    known[outputs[0]] = constant
            elif _is_wide_graph(content, GRAPH_NODE, known):
                return True
    return op == "QuantizeLinear" and _becomes_wide(inputs, known, integers.get("output_dtype", 0))


def _becomes_wide(inputs: list[str], known: Known, output_type: int) -> bool:
    """Whether a QuantizeLinear makes int8 weights of a constant."""
    weights = known.get(inputs[0]) if inputs else None
    zero = known.get(inputs[2]) if len(inputs) > 2 else None
    is_int8 = output_type == INT8 or (zero is not None and zero.type == INT8)
    return is_int8 and weights is not None and weights.type in FLOATS and weights.dimensions >= MATRIX


def _contents(attribute: memoryview) -> Iterator[tuple[int, str, int | memoryview]]:
    """Its integer, its tensor, its graphs: (field number, the attribute's name, value)."""
    found = [(number, value) for number, value in fields(attribute)]
    name = next((text(value) for number, value in found if number == ATTRIBUTE_NAME), "")
    for number, value in found:
        if number == ATTRIBUTE_INT and isinstance(value, int):
            yield number, name, value
        elif number in (ATTRIBUTE_TENSOR, ATTRIBUTE_GRAPH, ATTRIBUTE_GRAPHS):
            yield number, name, message(value)


def _constant(tensor: Wire) -> tuple[str, _Constant]:
    name, kind, dimensions, values, listed = "", 0, 0, None, []
    for number, value in fields(tensor):
        if number == TENSOR_TYPE and isinstance(value, int):
            kind = value
        elif number == TENSOR_DIMS:
            dimensions += 1 if isinstance(value, int) else sum(1 for _ in packed(value))
        elif number == TENSOR_NAME:
            name = text(value)
        elif number == TENSOR_RAW:
            values = message(value)
        elif number == TENSOR_INTS:
            listed.append(value)
    return name, _Constant(kind, dimensions, values, tuple(listed))


def _is_wide(constant: _Constant) -> bool:
    if constant.type != INT8 or constant.dimensions < MATRIX:
        return False
    if constant.values is not None:
        values = np.frombuffer(constant.values, np.int8)
        return bool(values.size and (values.max() > SEVEN_BITS or values.min() < -SEVEN_BITS))
    if not constant.listed or sum(1 if isinstance(part, int) else len(part) for part in constant.listed) > MAX_LISTED_BYTES:
        return True
    return any(
        abs(signed(number)) > SEVEN_BITS
        for part in constant.listed
        for number in ([part] if isinstance(part, int) else packed(part))
    )
