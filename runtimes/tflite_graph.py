"""What the engine does not tell about a TFLite file, read from the file itself: its signatures, whether it remembers anything
from one run to the next, which shapes are of any rank, and which outputs nothing writes.

A file that is not understood has nothing of it. Field numbers are those of schema.fbs.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runtimes.flatbuffer import UNREADABLE, Data, integers, number_of, place, tables, text, u32

MODEL_OPERATOR_CODES, MODEL_SUBGRAPHS, MODEL_BUFFERS, MODEL_SIGNATURES = 1, 2, 4, 7
CODE_OLD_BUILTIN, CODE_CUSTOM = 0, 1
CODE_BUILTIN = 3  # the byte that older files have instead ends below VAR_HANDLE
SUBGRAPH_TENSORS, SUBGRAPH_INPUTS, SUBGRAPH_OUTPUTS, SUBGRAPH_OPERATORS = 0, 1, 2, 3
OPERATOR_CODE, OPERATOR_OUTPUTS = 0, 2
TENSOR_SHAPE, TENSOR_TYPE, TENSOR_BUFFER, TENSOR_NAME, TENSOR_IS_VARIABLE, TENSOR_HAS_RANK = 0, 1, 2, 3, 5, 8
BUFFER_DATA, BUFFER_OFFSET, BUFFER_SIZE = 0, 1, 2
SIGNATURE_INPUTS, SIGNATURE_OUTPUTS, SIGNATURE_KEY, SIGNATURE_SUBGRAPH = 0, 1, 2, 4
MAP_NAME, MAP_TENSOR = 0, 1
VAR_HANDLE = 142


@dataclass(frozen=True, slots=True)
class FileSignature:
    """`inputs` and `outputs`: its name for a tensor → the tensor's index in the subgraph."""

    key: str
    subgraph: int
    inputs: dict[str, int]
    outputs: dict[str, int]


@dataclass(frozen=True, slots=True)
class Facts:
    """Tensors are (subgraph, index) here."""

    signatures: tuple[FileSignature, ...] = ()  # in the order of the file
    variables: bool = False  # tensors that keep their values between runs, which the engine can reset
    resources: bool = False  # values that only a new interpreter has at their beginning
    rankless: frozenset[tuple[int, int]] = frozenset()
    unwritten: frozenset[tuple[int, int]] = frozenset()  # outputs that would be whatever lies in memory
    ends: Mapping[tuple[int, int], tuple[str, str, int]] = field(
        default_factory=dict
    )  # inputs and outputs: role, name, type in the schema
    custom: tuple[str, ...] = ()  # operators that are none of the schema's
    understood: bool = True


@dataclass(slots=True)
class _Found:
    variables: bool = False
    rankless: set[tuple[int, int]] = field(default_factory=set)
    unwritten: set[tuple[int, int]] = field(default_factory=set)
    ends: dict[tuple[int, int], tuple[str, str, int]] = field(default_factory=dict)


def read_facts(path: Path) -> Facts:
    """As far as the file is understood."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _facts(data)
    except UNREADABLE:
        return Facts(understood=False)


def read_operators(path: Path) -> dict[int | str, int]:
    """How many there are of each in all subgraphs: by number in the schema, custom ones by name. None where the file is not
    understood.
    """
    found: Counter[int | str] = Counter()
    with (
        contextlib.suppress(*UNREADABLE),
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        model = u32(data, 0)
        codes: list[int | str] = [
            text(data, code, CODE_CUSTOM)
            or max(number_of(data, code, CODE_BUILTIN, "<i"), number_of(data, code, CODE_OLD_BUILTIN, "<b"))
            for code in tables(data, model, MODEL_OPERATOR_CODES)
        ]
        for graph in tables(data, model, MODEL_SUBGRAPHS):
            for operator in tables(data, graph, SUBGRAPH_OPERATORS):
                found[codes[number_of(data, operator, OPERATOR_CODE, "<I")]] += 1
    return dict(found)


def read_weights_bytes(path: Path) -> int | None:
    """The bytes of all constant tensors, each buffer once; None where the file is not understood."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            model = u32(data, 0)
            buffers = list(tables(data, model, MODEL_BUFFERS))
            used = {
                number_of(data, tensor, TENSOR_BUFFER, "<I")
                for graph in tables(data, model, MODEL_SUBGRAPHS)
                for tensor in tables(data, graph, SUBGRAPH_TENSORS)
            }
            return sum(_bytes_of(data, buffers[number]) for number in used if number < len(buffers))
    except UNREADABLE:
        return None


