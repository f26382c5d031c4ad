"""Tensors as JSON data and as the bytes of the binary extension."""

from __future__ import annotations

import base64
import json
import math
import struct
from typing import Any

import msgspec
import numpy as np

from agent.serving.allowance import Allowance
from agent.serving.answers import Refusal
from agent.serving.api.pauses import Pauses
from agent.serving.buffers import aligned
from runtimes.check import shape_text
from runtimes.contract import Array, TensorSpec

_LENGTH = struct.Struct("<I")
_encode = msgspec.json.encode
NOT_IN_JSON = frozenset({"FP16", "BF16"})
FEW_ELEMENTS = 100  # are read or written in one go, in some 40 µs
FEW_BYTES = 64 * 1024
FEW_NUMBERS = 1024


def texts(array: Array, *, encode: bool) -> Any:
    """BYTES as nested lists of strings; as `{"b64": …}` when that is asked for, and for what is not UTF-8."""
    flat = [_text(element, encode=encode) for element in array.flat]
    result = np.empty(len(flat), np.object_)
    result[:] = flat
    return result.reshape(array.shape).tolist()


def _text(element: bytes, *, encode: bool) -> str | dict[str, str]:
    if not encode:
        try:
            return element.decode()
        except UnicodeDecodeError:
            pass
    return {"b64": base64.b64encode(element).decode()}


def to_json(name: str, array: Array, datatype: str) -> msgspec.Raw:
    """The elements in row-major order. What is not finite is NaN, Infinity or -Infinity, as Triton writes it.

    Raises: Refusal (500) when JSON has no way to say them: it was the model that made them.
    """
    if datatype != "BYTES":
        return numbers(array.reshape(-1))
    try:
        return msgspec.Raw(_encode([element.decode() for element in array.flat]))
    except UnicodeDecodeError as error:
        raise Refusal(
            500, f"output '{name}' is not UTF-8 text, which JSON cannot say: ask for it with binary_data true"
        ) from error


def check_in_json(name: str, datatype: str) -> None:
    """Raises: Refusal (400) for an output that is never sent as JSON."""
    if datatype in NOT_IN_JSON:
        raise Refusal(
            400, f"sending {datatype} data via JSON is not supported. Please use the binary data format for output {name}"
        )


def numbers(array: Array, pauses: Pauses | None = None) -> msgspec.Raw:
    """Numbers or truth values as lists that are nested as deep as there are dimensions."""
    if array.size <= FEW_NUMBERS:
        return msgspec.Raw(finite_or_not(array.tolist(), finite=array.dtype.kind != "f" or bool(np.isfinite(array).all())))
    pauses = pauses or Pauses()
    rows = array if array.ndim > 1 else [array[at : at + FEW_NUMBERS] for at in range(0, len(array), FEW_NUMBERS)]
    parts = []
    for row in rows:
        parts.append(bytes(numbers(row, pauses)))
        pauses.rest()
    return msgspec.Raw(b"[%b]" % b",".join(parts if array.ndim > 1 else [part[1:-1] for part in parts]))


def finite_or_not(document: Any, *, finite: bool = False) -> bytes:
    """The document as JSON; `finite`: it is known to have no NaN and no infinity, of which msgspec would make null."""
    text = _encode(document)
    return text if finite or b"null" not in text else json.dumps(document, separators=(",", ":")).encode()


def read_bytes(name: str, data: memoryview, shape: tuple[int, ...], allowance: Allowance | None = None) -> Array:
    """BYTES elements, each after its length as 4 little-endian bytes.  Raises: Refusal (400; 413, 503 as `allowance` has it)."""
    at, end, count, found = 0, len(data), math.prod(shape), 0
    pauses: Pauses | None = None
    if count > FEW_ELEMENTS or end > FEW_BYTES:
        if count * _LENGTH.size > end:
            raise Refusal(400, f"input '{name}' has fewer elements than shape {shape_text(shape)} needs, which are {count}")
        (allowance or Allowance(body_bytes=end)).elements(count, end, f"input '{name}'")
        pauses = Pauses()
    array = np.empty(count, np.object_)
    while at < end:
        if end - at < _LENGTH.size:
            raise Refusal(400, f"incomplete string length at byte {at} of input '{name}'")
        (size,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if size > end - at:
            raise Refusal(400, f"incomplete string data in input '{name}': {size} bytes expected, {end - at} left")
        if found == count:
            raise Refusal(400, f"input '{name}' has more elements, shape {shape_text(shape)} needs {count}")
        array[found] = bytes(data[at : at + size])
        found += 1
        at += size
        if pauses is not None and found % FEW_ELEMENTS == 0:
            pauses.rest()
    if found != count:
        raise Refusal(400, f"input '{name}' has {found} elements, shape {shape_text(shape)} needs {count}")
    return array.reshape(shape)


def from_memory(spec: TensorSpec, shape: tuple[int, ...], memory: memoryview, allowance: Allowance | None = None) -> Array:
    """The tensor in memory that a client shares and can change at any time: what is checked is copied first.

    Raises: Refusal (400; 413, 503 as `allowance` has it).
    """
    if spec.datatype == "BYTES":
        return read_bytes(spec.name, memory, shape, allowance)
    array: Array = np.ndarray(shape, spec.dtype, memory)
    if spec.datatype == "BOOL" or not array.flags.aligned:
        array = aligned(array)
    if spec.datatype == "BOOL":
        check_bool(spec.name, array)
    return array


def is_view(spec: TensorSpec, offset: int) -> bool:
    """Whether `from_memory` gives a view of memory that lies at `offset` of a page, and no copy."""
    return spec.datatype not in {"BYTES", "BOOL"} and offset % spec.dtype.itemsize == 0


def write_bytes(array: Array) -> bytes:
    """BYTES elements in row-major order, each after its length."""
    return b"".join(piece for element in array.flat for piece in (_LENGTH.pack(len(element)), element))


def check_bool(name: str, array: Array) -> None:
    """Raises: Refusal (400) when a byte is neither 0 nor 1: C++ code may do anything with such a bool."""
    if array.size and int(array.view(np.uint8).max()) > 1:
        raise Refusal(400, f"input '{name}' has a byte that is neither 0 nor 1, as BOOL needs")
