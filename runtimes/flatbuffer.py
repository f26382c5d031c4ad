"""Just enough of the flatbuffer format to look into a model file without copying it: fields of a table, vectors, texts.

A table is told by where it lies, a field by its number in the schema. Each function raises ValueError, IndexError or
struct.error where the bytes are not what they should be.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

MAX_ITEMS = 1_000_000  # a graph is far smaller; a length beyond it is not one

Data = mmap.mmap
UNREADABLE = (OSError, ValueError, IndexError, struct.error)


def u32(data: Data, at: int) -> int:
    return int(struct.unpack_from("<I", data, at)[0])


def place(data: Data, table: int, number: int) -> int:
    """Where a table's field lies; 0 when it is left out."""
    layout = table - struct.unpack_from("<i", data, table)[0]
    slot = 4 + 2 * number
    if layout < 0 or slot >= struct.unpack_from("<H", data, layout)[0]:
        return 0
    offset = struct.unpack_from("<H", data, layout + slot)[0]
    return int(table + offset) if offset else 0


def number_of(data: Data, table: int, number: int, form: str) -> int:
    """A field that holds a number, written as struct's `form`; 0 when it is left out."""
    at = place(data, table, number)
    return int(struct.unpack_from(form, data, at)[0]) if at else 0


def vector(data: Data, table: int, number: int) -> tuple[int, int]:
    """Where a vector's items begin, and how many there are."""
    at = place(data, table, number)
    if not at:
        return 0, 0
    at += u32(data, at)
    count = u32(data, at)
    if count > MAX_ITEMS:
        raise ValueError("not a vector")
    return at + 4, count


def integers(data: Data, table: int, number: int) -> tuple[int, ...]:
    """A vector of 32-bit integers."""
    at, count = vector(data, table, number)
    return struct.unpack_from(f"<{count}i", data, at) if count else ()


def text(data: Data, table: int, number: int) -> str:
    at, size = vector(data, table, number)
    return data[at : at + size].decode()


def tables(data: Data, table: int, number: int) -> Iterator[int]:
    """Where the tables of a vector of tables lie."""
    begin, count = vector(data, table, number)
    for item in range(begin, begin + 4 * count, 4):
        yield item + u32(data, item)
