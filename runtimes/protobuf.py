"""Just enough of the protobuf wire format to look into a model file without copying it: the fields of a message, one after the
other.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

Wire = bytes | memoryview


class Malformed(Exception):
    """The bytes are not the protobuf that is expected."""


UNREADABLE = (Malformed, OSError, ValueError, IndexError, OverflowError, RecursionError, struct.error)
"""What reading a file that is no such message, or a broken one, may raise."""


def mapped(path: Path) -> memoryview:
    """The file, not read yet.  Raises: OSError, ValueError when it is empty."""
    with path.open("rb") as file:
        # Not closed by hand: that fails as long as a view of it lives, and an error's traceback keeps views alive.
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def fields(data: Wire) -> Iterator[tuple[int, int | memoryview]]:
    """Every (field number, value) of a message; a nested message is a view, nothing is copied.  Raises: Malformed."""
    for number, value, _ in parts(data):
        yield number, value


def parts(data: Wire) -> Iterator[tuple[int, int | memoryview, memoryview]]:
    """Each field: its number, its value, and the bytes that it is written in.  Raises: Malformed."""
    view, at, end = memoryview(data), 0, len(data)
    while at < end:
        start = at
        key, at = varint(view, at)
        kind = key & 7
        if kind == 0:
            value, at = varint(view, at)
            yield key >> 3, value, view[start:at]
            continue
        if kind == 2:
            size, at = varint(view, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise Malformed
        if size > end - at:
            raise Malformed
        content = view[at : at + size]
        at += size
        yield key >> 3, (content if kind == 2 else int.from_bytes(content, "little")), view[start:at]


def encoded(number: int, content: bytes) -> bytes:
    """A field that holds bytes."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def varint(data: Wire, at: int) -> tuple[int, int]:
    """The number that begins at `at`, and where the next thing begins.  Raises: Malformed."""
    result = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise Malformed
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
        shift += 7


def packed(data: Wire) -> Iterator[int]:
    """The numbers of a packed field, as unsigned 64 bits.  Raises: Malformed."""
    at = 0
    while at < len(data):
        number, at = varint(data, at)
        yield number


def signed(number: int) -> int:
    """A number that was written as unsigned 64 bits."""
    return number - (1 << 64) if number >= 1 << 63 else number


def message(value: int | Wire) -> memoryview:
    """The value of a field that holds bytes.  Raises: Malformed."""
    if isinstance(value, int):
        raise Malformed
    return memoryview(value)


def text(value: int | Wire) -> str:
    """Raises: Malformed, ValueError."""
    return bytes(message(value)).decode()


def text_of(data: Wire, number: int) -> str:
    """The first field `number` of a message; empty when it is not there."""
    return next((text(value) for n, value in fields(data) if n == number), "")
