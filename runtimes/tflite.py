"""TFLite models through LiteRT, or through tflite-runtime on boxes that have only that."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.check import check_feeds
from runtimes.contract import (
    CONTRACT_VERSION,
    DATATYPES,
    Array,
    InputInvalid,
    LoadOptions,
    ModelInvalid,
    Placement,
    Quantization,
    RunFailed,
    RuntimeUnavailable,
    TensorSpec,
)
from runtimes.tflite_graph import has_state

INSTALL = "install one with: pip install 'edge-inference-agent[tflite]'"
IDENTIFIER = b"TFL3"  # at byte 4 of every TFLite flatbuffer
ENGINES = (("LiteRT", "ai_edge_litert"), ("tflite-runtime", "tflite_runtime"))
MAX_INTERPRETERS = 8  # kept per model; each has its own arena, so more would cost memory for callers that come rarely

NewInterpreter = Callable[..., Any]
Shapes = tuple[tuple[int, ...], ...]


class _Broken(Exception):
    """An engine that imports but cannot work here, such as tflite-runtime with NumPy 2."""


class TfliteRuntime:
    """Loads `.tflite` files. It keeps the first engine that proves itself by loading a model."""

    contract_version = CONTRACT_VERSION
    name = "tflite"
    suffixes: tuple[str, ...] = (".tflite",)

    def __init__(self) -> None:
        self._engine: tuple[str, NewInterpreter] | None = None

    def version(self) -> str:
        for label, package in ENGINES:
            try:
                _import(package)
            except (ImportError, AttributeError):
                continue
            return f"{label} {_package_version(package)}"
        raise RuntimeUnavailable(f"neither ai-edge-litert nor tflite-runtime can be imported; {INSTALL}")

    def load(self, path: Path, options: LoadOptions) -> TfliteModel:
        _check_file(path)
        candidates = [self._engine] if self._engine else _engines()
        reasons: list[str] = []
        for label, new_interpreter in candidates:
            try:
                model = TfliteModel(label, new_interpreter, path, options)
            except _Broken as error:
                reasons.append(f"{label}: {error}")
                continue
            self._engine = (label, new_interpreter)
            return model
        raise RuntimeUnavailable(f"no TFLite engine works here ({'; '.join(reasons)}); {INSTALL}")


def _import(package: str) -> NewInterpreter:
    from importlib import import_module

    new_interpreter: NewInterpreter = import_module(f"{package}.interpreter").Interpreter
    return new_interpreter


def _package_version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:
        return "of unknown version"


def _engines() -> list[tuple[str, NewInterpreter]]:
    found = []
    reasons = []
    for label, package in ENGINES:
        try:
            found.append((label, _import(package)))
        except Exception as error:  # noqa: BLE001, PERF203 - a broken engine may raise anything; the next one may work
            reasons.append(f"{package}: {error}")
    if not found:
        raise RuntimeUnavailable(f"no TFLite engine can be imported ({'; '.join(reasons)}); {INSTALL}")
    return found


def _check_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise ModelInvalid(f"{path} cannot be read: {error.strerror}") from error
    if len(head) < 8:
        raise ModelInvalid(f"{path.name} is not a TFLite model: it has only {len(head)} bytes")
    if head[4:] != IDENTIFIER:
        raise ModelInvalid(f"{path.name} is not a TFLite model: bytes 4 to 7 are {head[4:]!r}, expected {IDENTIFIER!r}")


class _Interpreter:
    """One native interpreter and the input shapes it is allocated for. Not thread-safe."""

    def __init__(self, native: Any) -> None:
        self.native = native
        self.shapes: Shapes = tuple(tuple(int(n) for n in d["shape"]) for d in native.get_input_details())

    def resize(self, indexes: Sequence[int], shapes: Shapes) -> None:
        for index, shape in zip(indexes, shapes, strict=True):
            self.native.resize_tensor_input(index, shape)
        self.native.allocate_tensors()
        self.shapes = shapes


class TfliteModel:
    """A pool of interpreters over one memory-mapped file: one per run in progress, each kept at the shapes it ran last."""

    def __init__(self, label: str, new_interpreter: NewInterpreter, path: Path, options: LoadOptions) -> None:
        self._new = partial(_create, new_interpreter, path, options)
        first = self._new()
        inputs, outputs = first.native.get_input_details(), first.native.get_output_details()
        self._inputs = tuple(_spec(d, "input") for d in inputs)
        self._outputs = tuple(_spec(d, "output") for d in outputs)
        for role, specs in (("inputs", self._inputs), ("outputs", self._outputs)):
            if len({s.name for s in specs}) != len(specs):
                raise ModelInvalid(f"{path.name}: two {role} have the same name")
        self._feeds = tuple((s.name, s.dtype, int(d["index"])) for s, d in zip(self._inputs, inputs, strict=True))
        self._indexes = tuple(index for _, _, index in self._feeds)
        self._results = {s.name: int(d["index"]) for s, d in zip(self._outputs, outputs, strict=True)}
        requested = str(options.extra.get("delegate", "cpu"))
        fallback = None if requested == "cpu" else f"delegate {requested!r} is not supported; {label} runs on the CPU"
        self._placement = Placement(requested, "cpu", fallback)
        self._stateful = has_state(path)
        self._idle: list[_Interpreter] = [first]
        self._lock = threading.Lock()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    @property
    def placement(self) -> Placement:
        return self._placement

    @property
    def stateful(self) -> bool:
        return self._stateful

    def sequence(self) -> TfliteSequence:
        return TfliteSequence(self, self._create())

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Array]:
        shapes = self._shapes(feeds)
        interpreter = self._take(shapes)
        try:
            results = self._invoke(interpreter, shapes, feeds, outputs)
        except (RuntimeError, ValueError) as error:
            check_feeds(self._inputs, feeds)
            if interpreter.shapes != shapes:
                raise InputInvalid(f"the engine refused inputs of these shapes: {_plain(error)}") from error
            raise RunFailed(f"the TFLite engine failed: {_plain(error)}") from error
        # An interpreter that failed is not kept: what state it is in is unknown.
        self._give_back(interpreter)
        return results

    def _invoke(
        self, interpreter: _Interpreter, shapes: Shapes, feeds: Mapping[str, Array], outputs: Sequence[str] | None
    ) -> list[Array]:
        native = interpreter.native
        if interpreter.shapes != shapes:
            check_feeds(self._inputs, feeds)
            interpreter.resize(self._indexes, shapes)
        native.reset_all_variables()  # a stateful model must not carry one caller's state into another's answer
        return self._fill_and_invoke(native, feeds, outputs)

    def _shapes(self, feeds: Mapping[str, Array]) -> Shapes:
        try:
            return tuple([feeds[name].shape for name, _, _ in self._feeds])
        except KeyError:
            check_feeds(self._inputs, feeds)
            raise

    def _fill_and_invoke(self, native: Any, feeds: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:
        for name, dtype, index in self._feeds:
            array = feeds[name]
            if array.dtype != dtype:
                check_feeds(self._inputs, feeds)
            native.set_tensor(index, array)
        native.invoke()
        return [native.get_tensor(self._results[name]) for name in (outputs or self._results)]

    def _take(self, shapes: Shapes) -> _Interpreter:
        """The idle interpreter that last ran these shapes; else a new one while few are idle; else the one longest unused."""
        with self._lock:
            for at in range(len(self._idle) - 1, -1, -1):
                if self._idle[at].shapes == shapes:
                    return self._idle.pop(at)
            if len(self._idle) >= MAX_INTERPRETERS // 2:
                return self._idle.pop(0)
        return self._create()

    def _create(self) -> _Interpreter:
        try:
            return self._new()
        except (ModelInvalid, _Broken) as error:
            raise RunFailed(f"another interpreter cannot be made: {error}") from error

    def _give_back(self, interpreter: _Interpreter) -> None:
        with self._lock:
            if len(self._idle) < MAX_INTERPRETERS:
                self._idle.append(interpreter)

    def close(self) -> None:
        with self._lock:
            self._idle.clear()


class TfliteSequence:
    """One interpreter of its own, whose variables nobody resets."""

    def __init__(self, model: TfliteModel, interpreter: _Interpreter) -> None:
        self._model = model
        self._interpreter: _Interpreter | None = interpreter
        self._begun = False

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Array]:
        model, interpreter = self._model, self._interpreter
        if interpreter is None:
            raise RunFailed("this sequence has ended")
        shapes = model._shapes(feeds)  # noqa: SLF001 - the two are one thing
        check_feeds(model.inputs, feeds)  # before anything is changed
        if self._begun and shapes != interpreter.shapes:
            raise InputInvalid("the shapes of the inputs must stay as they were in the sequence's first request")
        try:
            if shapes != interpreter.shapes:
                interpreter.resize(model._indexes, shapes)  # noqa: SLF001
            self._begun = True
            return model._fill_and_invoke(interpreter.native, feeds, outputs)  # noqa: SLF001
        except (RuntimeError, ValueError) as error:
            self.close()
            raise RunFailed(f"the TFLite engine failed: {_plain(error)}") from error

    def close(self) -> None:
        self._interpreter = None


def _create(new_interpreter: NewInterpreter, path: Path, options: LoadOptions) -> _Interpreter:
    try:
        native = new_interpreter(model_path=str(path), num_threads=options.threads or None)
        native.allocate_tensors()
        return _Interpreter(native)
    except (ValueError, RuntimeError) as error:
        raise ModelInvalid(f"{path.name} is not a model that the TFLite engine can load: {_plain(error)}") from error
    except (ImportError, AttributeError, SystemError) as error:
        raise _Broken(f"it imports but cannot make an interpreter: {error}") from error


def _plain(error: Exception) -> str:
    """The engine's message in one line; it repeats itself for every tensor concerned."""
    return " ".join(str(error).split())[:200]


def _spec(detail: Mapping[str, Any], role: str) -> TensorSpec:
    dtype = np.dtype(detail["dtype"])
    datatype = "BYTES" if dtype.kind in "SUO" else DATATYPES.get(dtype)
    if datatype is None:
        raise ModelInvalid(f"{role} {detail['name']!r} has type {dtype}, which cannot cross the socket")
    shape = detail.get("shape_signature")
    if shape is None or len(shape) == 0:
        shape = detail["shape"]
    return TensorSpec(detail["name"], datatype, tuple(int(n) for n in shape), _quantization(detail))


def _quantization(detail: Mapping[str, Any]) -> Quantization | None:
    parameters = detail["quantization_parameters"]
    scales, zeros = parameters["scales"], parameters["zero_points"]
    if len(scales) == 0 or len(scales) != len(zeros):
        return None
    axis = int(parameters["quantized_dimension"]) if len(scales) > 1 else None
    return Quantization(tuple(float(s) for s in scales), tuple(int(z) for z in zeros), axis)
