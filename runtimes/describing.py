"""What is inside a model file: its operators, its weights, and which provider would take which of them.

For people who look at a file before they serve it. Loads the model, so it belongs into a process that may die.
A runtime of a third party may offer `describe(path) -> Description` itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from runtimes import onnx_graph
from runtimes.contract import Runtime
from runtimes.onnx import EXTERNAL_FOLDER, PROVIDERS, content
from runtimes.tflite_model import allocate


@dataclass(frozen=True, slots=True)
class Description:
    """`providers` says of each provider that this machine's engine has how many of the file's operators it takes."""

    format: str = ""
    operators: Mapping[str, int] = field(default_factory=dict)
    weights_bytes: int | None = None
    providers: Mapping[str, int] = field(default_factory=dict)


def describe(runtime: Runtime, path: Path) -> Description:
    """What can be found out about the file; an engine that tells nothing gives an empty description."""
    own = getattr(runtime, "describe", None)
    if own is not None:
        return cast("Description", own(path))
    if runtime.name == "onnx":
        return _onnx(path)
    if runtime.name == "tflite":
        return _tflite(path)
    return Description()


def _onnx(path: Path) -> Description:
    import onnxruntime

    outline = onnx_graph.read_outline(path)
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in sorted(outline.opsets.items()))
    text = f"ONNX, opset {opsets}" if opsets else "ONNX"
    if outline.producer:
        text += f", from {outline.producer}"
    offered = [name for name in onnxruntime.get_available_providers() if name in PROVIDERS.values()]
    providers = {name.removesuffix("ExecutionProvider"): 0 for name in offered}
    providers.update(_assigned(onnxruntime, path, offered))
    return Description(text, outline.operators, outline.weights_bytes, providers)


def _assigned(ort: Any, path: Path, offered: Sequence[str]) -> dict[str, int]:
    """How many nodes each provider took when all were offered; empty on engines that do not tell."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    model, folder = content(path, None)
    if folder is not None:
        settings.add_session_config_entry(EXTERNAL_FOLDER, str(folder))
    session = ort.InferenceSession(model, settings, providers=offered)
    tell = getattr(session, "get_provider_graph_assignment_info", None)
    if tell is None:
        return {}
    found: Counter[str] = Counter()
    for part in tell():
        found[part.ep_name.removesuffix("ExecutionProvider")] += len(part.get_nodes())
    return dict(found)


def _tflite(path: Path) -> Description:
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
    return Description("TFLite", operators, None, providers)


def _operators(interpreter: Any) -> dict[str, int]:
    tell = getattr(interpreter, "_get_ops_details", None)  # the only way that the engine's Python interface has
    return dict(Counter(step["op_name"] for step in tell())) if tell is not None else {}
