"""ONNX models through ONNX Runtime, on the CPU or on what the installed build offers (CUDA, TensorRT)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from runtimes import int8_sums, onnx_description, onnx_external
from runtimes.check import check_feeds
from runtimes.contract import (
    CONTRACT_VERSION,
    Array,
    Description,
    InputInvalid,
    LoadOptions,
    ModelInvalid,
    Placement,
    Quantization,
    RunFailed,
    RuntimeUnavailable,
    TensorSpec,
)
from runtimes.messages import plain
from runtimes.onnx_graph import read_quantization, read_rankless
from runtimes.onnx_refusals import left_out, no_tensor, not_loaded
from runtimes.onnx_weights import has_wide_weights
from runtimes.usual_sizes import UsualSizes, resident_bytes

INSTALL = "install it with: pip install 'edge-inference-agent[onnx]'"

ELEMENT_TYPES = {
    "tensor(bool)": "BOOL", "tensor(uint8)": "UINT8", "tensor(uint16)": "UINT16", "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64", "tensor(int8)": "INT8", "tensor(int16)": "INT16", "tensor(int32)": "INT32",
    "tensor(int64)": "INT64", "tensor(float16)": "FP16", "tensor(float)": "FP32", "tensor(double)": "FP64",
    "tensor(string)": "BYTES", "tensor(bfloat16)": "BF16",
}  # fmt: skip
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
FALLBACKS = {"cpu": (), "cuda": ("cpu",), "tensorrt": ("cuda", "cpu")}
BFLOAT16 = 16  # its number among ONNX's element types
ORT_FORMAT_MAGIC = b"ORTM"  # flatbuffer identifier at byte 4; blobs have no suffix that would tell
INEXACT = (
    "int8 sums of this model may overflow on this processor, and the engine cannot load it with its exact kernels; "
    "quantize its weights with reduce_range"
)


def engine() -> Any:
    # Official builds from 1.29 on report usage to their maker unless told not to before the import.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    os.environ["ORT_TELEMETRY_DISABLED"] = "1"
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeUnavailable(f"onnxruntime cannot be imported ({error}); {INSTALL}") from error
    return onnxruntime


class OnnxRuntime:
    """Variant options: `provider` is cpu, cuda, tensorrt or auto (CUDA where it works, else the CPU; the default)."""

    contract_version = CONTRACT_VERSION
    name = "onnx"
    suffixes: tuple[str, ...] = (".onnx", ".ort")

    def version(self) -> str:
        return f"onnxruntime {engine().__version__}"

    def load(self, path: Path, options: LoadOptions) -> OnnxModel:
        ort = engine()
        head = _head(path)
        requested = str(options.extra.get("provider", "auto"))
        wanted, missing = _choose(requested, ort)
        model, folder = onnx_external.content(path, options.data)
        session, inexact = _exact_session(
            ort, path, model, lambda: _settings(ort, options, head, folder), [PROVIDERS[p] for p in wanted]
        )
        placement = _placement(requested, wanted, missing, session, (inexact, left_out(session.get_outputs(), ELEMENT_TYPES)))
        return OnnxModel(session, read_quantization(path), read_rankless(path), placement)

    def outline(self, path: Path) -> Description:
        return onnx_description.outline(path)

    def describe(self, path: Path, options: LoadOptions) -> Description:
        return onnx_description.describe(path, options, PROVIDERS.values())


def _exact_session(
    ort: Any, path: Path, model: Path | bytes, settings: Callable[[], Any], providers: Sequence[str]
) -> tuple[Any, str | None]:
    """The session, and in words why its int8 sums may be wrong; None when they are not."""
    if not (has_wide_weights(path) and int8_sums.overflow(ort)):
        return _session(ort, path, model, settings(), providers), None
    exact = settings()
    exact.add_session_config_entry("session.x64quantprecision", "1")  # kernels that hold two products of such weights
    try:
        return _session(ort, path, model, exact, providers), None
    except ModelInvalid:  # the engine cannot change every model so; without, it says what else may be wrong with the file
        return _session(ort, path, model, settings(), providers), INEXACT


def _session(ort: Any, path: Path, model: Path | bytes, settings: Any, providers: Sequence[str]) -> Any:
    try:
        return ort.InferenceSession(model, settings, providers=providers)
    except MemoryError:
        raise
    except Exception as error:
        if "bad_alloc" in str(error) or "Failed to allocate memory" in str(error):
            raise MemoryError(f"not enough memory to load {path.name}") from error
        raise ModelInvalid(not_loaded(path, f"onnxruntime {ort.__version__}", error)) from error


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise ModelInvalid(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise ModelInvalid(f"{path.name} is empty")
    return head


def _choose(requested: str, ort: Any) -> tuple[list[str], str | None]:
    """The providers to offer, best first, and why the one asked for is not among them."""
    present = [name for name, provider in PROVIDERS.items() if provider in ort.get_available_providers()]
    if requested == "auto":
        return (["cuda", "cpu"] if "cuda" in present else ["cpu"]), None
    if requested not in PROVIDERS:
        raise ModelInvalid(f"option provider={requested!r} is not one of auto, {', '.join(PROVIDERS)}")
    wanted = [name for name in (requested, *FALLBACKS[requested]) if name in present]
    if requested in present:
        return wanted, None
    return wanted, f"this onnxruntime {ort.__version__} has no {PROVIDERS[requested]} (it has: {', '.join(present)})"


def _settings(ort: Any, options: LoadOptions, head: bytes, folder: Path | None) -> Any:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4  # its messages come back as exceptions
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning takes the cores from other models
    for library in options.libraries:
        _register(ort, settings, library)
    if folder is not None:
        settings.add_session_config_entry(onnx_external.FOLDER_SETTING, str(folder))
    if head[4:8] == ORT_FORMAT_MAGIC:
        settings.add_session_config_entry("session.load_model_format", "ORT")
    return settings


def _register(ort: Any, settings: Any, library: Path) -> None:
    try:
        settings.register_custom_ops_library(str(library))
    except Exception as error:
        engine = f"onnxruntime {ort.__version__}"
        raise ModelInvalid(f"library {library.name} cannot be loaded into {engine} here: {plain(str(error))}") from error


def _placement(
    requested: str, wanted: Sequence[str], missing: str | None, session: Any, notes: Sequence[str | None]
) -> Placement:
    """`notes` are what else people should know of how it is served."""
    actual = next((name for name, provider in PROVIDERS.items() if provider == session.get_providers()[0]), "cpu")
    if missing is None and requested not in ("auto", actual):
        missing = f"{PROVIDERS[requested]} did not start (drivers or libraries missing); the engine uses {actual}"
    elif missing is None and actual != wanted[0]:
        missing = f"{PROVIDERS[wanted[0]]} did not start (drivers or libraries missing); the engine uses {actual}"
    reasons = [reason for reason in (missing, *notes) if reason is not None]
    return Placement(requested, actual, "; ".join(reasons) or None)


class OnnxModel:
    """A loaded session; ONNX Runtime allows parallel runs on one."""

    def __init__(
        self, session: Any, quantization: Mapping[str, Quantization], rankless: Collection[str], placement: Placement
    ) -> None:
        self._session = session
        spec = partial(_spec, quantization=quantization, rankless=rankless)
        inputs = {i.name: spec(i, "input") for i in session.get_inputs()}
        optional = [i for i in session.get_overridable_initializers() if i.type in ELEMENT_TYPES]
        inputs.update({i.name: replace(spec(i, "input"), optional=True) for i in optional})
        self._symbols = {i.name: i.shape for i in (*session.get_inputs(), *optional) if not inputs[i.name].any_rank}
        self._inputs = tuple(inputs.values())
        given = session.get_outputs()
        served = [o for o in given if o.type in ELEMENT_TYPES] or given  # the refusal of one of them says why
        self._outputs = tuple({o.name: spec(o, "output") for o in served}.values())  # one may be listed twice
        self._placement = placement
        datatypes = {t.datatype for t in (*self._inputs, *self._outputs)}
        self._has_text, self._has_bf16 = "BYTES" in datatypes, "BF16" in datatypes
        if self._has_bf16 and any(t.datatype == "BYTES" for t in self._inputs):
            raise ModelInvalid(
                "onnxruntime cannot be given text and BF16 tensors by one Python call; cast BF16 inside the model"
            )
        self._is_plain = not (self._has_text or self._has_bf16)
        self._names = [o.name for o in self._outputs]
        self._options = engine().RunOptions()  # the defaults: making them for every run takes most of a microsecond
        self._giving_back = engine().RunOptions()
        self._giving_back.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._usual = UsualSizes() if any(-1 in spec.shape for spec in self._inputs) else None
        self._run = _run_of(session)

    @property
    def settings(self) -> Any:
        """What the engine was told when it loaded the model."""
        return self._session.get_session_options()

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
        if not self._is_plain:
            return self._run_converted(feeds, outputs)
        try:
            if self._usual is not None:
                return self._run_of_any_size(self._usual, outputs, feeds)
            result: list[Array] = self._run(outputs or self._names, feeds, self._options)
        except Exception as error:
            raise self._explain(error, feeds) from error
        return result

    @property
    def grown_bytes(self) -> int:
        """What runs have left with the engine, beyond what loading took."""
        return 0 if self._usual is None else self._usual.grown_bytes

    def _run_of_any_size(self, usual: UsualSizes, outputs: Sequence[str] | None, feeds: Mapping[str, Array]) -> list[Array]:
        """A run of a model whose inputs have any size; after an unusual one the engine gives back what it keeps."""
        size_bytes = 0
        for array in feeds.values():
            size_bytes += array.nbytes
        grows = usual.grows(size_bytes)
        options = self._options if usual.keeps(size_bytes) else self._giving_back
        before = resident_bytes() if grows else 0
        result: list[Array] = self._run(outputs or self._names, feeds, options)
        if grows and options is self._options:
            usual.grown_bytes += max(0, resident_bytes() - before)
        return result

    def _run_converted(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:
        """The engine takes and gives `str` where the contract has `bytes`, and BF16 only in values of its own."""
        check_feeds(self._inputs, feeds)
        converted = {name: (_decoded(name, a) if a.dtype == np.object_ else a) for name, a in feeds.items()}
        run = self._run_values if self._has_bf16 else self._run
        try:
            result: list[Array] = run(outputs or self._names, converted, self._options)
        except Exception as error:
            raise self._explain(error, feeds) from error
        return [_encoded(a) if a.dtype == np.object_ else a for a in result]

    def _run_values(self, names: Sequence[str], feeds: Mapping[str, Array], options: Any) -> list[Array]:
        new = engine().OrtValue
        values = {
            spec.name: new.ortvalue_from_numpy_with_onnx_type(feeds[spec.name], BFLOAT16)
            if spec.datatype == "BF16"
            else new.ortvalue_from_numpy(feeds[spec.name])
            for spec in self._inputs
            if spec.name in feeds
        }
        return [_array(value) for value in self._session.run_with_ort_values(names, values, options)]

    def _explain(self, error: Exception, feeds: Mapping[str, Array]) -> InputInvalid | RunFailed:
        try:
            check_feeds(self._inputs, feeds)
            self._check_symbols(feeds)
        except InputInvalid as invalid:
            return invalid
        if type(error).__name__ == "InvalidArgument":
            return InputInvalid(f"the engine refused the inputs: {plain(str(error))}")
        return RunFailed(f"onnxruntime failed: {plain(str(error))}")

    def _check_symbols(self, feeds: Mapping[str, Array]) -> None:
        """Dimensions of the same name must have the same size: `batch` of one input and `batch` of another."""
        seen: dict[str, tuple[str, int]] = {}
        for name, shape in self._symbols.items():
            if name not in feeds:
                continue
            for symbol, size in zip(shape, feeds[name].shape, strict=True):
                if not isinstance(symbol, str):
                    continue
                other, expected = seen.setdefault(symbol, (name, size))
                if expected != size:
                    raise InputInvalid(f"input {name!r} has {symbol} {size}, but input {other!r} has {symbol} {expected}")

    def close(self) -> None:
        del self._run, self._session


def _run_of(session: Any) -> Any:
    """The engine's `run` without what InferenceSession.run does around it: looking for missing inputs, which the engine does
    too, and going on with another device when one fails, of which nobody would hear.
    """
    return getattr(session, "_sess", session).run


def _spec(node: Any, role: str, *, quantization: Mapping[str, Quantization], rankless: Collection[str]) -> TensorSpec:
    datatype = ELEMENT_TYPES.get(node.type)
    if datatype is None:
        raise ModelInvalid(no_tensor(role, node.name, node.type))
    any_rank = not node.shape and node.name in rankless  # the engine says no dimensions of both
    shape = (-1,) if any_rank else tuple(size if isinstance(size, int) and size >= 0 else -1 for size in node.shape)
    return TensorSpec(node.name, datatype, shape, quantization.get(node.name), any_rank=any_rank)


def _array(value: Any) -> Array:
    """A copy of the engine's value."""
    if value.data_type() != "tensor(bfloat16)":
        array: Array = value.numpy()
        return array
    if value.device_name() != "cpu":
        raise RunFailed(
            f"a BF16 output is in the memory of {value.device_name()}, from where it cannot be read; cast it inside the model"
        )
    shape = tuple(value.shape())
    bits: Array = np.empty(shape, np.uint16)
    if bits.size:
        ctypes.memmove(bits.ctypes.data, value.data_ptr(), bits.nbytes)
    return bits


def _decoded(name: str, array: Array) -> Array:
    try:
        text = [element.decode() for element in array.flat]
    except UnicodeDecodeError as error:
        raise InputInvalid(f"input {name!r} has an element that is not UTF-8: {error}") from error
    result = np.empty(array.size, np.object_)
    result[:] = text
    return result.reshape(array.shape)


def _encoded(array: Array) -> Array:
    result = np.empty(array.size, np.object_)
    result[:] = [str(element).encode() for element in array.flat]
    return result.reshape(array.shape)
