"""Tensors as JSON data and as the bytes of the binary extension."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any, NoReturn

import msgspec
import numpy as np

from agent.serving.answers import Refusal
from agent.serving.transport.buffers import aligned
from runtimes.check import shape_text
from runtimes.contract import DTYPES, Array, TensorSpec

_LENGTH = struct.Struct("<I")
NOT_IN_JSON = frozenset({"FP16", "BF16"})
MAX_DEPTH = 100
_EXPECTED = {"b": "true or false", "i": "whole numbers", "u": "whole numbers"}


def from_json(name: str, raw: msgspec.Raw, datatype: str, shape: tuple[int, ...]) -> Array:
    """The array in `raw`, a flat or nested JSON list.  Raises: Refusal (400)."""
    if datatype in NOT_IN_JSON:
        raise Refusal(
            400, f"receiving {datatype} data via JSON is not supported. Please use the binary data format for input {name}"
        )
    text = bytes(raw)
    if datatype != "BYTES":
        if b'"' in text:  # NumPy would give every element the room of the longest text
            _refuse(name, datatype, _EXPECTED.get(DTYPES[datatype].kind, "numbers"))
        if text.count(b",") > math.prod(shape):  # so that the memory it takes is what the shape says
            raise Refusal(
                400, f"input '{name}' has more elements than shape {shape_text(shape)}, which needs {math.prod(shape)}"
            )
    try:
        values = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f"the data of input '{name}' cannot be read: {error}") from error
    if not isinstance(values, list):
        values = [values]
    if datatype == "BYTES":
        flat = list(_leaves(values, 0))
        if not all(isinstance(value, str) for value in flat):
            _refuse(name, datatype, "strings")
        array = np.empty(len(flat), np.object_)
        array[:] = [value.encode() for value in flat]
        return _shaped(name, array, shape)
    try:
        array = np.array(values)
    except ValueError as error:  # lists of different lengths
        raise Refusal(400, f"the data of input '{name}' is not a regular list for shape {shape_text(shape)}") from error
    if array.ndim > 1 and array.shape != shape and array.size == math.prod(shape):
        raise Refusal(400, f"the data of input '{name}' has shape {shape_text(array.shape)}, but {shape_text(shape)} is said")
    return _shaped(name, _converted(name, array, datatype), shape)


def _shaped(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    if array.size != math.prod(shape):
        raise Refusal(400, f"input '{name}' has {array.size} elements, shape {shape_text(shape)} needs {math.prod(shape)}")
    return array.reshape(shape) if array.dtype == np.object_ else aligned(array.reshape(shape))


def _converted(name: str, array: Array, datatype: str) -> Array:
    dtype = DTYPES[datatype]
    if array.size == 0:
        return np.zeros(0, dtype)
    if dtype.kind == "b":
        if array.dtype.kind != "b":
            _refuse(name, datatype, _EXPECTED["b"])
        return array
    if dtype.kind in "iu":
        if array.dtype.kind not in "iu":
            _refuse(name, datatype, _EXPECTED["i"])
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        if int(array.min()) < low or int(array.max()) > high:
            _refuse(name, datatype, f"whole numbers from {low} to {high}")
        return array.astype(dtype)
    if array.dtype.kind not in "iuf":
        _refuse(name, datatype, "numbers")
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if not np.isfinite(converted).all():
        _refuse(name, datatype, f"numbers up to {np.finfo(dtype).max:g}")
    return converted


def _refuse(name: str, datatype: str, expected: str) -> NoReturn:
    raise Refusal(400, f"the data of input '{name}' does not fit {datatype}: expected {expected}")


def _leaves(values: list[Any], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise Refusal(400, f"the data is nested deeper than {MAX_DEPTH} lists")
    for value in values:
        if isinstance(value, list):
            yield from _leaves(value, depth + 1)
        else:
            yield value


def from_values(name: str, text: bytes, datatype: str) -> Array:
    """The array in JSON that says no shape: numbers, nested as deep as it has dimensions. BYTES may be `{"b64": …}`. FP16 and BF16 are
    rounded to.  Raises: Refusal (400).
    """
    if datatype != "BYTES" and b'"' in text:
        _refuse(name, datatype, _EXPECTED.get(DTYPES[datatype].kind, "numbers"))
    try:
        values = msgspec.json.decode(text)
        if datatype == "BYTES":
            return _texts_array(name, values)
        array = np.array(values)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f"the data of input '{name}' cannot be read: {error}") from error
    except ValueError as error:
        raise Refusal(400, f"the data of input '{name}' is not a regular list: {error}") from error
    if datatype == "BF16":
        return _rounded(_converted(name, array, "FP32")).reshape(array.shape)
    return _converted(name, array, datatype).reshape(array.shape)


def _rounded(array: Array) -> Array:
    """float32 as the 16 bits of the nearest BF16, the even one of two."""
    bits = array.view(np.uint32)
    rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def _texts_array(name: str, values: Any) -> Array:
    shape: list[int] = []
    flat = [values]
    while flat and isinstance(flat[0], list):
        size = len(flat[0])
        if len(shape) == MAX_DEPTH or any(not isinstance(row, list) or len(row) != size for row in flat):
            raise Refusal(400, f"the data of input '{name}' is not a regular list of at most {MAX_DEPTH} dimensions")
        shape.append(size)
        flat = [value for row in flat for value in row]
    array = np.empty(len(flat), np.object_)
    array[:] = [_text_of(name, value) for value in flat]
    return array.reshape(shape)


def _text_of(name: str, value: object) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, dict) and set(value) == {"b64"} and isinstance(value["b64"], str):
        try:
            return base64.b64decode(value["b64"], validate=True)
        except ValueError as error:
            raise Refusal(400, f"the data of input '{name}' is not base64: {error}") from error
    _refuse(name, "BYTES", 'strings or {"b64": …}')


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


def to_json(name: str, array: Array, datatype: str) -> list[Any]:
    """The elements in row-major order.  Raises: Refusal (400) when JSON has no way to say them."""
    if datatype in NOT_IN_JSON:
        raise Refusal(
            400, f"sending {datatype} data via JSON is not supported. Please use the binary data format for output {name}"
        )
    if datatype == "BYTES":
        try:
            return [element.decode() for element in array.flat]
        except UnicodeDecodeError as error:
            raise Refusal(400, f"output '{name}' is not UTF-8 text: ask for it with binary_data true") from error
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise Refusal(
            400, f"output '{name}' has values that are not finite, which JSON cannot say: ask for it with binary_data true"
        )
    values: list[Any] = array.reshape(-1).tolist()
    return values


def read_bytes(name: str, data: memoryview, shape: tuple[int, ...]) -> Array:
    """BYTES elements, each after its length as 4 little-endian bytes.  Raises: Refusal (400)."""
    elements: list[bytes] = []
    at, end, count = 0, len(data), math.prod(shape)
    while at < end:
        if end - at < _LENGTH.size:
            raise Refusal(400, f"incomplete string length at byte {at} of input '{name}'")
        (size,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if size > end - at:
            raise Refusal(400, f"incomplete string data in input '{name}': {size} bytes expected, {end - at} left")
        elements.append(bytes(data[at : at + size]))
        at += size
        if len(elements) > count:
            break
    if len(elements) != count:
        more = "more" if len(elements) > count else str(len(elements))
        raise Refusal(400, f"input '{name}' has {more} elements, shape {shape_text(shape)} needs {count}")
    array = np.empty(count, np.object_)
    array[:] = elements
    return array.reshape(shape)


def from_memory(spec: TensorSpec, shape: tuple[int, ...], memory: memoryview) -> Array:
    """The tensor in memory that a client shares and can change at any time: what is checked is copied first.  Raises: Refusal (400)."""
    if spec.datatype == "BYTES":
        return read_bytes(spec.name, memory, shape)
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
