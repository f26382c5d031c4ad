"""An ONNX model in ORT's own format as the graph that `hazards` judges.

Field numbers are those of ONNX Runtime's ort.fbs. Functions of the file are not in it: the engine has put what they do in their
place.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from runtimes.dataflow import Graph, Node
from runtimes.flatbuffer import UNREADABLE, Data, number_of, place, tables, text, u32, vector
from runtimes.onnx_dataflow import GIVES, INTEGERS, MAX_CONSTANT_BYTES, TYPED, TYPES, WITH_BODIES

SESSION_MODEL, MODEL_GRAPH = 1, 7
GRAPH_INITIALIZERS, GRAPH_VALUES, GRAPH_NODES, GRAPH_INPUTS, GRAPH_OUTPUTS = 0, 1, 2, 5, 6
NODE_OP, NODE_INPUTS, NODE_OUTPUTS, NODE_ATTRIBUTES = 5, 8, 9, 10
ATTRIBUTE_NAME, ATTRIBUTE_INT, ATTRIBUTE_TENSOR, ATTRIBUTE_GRAPH = 0, 4, 6, 7
TENSOR_NAME, TENSOR_TYPE, TENSOR_RAW = 0, 3, 4
VALUE_NAME, VALUE_TYPE, TYPE_KIND, TYPE_VALUE, TENSOR_ELEMENT = 0, 2, 1, 2, 0
A_TENSOR = 1
DEEPEST = 16  # bodies within bodies


def read(path: Path) -> list[Graph]:
    """The graph that a request runs. None where the file is not understood."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            model = _table(data, u32(data, 0), SESSION_MODEL)
            return [_graph(data, _table(data, model, MODEL_GRAPH), [])]
    except UNREADABLE:
        return []


def _graph(data: Data, table: int, seen: list[int], depth: int = 0) -> Graph:
    """`seen`: the graphs so far. A file in which one is in two places, or too deep, is not the engine's work, and could be
    walked for ever.
    """
    if table in seen or depth > DEEPEST:
        raise ValueError("a graph is within itself")
    seen.append(table)
    graph = Graph(_texts(data, table, GRAPH_INPUTS), _texts(data, table, GRAPH_OUTPUTS))
    for value in tables(data, table, GRAPH_VALUES):
        kind = place(data, value, VALUE_TYPE) and _table(data, value, VALUE_TYPE)
        if kind and number_of(data, kind, TYPE_KIND, "<B") == A_TENSOR:
            element = number_of(data, _table(data, kind, TYPE_VALUE), TENSOR_ELEMENT, "<i")
            graph.types[text(data, value, VALUE_NAME)] = TYPES.get(element, "")
    for tensor in tables(data, table, GRAPH_INITIALIZERS):
        _constant(data, tensor, graph)
    graph.nodes = [_node(data, node, seen, depth) for node in tables(data, table, GRAPH_NODES)]
    return graph


def _node(data: Data, table: int, seen: list[int], depth: int) -> Node:
    node = Node(text(data, table, NODE_OP), _texts(data, table, NODE_INPUTS), _texts(data, table, NODE_OUTPUTS))
    attributes = list(tables(data, table, NODE_ATTRIBUTES))
    if node.op in WITH_BODIES:
        bodies = [a for a in attributes if place(data, a, ATTRIBUTE_GRAPH)]
        node.bodies = [_graph(data, _table(data, body, ATTRIBUTE_GRAPH), seen, depth + 1) for body in bodies]
    elif node.op in TYPED:
        node.type = "FP32" if node.op == "ConstantOfShape" else ""
        for attribute in attributes:
            if text(data, attribute, ATTRIBUTE_NAME) == TYPED[node.op]:
                of_tensor = place(data, attribute, ATTRIBUTE_TENSOR)
                kind = (
                    number_of(data, _table(data, attribute, ATTRIBUTE_TENSOR), TENSOR_TYPE, "<i")
                    if of_tensor
                    else number_of(data, attribute, ATTRIBUTE_INT, "<q")
                )
                node.type = TYPES.get(kind, "")
    else:
        node.type = GIVES.get(node.op, "")
    return node


def _constant(data: Data, tensor: int, graph: Graph) -> None:
    name, kind = text(data, tensor, TENSOR_NAME), number_of(data, tensor, TENSOR_TYPE, "<i")
    graph.types[name] = TYPES.get(kind, "")
    at, size = vector(data, tensor, TENSOR_RAW)
    if kind in INTEGERS and 0 < size <= MAX_CONSTANT_BYTES:
        graph.constants[name] = np.frombuffer(data[at : at + size], np.dtype(INTEGERS[kind])).tolist()


def _table(data: Data, table: int, number: int) -> int:
    """Where the table that is this field lies."""
    at = place(data, table, number)
    if not at:
        raise ValueError("a table is missing")
    return at + u32(data, at)


def _texts(data: Data, table: int, number: int) -> list[str]:
    return [data[at + 4 : at + 4 + u32(data, at)].decode() for at in tables(data, table, number)]
