"""What is inside a model file: its operators, its weights, and which provider would take which of them.

For people who look at a file before they serve it. Loads the model, so it belongs into a process that may die.
A runtime of a third party may offer `describe(path) -> Description` itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from runtimes.contract import LoadOptions, Runtime
from runtimes.onnx import EXTERNAL_FOLDER, PROVIDERS, content
from runtimes.onnx_outline import read_outline
from runtimes.tflite_graph import read_operators, read_weights_bytes
from runtimes.tflite_model import allocate


@dataclass(frozen=True, slots=True)
class Description:
    """`providers` says of each provider that this machine's engine has how many of the file's operators it takes."""

    format: str = ""
    operators: Mapping[str, int] = field(default_factory=dict)
    weights_bytes: int | None = None
    providers: Mapping[str, int] = field(default_factory=dict)


def outline(runtime: Runtime, path: Path) -> Description:
    """What the file itself says, without any engine: its providers are not known."""
    if runtime.name == "onnx":
        found = read_outline(path)
        opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in sorted(found.opsets.items()))
        words = f"ONNX, opset {opsets}" if opsets else "ONNX"
        if found.producer:
            words += f", from {found.producer}"
        return Description(words, found.operators, found.weights_bytes)
    if runtime.name == "tflite":
        return Description("TFLite", _named_operators(path), read_weights_bytes(path))
    return Description()


def describe(runtime: Runtime, path: Path, options: LoadOptions) -> Description:
    """What can be found out about the file; an engine that tells nothing gives an empty description."""
    own = getattr(runtime, "describe", None)
    if own is not None:
        return cast("Description", own(path))
    if runtime.name == "onnx":
        return replace(outline(runtime, path), providers=_assigned(path, options))
    if runtime.name == "tflite":
        found = outline(runtime, path)
        operators, providers = _tflite(path)
        return replace(found, operators=found.operators or operators, providers=providers)
    return Description()


def _assigned(path: Path, options: LoadOptions) -> dict[str, int]:
    """How many nodes each provider took when all were offered; none of any on engines that do not tell."""
    import onnxruntime

    offered = [name for name in onnxruntime.get_available_providers() if name in PROVIDERS.values()]
    found = Counter({name.removesuffix("ExecutionProvider"): 0 for name in offered})
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    model, folder = content(path, options.data)
    if folder is not None:
        settings.add_session_config_entry(EXTERNAL_FOLDER, str(folder))
    for library in options.libraries:
        settings.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(model, settings, providers=offered)
    tell = getattr(session, "get_provider_graph_assignment_info", None)
    for part in tell() if tell is not None else ():
        found[part.ep_name.removesuffix("ExecutionProvider")] += len(part.get_nodes())
    return dict(found)


def _named_operators(path: Path) -> dict[str, int]:
    """As the file has them, in all subgraphs; empty where no schema is at hand that has their names."""
    try:
        from ai_edge_litert.schema_py_generated import BuiltinOperator
    except ImportError:
        return {}
    names = {number: name for name, number in vars(BuiltinOperator).items() if isinstance(number, int)}
    return {
        name if isinstance(name, str) else names.get(name, f"operator {name}"): count
        for name, count in read_operators(path).items()
    }


def _tflite(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """What the engine has of operators in the first subgraph, and which provider takes how many of these."""
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    except ImportError:
        from tflite_runtime.interpreter import Interpreter, OpResolverType

    plain = Interpreter(model_path=str(path), experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES)
    operators = _operators(plain)
    delegated = Interpreter(model_path=str(path))
    allocate(delegated)
    steps = _operators(delegated)
    left = sum(count for name, count in steps.items() if name != "DELEGATE" and name in operators)
    providers = {"XNNPACK": max(0, sum(operators.values()) - left) if "DELEGATE" in steps else 0, "CPU": left}
    return operators, providers


def _operators(interpreter: Any) -> dict[str, int]:
    tell = getattr(interpreter, "_get_ops_details", None)  # the only way that the engine's Python interface has
    return dict(Counter(step["op_name"] for step in tell())) if tell is not None else {}
