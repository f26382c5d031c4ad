"""A TFLite file as the graph that `hazards` judges. Field numbers, and those of operators and types, are those of schema.fbs."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from runtimes.dataflow import Graph, Node
from runtimes.flatbuffer import UNREADABLE, Data, integers, number_of, place, tables, u32, vector

MODEL_OPERATOR_CODES, MODEL_SUBGRAPHS, MODEL_BUFFERS, MODEL_SIGNATURES = 1, 2, 4, 7
CODE_OLD_BUILTIN, CODE_BUILTIN = 0, 3
SUBGRAPH_TENSORS, SUBGRAPH_INPUTS, SUBGRAPH_OUTPUTS, SUBGRAPH_OPERATORS = 0, 1, 2, 3
OPERATOR_CODE, OPERATOR_INPUTS, OPERATOR_OUTPUTS, OPERATOR_OPTIONS = 0, 1, 2, 4
TENSOR_TYPE, TENSOR_BUFFER = 1, 2
BUFFER_DATA = 0
SIGNATURE_SUBGRAPH = 4
IF, WHILE = 118, 119
OPTIONS_FIRST, OPTIONS_SECOND = 0, 1  # an IF's branches; a WHILE's condition and body

TYPES = {0: "FP32", 1: "FP16", 2: "INT32", 3: "UINT8", 4: "INT64", 6: "BOOL", 7: "INT16", 9: "INT8"}
INTEGERS = {2: ("i", 4), 4: ("q", 8)}
MAX_CONSTANT_BYTES = 4096  # a divisor; larger ones are weights
DEEPEST = 16  # bodies within bodies

OPERATORS = {
    23: "RESIZE_BILINEAR", 34: "PAD", 37: "BATCH_TO_SPACE_ND", 38: "SPACE_TO_BATCH_ND", 60: "PADV2", 67: "TRANSPOSE_CONV",
    68: "SPARSE_TO_DENSE", 69: "TILE", 77: "SHAPE", 85: "ONE_HOT", 93: "ZEROS_LIKE", 94: "FILL", 95: "FLOOR_MOD", 96: "RANGE",
    97: "RESIZE_NEAREST_NEIGHBOR", 100: "MIRROR_PAD", 110: "RANK", IF: "IF", WHILE: "WHILE", 122: "SCATTER_ND", 125: "SEGMENT_SUM",
    130: "BROADCAST_TO", 131: "RFFT2D", 141: "CONV_3D_TRANSPOSE", 146: "RANDOM_STANDARD_NORMAL", 148: "RANDOM_UNIFORM",
    149: "MULTINOMIAL", 153: "UNSORTED_SEGMENT_PROD", 154: "UNSORTED_SEGMENT_MAX", 155: "UNSORTED_SEGMENT_SUM", 157: "UNSORTED_SEGMENT_MIN",
}  # fmt: skip
"""The operators that `hazards` knows by name; what the others do to a value, they do to each."""


def read(path: Path) -> list[Graph]:
    """The graphs that a request may run: the first one, and that of each signature. None of them where the file is not
    understood.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = _File(data)
            entries = {0, *(number_of(data, s, SIGNATURE_SUBGRAPH, "<I") for s in tables(data, found.model, MODEL_SIGNATURES))}
            return [found.graph(number) for number in sorted(entries)]
    except UNREADABLE:
        return []


class _File:
    """Each method raises what `flatbuffer` says."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self.model = u32(data, 0)
        self._codes = [
            max(number_of(data, code, CODE_BUILTIN, "<i"), number_of(data, code, CODE_OLD_BUILTIN, "<b"))
            for code in tables(data, self.model, MODEL_OPERATOR_CODES)
        ]
        self._buffers = list(tables(data, self.model, MODEL_BUFFERS))
        self._subgraphs = list(tables(data, self.model, MODEL_SUBGRAPHS))
        self._graphs: dict[int, Graph] = {}

    def graph(self, number: int, depth: int = 0) -> Graph:
        if depth > DEEPEST:
            raise ValueError("bodies within bodies without end")
        if number in self._graphs:
            return self._graphs[number]
        data, at = self._data, self._subgraphs[number]
        graph = Graph(self._names(at, SUBGRAPH_INPUTS), self._names(at, SUBGRAPH_OUTPUTS))
        for index, tensor in enumerate(tables(data, at, SUBGRAPH_TENSORS)):
            kind = number_of(data, tensor, TENSOR_TYPE, "<b")
            graph.types[str(index)] = TYPES.get(kind, "")
            if kind in INTEGERS:
                graph.constants[str(index)] = self._constant(tensor, *INTEGERS[kind])
        graph.nodes = [self._node(operator, depth) for operator in tables(data, at, SUBGRAPH_OPERATORS)]
        self._graphs[number] = graph
        return graph

    def _names(self, table: int, number: int) -> list[str]:
        return [str(index) for index in integers(self._data, table, number)]

    def _node(self, operator: int, depth: int) -> Node:
        data = self._data
        code = self._codes[number_of(data, operator, OPERATOR_CODE, "<I")]
        node = Node(OPERATORS.get(code, ""), self._names(operator, OPERATOR_INPUTS), self._names(operator, OPERATOR_OUTPUTS))
        if code in {IF, WHILE}:
            options = place(data, operator, OPERATOR_OPTIONS)
            options += u32(data, options)
            node.bodies = [
                self.graph(number_of(data, options, which, "<i"), depth + 1) for which in (OPTIONS_FIRST, OPTIONS_SECOND)
            ]
        return node

    def _constant(self, tensor: int, form: str, size: int) -> tuple[int, ...]:
        buffer = number_of(self._data, tensor, TENSOR_BUFFER, "<I")
        if buffer >= len(self._buffers):
            return ()
        begin, count = vector(self._data, self._buffers[buffer], BUFFER_DATA)
        if not count or count > MAX_CONSTANT_BYTES:
            return ()
        return struct.unpack_from(f"<{count // size}{form}", self._data, begin)
