"""Arrays as the protocol's tensors, and back. Knows no connection."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.client.errors import InputRejected

Array = NDArray[Any]

DTYPES: dict[str, str] = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
_DATATYPES = {np.dtype(code): name for name, code in DTYPES.items()}
_LENGTH = struct.Struct("<I")


def prepare(name: str, value: Any) -> tuple[str, tuple[int, ...], Array]:
    """Datatype, shape, and a C-contiguous little-endian array of the bytes to send.  Raises: InputRejected."""
    array: Array = np.asarray(value)
    if array.dtype.kind in "OSU":
        return "BYTES", array.shape, np.frombuffer(pack_bytes(name, array), np.uint8)
    datatype = _DATATYPES.get(array.dtype)
    if datatype is None:
        if array.dtype.name == "bfloat16":
            return "BF16", array.shape, np.ascontiguousarray(array).view(np.uint16)
        little = array.dtype.newbyteorder("<")
        datatype = _DATATYPES.get(little)
        if datatype is None:
            raise InputRejected(f"input {name!r} has dtype {array.dtype}, which the protocol cannot carry")
        array = array.astype(little)
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    return datatype, array.shape, array


def raw(array: Array) -> memoryview:
    """The bytes of a C-contiguous array."""
    return memoryview(array.reshape(-1).view(np.uint8).data)


def pack_bytes(name: str, array: Array) -> bytes:
    packed = bytearray()
    for element in array.flat:
        if not isinstance(element, bytes | str):
            raise InputRejected(f"input {name!r} holds a {type(element).__name__}: expected bytes or str")
        data = element.encode() if isinstance(element, str) else bytes(element)
        packed += _LENGTH.pack(len(data)) + data
    return bytes(packed)


def unpack_bytes(data: memoryview, shape: tuple[int, ...]) -> Array:
    array = np.empty(math.prod(shape), np.object_)
    at = 0
    for index in range(array.size):
        (size,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        array[index] = bytes(data[at : at + size])
        at += size
    return array.reshape(shape)


def from_bytes(datatype: str, data: memoryview, shape: tuple[int, ...]) -> Array:
    """The array of a binary tensor, writable and its own; BF16 comes as float32, which holds every value of it."""
    if datatype == "BYTES":
        return unpack_bytes(data, shape)
    if datatype == "BF16":
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32).reshape(shape)
    return np.frombuffer(data, DTYPES[datatype]).reshape(shape).copy()


def from_json(datatype: str, data: Any, shape: tuple[int, ...]) -> Array:
    """The array of a tensor in JSON, flat or nested; `null` for a float is NaN, and BYTES hold bytes as a binary tensor's do."""
    if datatype != "BYTES":
        return np.array(data, dtype=DTYPES[datatype]).reshape(shape)
    array = np.empty(math.prod(shape), np.object_)
    texts: Any = np.array(data, np.object_).flat
    array[:] = [text.encode() for text in texts]
    return array.reshape(shape)
