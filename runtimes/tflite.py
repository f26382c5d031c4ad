"""TFLite models through LiteRT, or through tflite-runtime on boxes that have only that."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from runtimes import tflite_description
from runtimes.contract import CONTRACT_VERSION, Description, LoadOptions, ModelInvalid, Placement, RuntimeUnavailable
from runtimes.tflite_graph import read_facts
from runtimes.tflite_interface import methods_of
from runtimes.tflite_model import BrokenEngine, NewInterpreter, TfliteModel, create
from runtimes.tflite_refusals import check_types, not_tflite

INSTALL = "install one with: pip install 'edge-inference-agent[tflite]'"
IDENTIFIER = b"TFL3"  # at byte 4 of every TFLite flatbuffer
ENGINES = (("LiteRT", "ai_edge_litert"), ("tflite-runtime", "tflite_runtime"))


class TfliteRuntime:
    """Loads `.tflite` files. It keeps the first engine that proves itself by loading a model.

    Variant options: `signature` is the one that is asked when a request names none (else `serving_default`, else the file's
    first).
    """

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
        if options.libraries:
            raise ModelInvalid("libraries of operators are for the runtime onnx; the TFLite engine takes none")
        candidates = [self._engine] if self._engine else _engines()
        reasons: list[str] = []
        for label, new_interpreter in candidates:
            try:
                model = _load(label, new_interpreter, path, options)
            except BrokenEngine as error:
                reasons.append(f"{label}: {error}")
                continue
            self._engine = (label, new_interpreter)
            return model
        raise RuntimeUnavailable(f"no TFLite engine works here ({'; '.join(reasons)}); {INSTALL}")

    def outline(self, path: Path) -> Description:
        return tflite_description.outline(path)

    def describe(self, path: Path, _options: LoadOptions) -> Description:
        return tflite_description.describe(path)


def _load(label: str, new_interpreter: NewInterpreter, path: Path, options: LoadOptions) -> TfliteModel:
    facts = read_facts(path)
    check_types(path, facts)
    first = create(new_interpreter, path, options.threads)
    methods = methods_of(first.native, facts, path, str(options.extra.get("signature", "")))
    requested = str(options.extra.get("delegate", "cpu"))
    fallback = None if requested == "cpu" else f"delegate {requested!r} is not supported; {label} runs on the CPU"
    new = partial(create, new_interpreter, path, options.threads, first.allocated)
    return TfliteModel(methods, first, new, facts, Placement(requested, "cpu", fallback))


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
    if head[4:] != IDENTIFIER:
        raise ModelInvalid(not_tflite(path, head))
