"""Why a TFLite file cannot be loaded, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runtimes.contract import ModelInvalid
from runtimes.file_kinds import what_it_is
from runtimes.messages import plain
from runtimes.onnx_outline import read_outline
from runtimes.tflite_graph import Facts, read_facts

KEPT_INSIDE = {13: "RESOURCE", 14: "VARIANT"}
WITHOUT_ARRAYS = {18: "BFLOAT16", 21: "FLOAT8_E4M3FN", 22: "FLOAT8_E5M2"}
DELEGATES = (
    ("edgetpu-custom-op", "for Google's Edge TPU, whose delegate is not in this engine: give the .tflite from before edgetpu_compiler"),
    ("ethos-u", "for Arm's Ethos-U, which only microcontrollers drive: give the .tflite from before Vela"),
    ("Flex", "TensorFlow's own (select ops), which this engine does not have: convert with supported_ops=[TFLITE_BUILTINS] only"),
    ("", "custom, which this engine does not have: convert the model without them, or serve it with a runtime of your own"),
)  # fmt: skip


def check_types(path: Path, facts: Facts) -> None:
    """Raises: ModelInvalid when an input or output is of a type that nobody can give or take."""
    served = {0, *(signature.subgraph for signature in facts.signatures)}
    for (subgraph, _), (role, name, kind) in facts.ends.items():
        if subgraph not in served:
            continue
        if kind in KEPT_INSIDE:
            raise ModelInvalid(
                f"{path.name}: {role} {name!r} is a {KEPT_INSIDE[kind]}, which lives inside the engine, so that nobody can "
                f"{'give' if role == 'input' else 'take'} it: export the model with its variables inside (a SavedModel, not a frozen graph)"
            )
        if kind in WITHOUT_ARRAYS:
            raise ModelInvalid(
                f"{path.name}: {role} {name!r} has type {WITHOUT_ARRAYS[kind]}, which the engine cannot be given or asked for: "
                "let the model take and give FP16, FP32 or INT8, and cast inside it"
            )


def not_loaded(path: Path, error: Exception) -> str:
    """What to say where the engine has refused the file."""
    text = str(error)
    if "custom op" in text or "Select TensorFlow op" in text:
        said = [f"{', '.join(names)} ({words})" for words, names in _by_origin(read_facts(path).custom)]
        if said:
            return f"{path.name} has operators {'; '.join(said)}"
    return f"{path.name} is not a model that the TFLite engine can load: {plain(text)}"


def _by_origin(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    found: dict[str, list[str]] = {}
    for name in names:
        words = next(words for start, words in DELEGATES if name.startswith(start))
        found.setdefault(words, []).append(name)
    return list(found.items())


def not_tflite(path: Path, head: bytes) -> str:
    """What to say of a file that does not begin as a TFLite model does."""
    what = what_it_is(path)
    if what is not None:
        return f"{path.name} is {what}"
    if read_outline(path).operators:
        return f"{path.name} is an ONNX model: its variant's runtime is onnx, and its name ends in .onnx"
    if len(head) < 8:
        return f"{path.name} is not a TFLite model: it has only {len(head)} bytes"
    return f"{path.name} is not a TFLite model: bytes 4 to 7 are {head[4:8]!r}, expected b'TFL3'"
