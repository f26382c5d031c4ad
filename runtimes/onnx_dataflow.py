"""An ONNX file as the graph that `hazards` judges: operators, the names of values, types as far as the file tells them, small
constants.

Field numbers are those of onnx.proto (ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto, ValueInfoProto,
FunctionProto).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from runtimes.dataflow import CALL, Graph, Node
from runtimes.protobuf import UNREADABLE, fields, mapped, message, packed, signed, text, text_of

MODEL_GRAPH, MODEL_FUNCTIONS = 7, 25
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT, GRAPH_VALUE_INFO = 1, 5, 11, 12, 13
NODE_INPUT, NODE_OUTPUT, NODE_OP, NODE_ATTRIBUTE, NODE_DOMAIN = 1, 2, 4, 5, 7
ATTRIBUTE_NAME, ATTRIBUTE_INT, ATTRIBUTE_TENSOR, ATTRIBUTE_GRAPH, ATTRIBUTE_INTS = 1, 3, 5, 6, 8
TENSOR_DIMS, TENSOR_TYPE, TENSOR_INT32S, TENSOR_INT64S, TENSOR_NAME, TENSOR_RAW = 1, 2, 5, 7, 8, 9
VALUE_NAME, VALUE_TYPE, TYPE_TENSOR, TENSOR_TYPE_ELEMENT = 1, 2, 1, 1
FUNCTION_NAME, FUNCTION_INPUT, FUNCTION_OUTPUT, FUNCTION_NODE, FUNCTION_DOMAIN = 1, 4, 5, 7, 10

TYPES = {1: "FP32", 2: "UINT8", 3: "INT8", 4: "UINT16", 5: "INT16", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "FP16", 11: "FP64"}
INTEGERS: Mapping[int, str] = {6: "<i4", 7: "<i8"}
MAX_CONSTANT_BYTES = 4096  # a divisor or a number of rounds; larger ones are weights
GIVES = {
    "Shape": "INT64",
    "Size": "INT64",
    "NonZero": "INT64",
    "ArgMax": "INT64",
    "ArgMin": "INT64",
    "DequantizeLinear": "FP32",
}
TYPED = {"Cast": "to", "ConstantOfShape": "value", "Constant": "value", "EyeLike": "dtype"}
"""Operators that say the type of what they give, and in which attribute."""
WITH_BODIES = frozenset({"If", "Loop", "Scan"})


class Functions:
    """The functions of a file, by domain and name; each is read once, however often it is called."""

    def __init__(self) -> None:
        self.contents: dict[tuple[str, str], memoryview] = {}
        self._graphs: dict[tuple[str, str], Graph] = {}
        self._under_way: set[tuple[str, str]] = set()

    def find(self, domain: str, name: str) -> Graph | None:
        """None when there is no such function, and within itself: they may not call themselves."""
        key = (domain, name)
        if key not in self.contents or key in self._under_way:
            return None
        if key not in self._graphs:
            self._under_way.add(key)
            self._graphs[key] = _function(self.contents[key], self)
            self._under_way.remove(key)
        return self._graphs[key]


def read(path: Path) -> list[Graph]:
    """The graph that a request runs. None where the file is not understood."""
    try:
        model = mapped(path)
        functions, graph = Functions(), None
        for number, value in fields(model):
            if number == MODEL_GRAPH:
                graph = message(value)
            elif number == MODEL_FUNCTIONS:
                function = message(value)
                functions.contents[text_of(function, FUNCTION_DOMAIN), text_of(function, FUNCTION_NAME)] = function
        return [] if graph is None else [_graph(graph, functions)]
    except UNREADABLE:
        return []


def _graph(data: memoryview, functions: Functions) -> Graph:
    graph = Graph([], [])
    inputs, outputs = [], []
    for number, value in fields(data):
        if number == GRAPH_NODE:
            graph.nodes.append(_node(message(value), graph, functions))
        elif number == GRAPH_INITIALIZER:
            _constant(graph, message(value), "")
        elif number in {GRAPH_INPUT, GRAPH_OUTPUT, GRAPH_VALUE_INFO}:
            name, kind = _value(message(value))
            if kind:
                graph.types[name] = kind
            if number == GRAPH_INPUT:
                inputs.append(name)
            elif number == GRAPH_OUTPUT:
                outputs.append(name)
    graph.inputs, graph.outputs = inputs, outputs
    return graph


def _function(data: memoryview, functions: Functions) -> Graph:
    graph = Graph(
        [text(value) for number, value in fields(data) if number == FUNCTION_INPUT],
        [text(value) for number, value in fields(data) if number == FUNCTION_OUTPUT],
    )
    graph.nodes += [_node(message(value), graph, functions) for number, value in fields(data) if number == FUNCTION_NODE]
    return graph


def _node(data: memoryview, graph: Graph, functions: Functions) -> Node:
    node = Node("", [], [])
    inputs, outputs, attributes, domain = [], [], [], ""
    for number, value in fields(data):
        if number == NODE_INPUT:
            inputs.append(text(value))
        elif number == NODE_OUTPUT:
            outputs.append(text(value))
        elif number == NODE_OP:
            node.op = text(value)
        elif number == NODE_ATTRIBUTE:
            attributes.append(message(value))
        elif number == NODE_DOMAIN:
            domain = text(value)
    node.inputs, node.outputs = inputs, outputs
    function = functions.find(domain, node.op)
    if function is not None:
        node.op, node.bodies = CALL, [function]
    elif node.op in WITH_BODIES:
        node.bodies = _bodies(attributes, functions)
    elif node.op in TYPED:
        node.type = _told(node, graph, attributes)
    else:
        node.type = GIVES.get(node.op, "")
    return node


def _bodies(attributes: Iterable[memoryview], functions: Functions) -> list[Graph]:
    return [
        _graph(message(value), functions)
        for attribute in attributes
        for number, value in fields(attribute)
        if number == ATTRIBUTE_GRAPH
    ]


def _told(node: Node, graph: Graph, attributes: Iterable[memoryview]) -> str:
    """The type that an attribute says; of a constant its values, too."""
    for attribute in attributes:
        content = dict(fields(attribute))
        name = text(content.get(ATTRIBUTE_NAME, b""))
        if name != TYPED[node.op] and not (node.op == "Constant" and name in {"value_int", "value_ints"}):
            continue
        if ATTRIBUTE_TENSOR in content:
            tensor = message(content[ATTRIBUTE_TENSOR])
            if node.op == "Constant" and node.outputs:
                return _constant(graph, tensor, node.outputs[0])
            return _type_of(tensor)
        number = content.get(ATTRIBUTE_INT)
        if node.op == "Constant":
            listed = [value for key, value in fields(attribute) if key == ATTRIBUTE_INTS]
            graph.constants[node.outputs[0]] = (
                [signed(number)] if isinstance(number, int) and not listed else [signed(n) for n in _numbers(listed)]
            )
            return "INT64"
        return TYPES.get(number, "") if isinstance(number, int) else ""
    return "FP32" if node.op == "ConstantOfShape" else ""


def _constant(graph: Graph, tensor: memoryview, name: str) -> str:
    """Its type. `name`: what it is called where it does not say that itself."""
    kind, values, raw = 0, [], None
    if len(tensor) > MAX_CONSTANT_BYTES:
        graph.types[name or text_of(tensor, TENSOR_NAME)] = found = _type_of(tensor)
        return found
    for number, value in fields(tensor):
        if number == TENSOR_TYPE and isinstance(value, int):
            kind = value
        elif number == TENSOR_NAME:
            name = name or text(value)
        elif number in {TENSOR_INT32S, TENSOR_INT64S}:
            values.append(value)
        elif number == TENSOR_RAW:
            raw = message(value)
    found = graph.types[name] = TYPES.get(kind, "")
    if kind in INTEGERS:
        if raw is not None:
            graph.constants[name] = np.frombuffer(raw, np.dtype(INTEGERS[kind])).tolist()
        else:
            graph.constants[name] = [signed(number) for number in _numbers(values)]
    return found


def _numbers(values: Iterable[int | memoryview]) -> list[int]:
    return [number for value in values for number in ([value] if isinstance(value, int) else packed(value))]


def _type_of(tensor: memoryview) -> str:
    return next((TYPES.get(v, "") for n, v in fields(tensor) if n == TENSOR_TYPE and isinstance(v, int)), "")


def _value(data: memoryview) -> tuple[str, str]:
    """The name of an input or output and its type, empty where it is none of plain tensors."""
    name, kind = "", ""
    for number, value in fields(data):
        if number == VALUE_NAME:
            name = text(value)
        elif number == VALUE_TYPE:
            for part, content in fields(message(value)):
                if part == TYPE_TENSOR:
                    kind = next(
                        (
                            TYPES.get(v, "")
                            for n, v in fields(message(content))
                            if n == TENSOR_TYPE_ELEMENT and isinstance(v, int)
                        ),
                        "",
                    )
    return name, kind
