"""A loaded TFLite file: pools of interpreters, and interpreters of sequences.

An interpreter is native, not thread-safe, and keeps what a model remembers. A request without a sequence gets one in which
nobody's run has left anything: its variables are reset, or, where the engine cannot reset what it holds (resources), it is new
and used once.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.check import check_feeds
from runtimes.contract import Array, InputInvalid, ModelInvalid, Placement, RunFailed, Signature, TensorSpec
from runtimes.messages import plain
from runtimes.tflite_graph import Facts
from runtimes.tflite_interface import Method
from runtimes.tflite_refusals import not_loaded
from runtimes.usual_sizes import UsualSizes, resident_bytes

MAX_INTERPRETERS = 8  # kept per signature; each has its own arena, so more would cost memory for callers that come rarely
SIZES = tuple(1 << n for n in range(1, 17))  # tried for free dimensions where 1, which the file has for them, is too small
MAX_ELEMENTS = 1 << 20  # of an input that is tried

NewInterpreter = Callable[..., Any]
Shapes = tuple[tuple[int, ...], ...]


class BrokenEngine(Exception):
    """An engine that imports but cannot work here, such as tflite-runtime with NumPy 2."""


class Interpreter:
    """One native interpreter, the input shapes that its first subgraph is allocated for, and those that it ran last for its
    pool.
    """

    def __init__(self, native: Any, allocated: Shapes) -> None:
        self.native = native
        self.allocated = allocated
        self.last: Shapes | None = allocated
        self.runners: dict[str, Any] = {}

    def resize(self, indexes: Sequence[int], shapes: Shapes) -> None:
        self.runners.clear()
        for index, shape in zip(indexes, shapes, strict=True):
            self.native.resize_tensor_input(index, shape)
        self.native.allocate_tensors()
        self.allocated = shapes

    def runner(self, key: str) -> Any:
        """What runs a signature; it resizes and allocates as it needs. While it is kept, the engine refuses to run the first
        subgraph.
        """
        if key not in self.runners:
            self.runners[key] = self.native.get_signature_runner(key)
        return self.runners[key]


class _Pool:
    """The idle interpreters of one method, each kept at the shapes it ran last."""

    def __init__(self, method: Method, new: Callable[[], Interpreter], *, single_use: bool) -> None:
        self.method = method
        self.key = method.key
        self.feeds = [(feed.name, feed.dtype, feed.at) for feed in method.feeds]
        self.results = method.results
        self.is_plain = method.key is None and not method.has_scalars and not method.narrow
        self._new = new
        self._single_use = single_use
        self.idle: list[Interpreter] = []
        self._lock = threading.Lock()

    def take(self, shapes: Shapes) -> Interpreter:
        """The idle interpreter that last ran these shapes; else a new one while few are idle; else the one longest unused."""
        with self._lock:
            for at in range(len(self.idle) - 1, -1, -1):
                if self.idle[at].last == shapes:
                    return self.idle.pop(at)
            if len(self.idle) >= MAX_INTERPRETERS // 2:
                return self.idle.pop(0)
        interpreter = self._new()
        if self.key is not None:
            interpreter.last = None  # what it is allocated for is another method
        return interpreter

    def give_back(self, interpreter: Interpreter) -> None:
        if self._single_use:
            return
        with self._lock:
            if len(self.idle) < MAX_INTERPRETERS:
                self.idle.append(interpreter)

    def clear(self) -> None:
        with self._lock:
            self.idle.clear()


class TfliteModel:
    """The first of `methods` is the default one. `first` is an interpreter that nothing ran in yet."""

    def __init__(
        self,
        methods: Sequence[Method],
        first: Interpreter,
        new: Callable[[], Interpreter],
        facts: Facts,
        placement: Placement,
    ) -> None:
        self._new = new
        self._stateful = facts.variables or facts.resources
        # Only the variables of a graph that is allocated can be reset.
        single_use = facts.resources or (facts.variables and len(methods) > 1)
        self._resets = not single_use and (facts.variables or not facts.understood)
        pools = [_Pool(method, self._create, single_use=single_use) for method in methods]
        self._default, self._others = pools[0], {name: pool for pool in pools[1:] for name in pool.method.results}
        if self._default.key is not None:
            first.last = None
        self._default.idle.append(first)
        free = any(-1 in spec.shape for method in methods for spec in method.inputs)
        self._usual = UsualSizes() if free else None
        self._signatures = tuple(method.signature for method in methods if method.signature is not None)
        self._placement = placement

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._default.method.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._default.method.outputs

    @property
    def signatures(self) -> tuple[Signature, ...]:
        return self._signatures

    @property
    def placement(self) -> Placement:
        return self._placement

    @property
    def stateful(self) -> bool:
        return self._stateful

    def sequence(self) -> TfliteSequence:
        return TfliteSequence(self, self._create())

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Array]:
        pool = self.pool(outputs) if self._others else self._default
        shapes = shapes_of(pool, feeds)
        before = 0
        if self._usual is not None and self._usual.grows(sum([array.nbytes for array in feeds.values()])):
            before = resident_bytes()
        interpreter = pool.take(shapes)
        try:
            if interpreter.last != shapes:
                fit(interpreter, pool, feeds, shapes)
            if self._resets:
                interpreter.native.reset_all_variables()
            results = invoke(interpreter, pool, feeds, outputs)
        except (RuntimeError, ValueError) as error:
            check_feeds(pool.method.inputs, feeds)
            if interpreter.last != shapes and not (pool.key is None and interpreter.allocated == shapes):
                raise InputInvalid(f"the engine refused inputs of these shapes: {plain(str(error))}") from error
            raise RunFailed(f"the TFLite engine failed: {plain(str(error))}") from error
        # An interpreter that failed is not kept: what state it is in is unknown.
        interpreter.last = shapes
        self._end_run(pool, interpreter, sum([array.nbytes for array in feeds.values()]) if self._usual else 0, before)
        return results

    @property
    def grown_bytes(self) -> int:
        """What runs have left with the engine, beyond what loading took."""
        return 0 if self._usual is None else self._usual.grown_bytes

    def _end_run(self, pool: _Pool, interpreter: Interpreter, size_bytes: int, before: int) -> None:
        """Keeps the interpreter, but not after an unusual run: then all give their memory back."""
        usual = self._usual
        if usual is None:
            pool.give_back(interpreter)
            return
        grows = usual.grows(size_bytes)
        if not usual.keeps(size_bytes):
            pool.clear()
            return
        if grows:
            usual.grown_bytes += max(0, resident_bytes() - before)
        pool.give_back(interpreter)

    def pool(self, outputs: Sequence[str] | None) -> _Pool:
        """The interpreters of the method that has these outputs."""
        return self._others.get(outputs[0], self._default) if self._others and outputs else self._default

    def _create(self) -> Interpreter:
        try:
            return self._new()
        except (ModelInvalid, BrokenEngine) as error:
            raise RunFailed(f"another interpreter cannot be made: {error}") from error

    def close(self) -> None:
        for pool in (self._default, *self._others.values()):
            pool.clear()


class TfliteSequence:
    """One interpreter of its own, whose variables nobody resets. Its requests may ask for different signatures."""

    def __init__(self, model: TfliteModel, interpreter: Interpreter) -> None:
        self._model = model
        self._interpreter: Interpreter | None = interpreter
        self._shapes: dict[str | None, Shapes] = {}  # of each method that was run

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Array]:
        interpreter = self._interpreter
        if interpreter is None:
            raise RunFailed("this sequence has ended")
        pool = self._model.pool(outputs)
        key, shapes = pool.key, shapes_of(pool, feeds)
        check_feeds(pool.method.inputs, feeds)  # before anything is changed
        if self._shapes.setdefault(key, shapes) != shapes:
            raise InputInvalid("the shapes of the inputs must stay as they were in the sequence's first request")
        try:
            if key is None:
                interpreter.runners.clear()
                if interpreter.allocated != shapes:
                    fit(interpreter, pool, feeds, shapes)
            return invoke(interpreter, pool, feeds, outputs)
        except (RuntimeError, ValueError) as error:
            self.close()
            raise RunFailed(f"the TFLite engine failed: {plain(str(error))}") from error

    def close(self) -> None:
        self._interpreter = None


def shapes_of(pool: _Pool, feeds: Mapping[str, Array]) -> Shapes:
    try:
        return tuple([feeds[name].shape for name, _, _ in pool.feeds])
    except KeyError:
        check_feeds(pool.method.inputs, feeds)
        raise


def fit(interpreter: Interpreter, pool: _Pool, feeds: Mapping[str, Array], shapes: Shapes) -> None:
    """Raises: InputInvalid; RuntimeError, ValueError when the engine refuses the shapes."""
    check_feeds(pool.method.inputs, feeds)
    if pool.key is None:
        interpreter.resize([feed.at for feed in pool.method.feeds], shapes)


def invoke(interpreter: Interpreter, pool: _Pool, feeds: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:
    """One run.  Raises: InputInvalid; RuntimeError, ValueError."""
    if not pool.is_plain:
        return _invoke_with_care(interpreter, pool.method, feeds, outputs)
    native, results = interpreter.native, pool.results
    for name, dtype, at in pool.feeds:
        array = feeds[name]
        if array.dtype != dtype:
            check_feeds(pool.method.inputs, feeds)
        native.set_tensor(at, array)
    native.invoke()
    return [native.get_tensor(results[name]) for name in (outputs or results)]


def _invoke_with_care(
    interpreter: Interpreter, method: Method, feeds: Mapping[str, Array], outputs: Sequence[str] | None
) -> list[Array]:
    """A run of a signature, or with scalars: the engine gives these as NumPy's, and takes a text only in a way of its own."""
    native, results = interpreter.native, method.results
    check_feeds(method.inputs, feeds)
    for name, (least, most) in method.narrow.items():
        if name in feeds and feeds[name].size and not (least <= feeds[name].min() and feeds[name].max() <= most):
            raise InputInvalid(f"input {name!r} has values of 4 bits or fewer: they must be from {least} to {most}")
    given = {name: _scalar_text(array) if array.ndim == 0 else array for name, array in feeds.items()}
    if method.key is not None:
        found = interpreter.runner(method.key)(**{feed.at: given[feed.name] for feed in method.feeds})
        return [np.asarray(found[results[name]]) for name in (outputs or results)]
    for feed in method.feeds:
        native.set_tensor(feed.at, given[feed.name])
    native.invoke()
    return [np.asarray(native.get_tensor(results[name])) for name in (outputs or results)]