def _bytes_of(data: Data, buffer: int) -> int:
    at = place(data, buffer, BUFFER_DATA)
    return u32(data, at + u32(data, at)) if at else number_of(data, buffer, BUFFER_SIZE, "<Q")


def _facts(data: Data) -> Facts:
    model = u32(data, 0)
    codes = list(tables(data, model, MODEL_OPERATOR_CODES))
    resources = any(number_of(data, code, CODE_BUILTIN, "<i") == VAR_HANDLE for code in codes)
    custom = tuple(name for code in codes if (name := text(data, code, CODE_CUSTOM)))
    buffers = list(tables(data, model, MODEL_BUFFERS))
    found = _Found()
    for number, graph in enumerate(tables(data, model, MODEL_SUBGRAPHS)):
        _look_at_graph(data, number, graph, buffers, found)
    signatures: dict[str, FileSignature] = {}
    for table in tables(data, model, MODEL_SIGNATURES):
        signature = _signature(data, table)
        signatures.setdefault(signature.key, signature)
    return Facts(
        tuple(signatures.values()), found.variables, resources, frozenset(found.rankless), frozenset(found.unwritten),
        found.ends, custom,
    )  # fmt: skip


def _look_at_graph(data: Data, number: int, graph: int, buffers: list[int], found: _Found) -> None:
    written = set(integers(data, graph, SUBGRAPH_INPUTS))
    for operator in tables(data, graph, SUBGRAPH_OPERATORS):
        written.update(integers(data, operator, OPERATOR_OUTPUTS))
    roles = dict.fromkeys(integers(data, graph, SUBGRAPH_OUTPUTS), "output")
    roles.update(dict.fromkeys(integers(data, graph, SUBGRAPH_INPUTS), "input"))
    for index, tensor in enumerate(tables(data, graph, SUBGRAPH_TENSORS)):
        if index in roles:
            kind = number_of(data, tensor, TENSOR_TYPE, "<b")
            found.ends[number, index] = (roles[index], text(data, tensor, TENSOR_NAME), kind)
        if number_of(data, tensor, TENSOR_IS_VARIABLE, "<B"):
            found.variables = True
            written.add(index)
        if not integers(data, tensor, TENSOR_SHAPE) and not number_of(data, tensor, TENSOR_HAS_RANK, "<B"):
            found.rankless.add((number, index))
        buffer = number_of(data, tensor, TENSOR_BUFFER, "<I")
        if buffer < len(buffers) and _has_content(data, buffers[buffer]):
            written.add(index)
    found.unwritten.update((number, index) for index in integers(data, graph, SUBGRAPH_OUTPUTS) if index not in written)


def _has_content(data: Data, buffer: int) -> bool:
    at = place(data, buffer, BUFFER_DATA)
    return bool(at and u32(data, at + u32(data, at))) or number_of(data, buffer, BUFFER_OFFSET, "<Q") > 1


def _signature(data: Data, table: int) -> FileSignature:
    return FileSignature(
        text(data, table, SIGNATURE_KEY),
        number_of(data, table, SIGNATURE_SUBGRAPH, "<I"),
        *(
            {text(data, entry, MAP_NAME): number_of(data, entry, MAP_TENSOR, "<I") for entry in tables(data, table, role)}
            for role in (SIGNATURE_INPUTS, SIGNATURE_OUTPUTS)
        ),
    )
