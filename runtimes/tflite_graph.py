"""Whether a TFLite model remembers anything from one run to the next, read from the file itself: the engine does not tell.

Just enough of the flatbuffer format for two questions: is a tensor declared variable, and does an operator hold a resource. A file
that is not understood has no answer to give: it counts as one without state. Field numbers are those of schema.fbs.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

MODEL_OPERATOR_CODES, MODEL_SUBGRAPHS = 1, 2
CODE_BUILTIN = 3  # the byte that older files have instead ends below VAR_HANDLE
SUBGRAPH_TENSORS = 0
TENSOR_IS_VARIABLE = 5
VAR_HANDLE = 142
MAX_ITEMS = 1_000_000  # a graph is far smaller; a length beyond it is not one

Data = mmap.mmap


def has_state(path: Path) -> bool:
    """Whether the model in `path` has a variable tensor or a resource variable."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _has_state(data)
    except (OSError, ValueError, struct.error, IndexError):
        return False


def _has_state(data: Data) -> bool:
    model = _u32(data, 0)
    for code in _tables(data, model, MODEL_OPERATOR_CODES):
        at = _field(data, code, CODE_BUILTIN)
        if at and struct.unpack_from("<i", data, at)[0] == VAR_HANDLE:
            return True
    for graph in _tables(data, model, MODEL_SUBGRAPHS):
        for tensor in _tables(data, graph, SUBGRAPH_TENSORS):
            at = _field(data, tensor, TENSOR_IS_VARIABLE)
            if at and data[at]:
                return True
    return False


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


def _tables(data: Data, table: int, number: int) -> Iterator[int]:
    """Where the tables of a vector of tables lie."""
    at = _field(data, table, number)
    if not at:
        return
    at += _u32(data, at)
    count = _u32(data, at)
    if count > MAX_ITEMS:
        raise ValueError("not a vector")
    for item in range(at + 4, at + 4 + 4 * count, 4):
        yield item + _u32(data, item)
