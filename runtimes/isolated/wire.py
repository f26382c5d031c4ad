"""What the two processes of an isolated model say to each other, and the memory that they share.

A slot is a socket pair and a memfd, for one run at a time: the inputs lie at its beginning, the outputs behind them, each at a
multiple of 64 bytes. Either side may make the memfd larger and says its size; none makes it smaller.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np

from runtimes import contract
from runtimes.contract import Array, Quantization, Scalar, Signature, TensorSpec

MAX_MESSAGE_BYTES = 128 * 1024  # names and shapes only; more does not fit into a socket's buffer
ALIGNMENT = 64
LEAST_BYTES = 64 * 1024
TEXT = "text"  # the kind of an array of byte strings: each is its length, 4 bytes, and itself


class Load(msgspec.Struct, tag=True):
    runtime: str
    path: str
    threads: int
    extra: dict[str, Scalar]
    data: dict[str, str] | None = None
    libraries: tuple[str, ...] = ()


class Spec(msgspec.Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    scales: tuple[float, ...] = ()
    zero_points: tuple[int, ...] = ()
    axis: int | None = None
    optional: bool = False
    any_rank: bool = False

    @classmethod
    def of(cls, spec: TensorSpec) -> Spec:
        q = spec.quantization or Quantization((), ())
        return cls(
            spec.name, spec.datatype, spec.shape, q.scales, q.zero_points, q.axis, spec.optional, spec.any_rank
        )  # fmt: skip

    def spec(self) -> TensorSpec:
        quantization = Quantization(self.scales, self.zero_points, self.axis) if self.scales else None
        return TensorSpec(self.name, self.datatype, self.shape, quantization, self.optional, self.any_rank)


class Signed(msgspec.Struct, omit_defaults=True):
    """A signature."""

    name: str
    inputs: dict[str, Spec]
    outputs: dict[str, Spec]

    @classmethod
    def of(cls, signature: Signature) -> Signed:
        inputs, outputs = ({name: Spec.of(spec) for name, spec in s.items()} for s in (signature.inputs, signature.outputs))
        return cls(signature.name, inputs, outputs)

    def signature(self) -> Signature:
        inputs, outputs = ({name: spec.spec() for name, spec in s.items()} for s in (self.inputs, self.outputs))
        return Signature(self.name, inputs, outputs)


class Loaded(msgspec.Struct, tag=True):
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    requested: str
    actual: str
    fallback: str | None
    stateful: bool
    signatures: tuple[Signed, ...] = ()


class NewSlot(msgspec.Struct, tag=True):
    """Comes with two descriptors: the socket and the memfd."""


class Sequence_(msgspec.Struct, tag=True):  # noqa: N801 - the plain name is typing's
    """A sequence begins (`opens`) or ends. Nothing answers; a run that names one which could not begin fails."""

    number: int
    opens: bool


class Tensor(msgspec.Struct):
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int


class Run(msgspec.Struct, tag=True):
    size_bytes: int
    feeds: list[Tensor]
    outputs: list[str] | None
    sequence: int = 0


class Ran(msgspec.Struct, tag=True):
    size_bytes: int
    arrays: list[Tensor]


class Failed(msgspec.Struct, tag=True):
    """`kind` is the name of the exception that the other side raises."""

    kind: str
    text: str


encode = msgspec.msgpack.encode
decode_order: msgspec.msgpack.Decoder[Load | NewSlot | Sequence_] = msgspec.msgpack.Decoder(Load | NewSlot | Sequence_)
decode_loaded: msgspec.msgpack.Decoder[Loaded | Failed] = msgspec.msgpack.Decoder(Loaded | Failed)
decode_run: msgspec.msgpack.Decoder[Run] = msgspec.msgpack.Decoder(Run)
decode_ran: msgspec.msgpack.Decoder[Ran | Failed] = msgspec.msgpack.Decoder(Ran | Failed)


class Arena:
    """A memfd, mapped. Views of an older, smaller mapping stay valid: they are the same memory."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.map = mmap.mmap(fd, os.fstat(fd).st_size)

    @property
    def size_bytes(self) -> int:
        return len(self.map)

    def reserve(self, size_bytes: int) -> None:
        """Makes it at least so large."""
        if size_bytes > len(self.map):
            os.ftruncate(self.fd, 1 << (size_bytes - 1).bit_length())
            self.map = mmap.mmap(self.fd, os.fstat(self.fd).st_size)

    def follow(self, size_bytes: int) -> None:
        """Maps what the other side has made of it."""
        if size_bytes > len(self.map):
            self.map = mmap.mmap(self.fd, size_bytes)

    def put(self, arrays: Iterable[tuple[str, Array]], begin: int) -> list[Tensor]:
        """Writes them, from `begin` on."""
        found: list[tuple[Tensor, Any]] = []
        end = begin
        for name, array in arrays:
            content = _texts(array) if array.dtype == np.object_ else array
            size = len(content) if isinstance(content, bytes) else array.nbytes
            kind = TEXT if isinstance(content, bytes) else array.dtype.str
            found.append((Tensor(name, kind, array.shape, end, size), content))
            end = -(-(end + size) // ALIGNMENT) * ALIGNMENT
        self.reserve(end)
        for tensor, content in found:
            if isinstance(content, bytes):
                self.map[tensor.offset : tensor.offset + tensor.size] = content
            elif tensor.size:
                view(self.map, tensor)[...] = content
        return [tensor for tensor, _ in found]


def view(memory: Any, tensor: Tensor) -> Array:
    """The tensor where it lies; texts are copied."""
    if tensor.kind == TEXT:
        return _array(bytes(memoryview(memory)[tensor.offset : tensor.offset + tensor.size]), tensor.shape)
    dtype = np.dtype(tensor.kind)
    if not tensor.size:
        return np.empty(tensor.shape, dtype)
    return np.frombuffer(memory, dtype, tensor.size // dtype.itemsize, tensor.offset).reshape(tensor.shape)


def end_of(tensors: Sequence[Tensor]) -> int:
    """The next aligned offset behind them."""
    return max([-(-(t.offset + t.size) // ALIGNMENT) * ALIGNMENT for t in tensors], default=0)


def _texts(array: Array) -> bytes:
    return b"".join([struct.pack("<I", len(element)) + element for element in array.flat])


def _array(data: bytes, shape: tuple[int, ...]) -> Array:
    elements, at = [], 0
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        elements.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    array = np.empty(len(elements), np.object_)
    array[:] = elements
    return array.reshape(shape)


def error_of(failed: Failed) -> Exception:
    """The exception that the child had, of the contract where it is one."""
    if failed.kind == "MemoryError":
        return MemoryError(failed.text)
    kind = getattr(contract, failed.kind, None)
    if isinstance(kind, type) and issubclass(kind, contract.RuntimeFailure):
        return kind(failed.text)
    return contract.RunFailed(f"{failed.kind}: {failed.text}")
