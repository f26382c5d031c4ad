"""A loaded engine: its tensors, and runs of it, each on a context with memory of its own."""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtimes.check import check_feeds, shape_text
from runtimes.contract import Array, InputInvalid, ModelInvalid, Placement, RunFailed, TensorSpec
from runtimes.tensorrt.cuda import Cuda

DATATYPES = {
    "FLOAT": "FP32", "HALF": "FP16", "BF16": "BF16", "INT8": "INT8", "UINT8": "UINT8", "INT32": "INT32", "INT64": "INT64", "BOOL": "BOOL",
}  # fmt: skip
"""TensorRT's name of a type → the protocol's. Others (FP8, FP4, INT4) cannot cross a request."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The least and the largest shape of an input of free size."""

    least: tuple[int, ...]
    most: tuple[int, ...]


@dataclass(slots=True)
class _Room:
    """One context, its stream, and its memory on the GPU: tensor → address and bytes."""

    context: Any
    stream: Any
    memory: dict[str, tuple[int, int]] = field(default_factory=dict)


class EngineModel:
    """Runs take the contexts in turn; who finds none waits. Sizes of inputs are those of the engine's first profile."""

    def __init__(self, trt: Any, cuda: Cuda, runtime: Any, engine: Any, contexts: int, actual: str) -> None:
        self._cuda, self._runtime, self._engine = cuda, runtime, engine  # the engine needs its runtime while it lives
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        given = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._inputs = tuple(_spec(trt, engine, name, "input") for name in given)
        self._outputs = tuple(_spec(trt, engine, name, "output") for name in names if name not in given)
        self._bounds = {spec.name: _bounds(engine, spec.name) for spec in self._inputs if -1 in spec.shape}
        self._placement = Placement("tensorrt", actual)
        self._rooms: queue.SimpleQueue[_Room] = queue.SimpleQueue()
        self._all: list[_Room] = []
        try:
            for _ in range(contexts):
                self._add_room()
        except BaseException:
            self.close()
            raise

    def _add_room(self) -> None:
        context = self._engine.create_execution_context()
        if context is None:
            raise MemoryError("the GPU has not enough memory for what the engine needs while it runs")
        room = _Room(context, self._cuda.new_stream())
        self._all.append(room)
        self._rooms.put(room)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    @property
    def placement(self) -> Placement:
        return self._placement

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Array]:
        check_feeds(self._inputs, feeds)
        for name, bounds in self._bounds.items():
            _check_bounds(name, feeds[name].shape, bounds)
        room = self._rooms.get()
        try:
            found = self._run(room, feeds)
        finally:
            self._rooms.put(room)
        return [found[name] for name in (outputs or found)]

    def _run(self, room: _Room, feeds: Mapping[str, Array]) -> dict[str, Array]:
        cuda, context, stream = self._cuda, room.context, room.stream
        for spec in self._inputs:
            array = feeds[spec.name]
            if -1 in spec.shape and not context.set_input_shape(spec.name, array.shape):
                raise InputInvalid(f"the engine refused input {spec.name!r} of shape {shape_text(array.shape)}")
            address = self._address(room, spec.name, array.nbytes)
            cuda.to_gpu(address, array.ctypes.data, array.nbytes, stream)
        found = {}
        for spec in self._outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            found[spec.name] = array = np.empty(shape, spec.dtype)
            self._address(room, spec.name, array.nbytes)
        if not context.execute_async_v3(stream_handle=int(stream)):
            raise RunFailed("TensorRT could not run the engine")
        for name, array in found.items():
            cuda.from_gpu(array.ctypes.data, room.memory[name][0], array.nbytes, stream)
        cuda.wait(stream)
        return found

    def _address(self, room: _Room, name: str, size: int) -> int:
        """Memory for a tensor in this room, as large as it was needed so far."""
        address, has = room.memory.get(name, (0, 0))
        if has < size or not address:
            if address:
                self._cuda.free(room.memory.pop(name)[0])
            address = self._cuda.allocate(max(size, 1))
            room.memory[name] = (address, size)
            room.context.set_tensor_address(name, address)
        return address

    def close(self) -> None:
        for room in self._all:
            for address, _ in room.memory.values():
                self._cuda.free(address)
            room.memory.clear()
            self._cuda.end_stream(room.stream)
            room.context = None
        self._all.clear()
        self._engine = self._runtime = None


def _spec(trt: Any, engine: Any, name: str, role: str) -> TensorSpec:
    kind = engine.get_tensor_dtype(name).name
    datatype = DATATYPES.get(kind)
    if datatype is None:
        raise ModelInvalid(f"{role} {name!r} is {kind}, which no request can carry: cast it inside the model")
    if engine.get_tensor_location(name) == trt.TensorLocation.HOST:
        raise ModelInvalid(
            f"{role} {name!r} is a shape, which TensorRT wants before the run: export the model with it as a constant"
        )
    shape = tuple(engine.get_tensor_shape(name))
    return TensorSpec(name, datatype, tuple(size if size >= 0 else -1 for size in shape))


def _bounds(engine: Any, name: str) -> Bounds:
    least, _, most = engine.get_tensor_profile_shape(name, 0)
    return Bounds(tuple(least), tuple(most))


def _check_bounds(name: str, shape: Sequence[int], bounds: Bounds) -> None:
    if any(not least <= size <= most for least, size, most in zip(bounds.least, shape, bounds.most, strict=True)):
        raise InputInvalid(
            f"input {name!r} has shape {shape_text(shape)}; the engine was built for {shape_text(bounds.least)} to {shape_text(bounds.most)}"
        )