def _scalar_text(array: Array) -> Array:
    """One text without dimensions as the engine reads it: of an object it would read the address."""
    if array.dtype != np.object_:
        return array
    content = bytes(array.item())
    return np.ndarray((), f"S{len(content)}", content or None)


def create(new_interpreter: NewInterpreter, path: Path, threads: int, shapes: Shapes | None = None) -> Interpreter:
    """An interpreter, allocated for the shapes in the file or for these.  Raises: ModelInvalid, BrokenEngine."""
    try:
        native = new_interpreter(model_path=str(path), num_threads=threads or None)
        return Interpreter(native, allocate(native, shapes))
    except (ValueError, RuntimeError) as error:
        raise ModelInvalid(not_loaded(path, error)) from error
    except (ImportError, AttributeError, SystemError) as error:
        raise BrokenEngine(f"it imports but cannot make an interpreter: {error}") from error


def allocate(native: Any, shapes: Shapes | None = None) -> Shapes:
    """Gives the input shapes that it is allocated for: `shapes`, or those in the file. Where these stand for free ones and are
    too small for the model, the first larger ones that it takes.  Raises: RuntimeError, ValueError.
    """
    details = native.get_input_details()
    in_file: Shapes = tuple(tuple(int(n) for n in detail["shape"]) for detail in details)
    if shapes is not None and shapes != in_file:
        return _allocated(native, details, shapes)
    try:
        native.allocate_tensors()
    except (RuntimeError, ValueError):
        for larger in _larger(details):
            with contextlib.suppress(RuntimeError, ValueError):
                return _allocated(native, details, larger)
        raise
    return in_file


def _allocated(native: Any, details: Sequence[Mapping[str, Any]], shapes: Shapes) -> Shapes:
    for detail, shape in zip(details, shapes, strict=True):
        native.resize_tensor_input(int(detail["index"]), shape)
    native.allocate_tensors()
    return shapes


def _larger(details: Sequence[Mapping[str, Any]]) -> Iterator[Shapes]:
    """Shapes with larger sizes where any goes: first behind the first dimension, which mostly counts rows, then everywhere."""
    free = [tuple(int(n) for n in detail.get("shape_signature", ())) for detail in details]
    if not any(-1 in shape for shape in free):
        return
    for keeps_rows in (True, False):
        for size in SIZES:
            shapes = tuple(
                tuple(
                    (1 if keeps_rows and at == 0 and len(shape) > 1 else size) if n == -1 else n for at, n in enumerate(shape)
                )
                for shape in (s or tuple(int(n) for n in d["shape"]) for s, d in zip(free, details, strict=True))
            )
            if all(math.prod(shape) <= MAX_ELEMENTS for shape in shapes):
                yield shapes
