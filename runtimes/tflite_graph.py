"""What the engine does not tell about a TFLite file, read from the file itself: its signatures, whether it remembers anything from one run
to the next, which shapes are of any rank, and which outputs nothing writes.

Just enough of the flatbuffer format for that. A file that is not understood has nothing of it. Field numbers are those of schema.fbs.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

MODEL_OPERATOR_CODES, MODEL_SUBGRAPHS, MODEL_BUFFERS, MODEL_SIGNATURES = 1, 2, 4, 7
CODE_BUILTIN = 3  # the byte that older files have instead ends below VAR_HANDLE
SUBGRAPH_TENSORS, SUBGRAPH_INPUTS, SUBGRAPH_OUTPUTS, SUBGRAPH_OPERATORS = 0, 1, 2, 3
OPERATOR_OUTPUTS = 2
TENSOR_SHAPE, TENSOR_BUFFER, TENSOR_IS_VARIABLE, TENSOR_HAS_RANK = 0, 2, 5, 8
BUFFER_DATA, BUFFER_OFFSET = 0, 1
SIGNATURE_INPUTS, SIGNATURE_OUTPUTS, SIGNATURE_KEY, SIGNATURE_SUBGRAPH = 0, 1, 2, 4
MAP_NAME, MAP_TENSOR = 0, 1
VAR_HANDLE = 142
MAX_ITEMS = 1_000_000  # a graph is far smaller; a length beyond it is not one

Data = mmap.mmap


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
    understood: bool = True


@dataclass(slots=True)
class _Found:
    variables: bool = False
    rankless: set[tuple[int, int]] = field(default_factory=set)
    unwritten: set[tuple[int, int]] = field(default_factory=set)


def read_facts(path: Path) -> Facts:
    """As far as the file is understood."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _facts(data)
    except (OSError, ValueError, struct.error, IndexError):
        return Facts(understood=False)


def _facts(data: Data) -> Facts:
    model = _u32(data, 0)
    resources = any(
        _integer(data, code, CODE_BUILTIN, "<i") == VAR_HANDLE for code in _tables(data, model, MODEL_OPERATOR_CODES)
    )
    buffers = list(_tables(data, model, MODEL_BUFFERS))
    found = _Found()
    for number, graph in enumerate(_tables(data, model, MODEL_SUBGRAPHS)):
        _look_at_graph(data, number, graph, buffers, found)
    signatures: dict[str, FileSignature] = {}
    for table in _tables(data, model, MODEL_SIGNATURES):
        signature = _signature(data, table)
        signatures.setdefault(signature.key, signature)
    return Facts(tuple(signatures.values()), found.variables, resources, frozenset(found.rankless), frozenset(found.unwritten))


def _look_at_graph(data: Data, number: int, graph: int, buffers: list[int], found: _Found) -> None:
    written = set(_integers(data, graph, SUBGRAPH_INPUTS))
    for operator in _tables(data, graph, SUBGRAPH_OPERATORS):
        written.update(_integers(data, operator, OPERATOR_OUTPUTS))
    for index, tensor in enumerate(_tables(data, graph, SUBGRAPH_TENSORS)):
        if _integer(data, tensor, TENSOR_IS_VARIABLE, "<B"):
            found.variables = True
            written.add(index)
        if not _integers(data, tensor, TENSOR_SHAPE) and not _integer(data, tensor, TENSOR_HAS_RANK, "<B"):
            found.rankless.add((number, index))
        buffer = _integer(data, tensor, TENSOR_BUFFER, "<I")
        if buffer < len(buffers) and _has_content(data, buffers[buffer]):
            written.add(index)
    found.unwritten.update((number, index) for index in _integers(data, graph, SUBGRAPH_OUTPUTS) if index not in written)


def _has_content(data: Data, buffer: int) -> bool:
    at = _field(data, buffer, BUFFER_DATA)
    return bool(at and _u32(data, at + _u32(data, at))) or _integer(data, buffer, BUFFER_OFFSET, "<Q") > 1


def _signature(data: Data, table: int) -> FileSignature:
    return FileSignature(
        _text(data, table, SIGNATURE_KEY),
        _integer(data, table, SIGNATURE_SUBGRAPH, "<I"),
        *(
            {_text(data, entry, MAP_NAME): _integer(data, entry, MAP_TENSOR, "<I") for entry in _tables(data, table, role)}
            for role in (SIGNATURE_INPUTS, SIGNATURE_OUTPUTS)
        ),
    )


def _u32(data: Data, at: int) -> int:
    return int(struct.unpack_from("<I", data, at)[0])


def _field(data: Data, table: int, number: int) -> int:
    """Where a table's field lies; 0 when it is left out."""
    layout = table - struct.unpack_from("<i", data, table)[0]
    slot = 4 + 2 * number
    if layout < 0 or slot >= struct.unpack_from("<H", data, layout)[0]:
        return 0
    offset = struct.unpack_from("<H", data, layout + slot)[0]
    return int(table + offset) if offset else 0


def _integer(data: Data, table: int, number: int, form: str) -> int:
    """A field that holds a number; 0 when it is left out."""
    at = _field(data, table, number)
    return int(struct.unpack_from(form, data, at)[0]) if at else 0


def _vector(data: Data, table: int, number: int) -> tuple[int, int]:
    """Where a vector's items begin, and how many there are."""
    at = _field(data, table, number)
    if not at:
        return 0, 0
    at += _u32(data, at)
    count = _u32(data, at)
    if count > MAX_ITEMS:
        raise ValueError("not a vector")
    return at + 4, count


def _integers(data: Data, table: int, number: int) -> tuple[int, ...]:
    at, count = _vector(data, table, number)
    return struct.unpack_from(f"<{count}i", data, at) if count else ()


def _text(data: Data, table: int, number: int) -> str:
    at, size = _vector(data, table, number)
    return data[at : at + size].decode()


def _tables(data: Data, table: int, number: int) -> Iterator[int]:
    """Where the tables of a vector of tables lie."""
    begin, count = _vector(data, table, number)
    for item in range(begin, begin + 4 * count, 4):
        yield item + _u32(data, item)
