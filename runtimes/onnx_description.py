"""What is inside an ONNX file: its operators, its weights, and which provider would take which of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from runtimes.contract import Description, LoadOptions
from runtimes.onnx_external import FOLDER_SETTING, content
from runtimes.onnx_outline import read_outline


def outline(path: Path) -> Description:
    """What the file itself says, without any engine."""
    found = read_outline(path)
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in sorted(found.opsets.items()))
    words = f"ONNX, opset {opsets}" if opsets else "ONNX"
    if found.producer:
        words += f", from {found.producer}"
    return Description(words, found.operators, found.weights_bytes)


def describe(path: Path, options: LoadOptions, providers: Collection[str]) -> Description:
    """The outline, and how many nodes each of these providers took that the installed engine has."""
    return replace(outline(path), providers=_assigned(path, options, providers))


def _assigned(path: Path, options: LoadOptions, providers: Collection[str]) -> dict[str, int]:
    """How many nodes each provider took when all were offered; none of any on engines that do not tell."""
    import onnxruntime

    offered = [name for name in onnxruntime.get_available_providers() if name in providers]
    found = Counter({name.removesuffix("ExecutionProvider"): 0 for name in offered})
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    model, folder = content(path, options.data)
    if folder is not None:
        settings.add_session_config_entry(FOLDER_SETTING, str(folder))
    for library in options.libraries:
        settings.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(model, settings, providers=offered)
    tell = getattr(session, "get_provider_graph_assignment_info", None)
    for part in tell() if tell is not None else ():
        found[part.ep_name.removesuffix("ExecutionProvider")] += len(part.get_nodes())
    return dict(found)
