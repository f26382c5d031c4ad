"""Why an ONNX file cannot be loaded, or not all of it can be served, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from runtimes.file_kinds import is_tflite, what_it_is
from runtimes.messages import plain
from runtimes.onnx_outline import read_outline

EXTENSIONS = "ai.onnx.contrib"
ITS_OWN = frozenset(
    {"", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview", "ai.onnx.preview.training", "com.microsoft",
     "com.microsoft.experimental", "com.microsoft.nchwc", "com.microsoft.dml", "com.ms.internal.nhwc", "org.pytorch.aten"}
)  # fmt: skip
"""The domains of operators that ONNX Runtime has, in one build or another."""

LOCALE = re.compile(r"construct locale with name:\s*([\w.@-]+)")
UNKNOWN = re.compile(r"([\w.]*):(\w+)\(-?\d+\) is not a registered function/op")
UNKNOWN_HERE = re.compile(r"No Op registered for (\w+) with domain_version of (\d+)")
NEWER = re.compile(r"Opset (\d+) is under development.*domain (\S+) is till opset (\d+)")
NEWER_IR = re.compile(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)")
KERNEL = re.compile(r"Could not find an implementation for (\w+)\((\d+)\)")
SMALL = ("float8", "float4", "int4", "uint4", "int2", "uint2")


def not_loaded(path: Path, engine: str, error: Exception) -> str:
    """What to say where the engine has refused the file."""
    what = what_it_is(path)
    if what is not None:
        return f"{path.name} is {what}"
    if is_tflite(path):
        return f"{path.name} is a TFLite model: its variant's runtime is tflite, and its name ends in .tflite"
    text = str(error)
    if found := LOCALE.search(text):
        return (
            f"{path.name} needs the locale {found[1]} (StringNormalizer), which this machine has not: "
            f"generate it (Debian and Ubuntu: install locales, then `locale-gen {found[1]}`) and restart the agent"
        )
    if found := UNKNOWN.search(text):
        return f"{path.name} {_foreign(path, found[1], found[2])}"
    if found := UNKNOWN_HERE.search(text):
        return (
            f"{path.name} has operator {found[1]}, which {engine} does not have in opset {found[2]}: "
            "update the engine, or export the model without it"
        )
    if found := NEWER.search(text):
        return (
            f"{path.name} is of opset {found[1]} of {found[2]}; {engine} knows up to {found[3]}: update it, or export for that"
        )
    if found := NEWER_IR.search(text):
        return f"{path.name} is of ONNX's IR version {found[1]}; {engine} knows up to {found[2]}: update it, or export for that"
    if found := KERNEL.search(text):
        return (
            f"{path.name}: {engine} has no kernel here for operator {found[1]} with these types: {plain(text)}; "
            "export the model with FP32, or with another provider"
        )
    return f"{path.name} is not a model that {engine} can load: {plain(text)}"


def _foreign(path: Path, domain: str, op: str) -> str:
    """What to say of operators that no build of the engine has."""
    operators = [
        name.partition(":")[2] for name in read_outline(path).operators if name.partition(":")[0] == domain and ":" in name
    ]
    listed = ", ".join(operators or [op])
    made_by = "a library of their own"
    if domain == EXTENSIONS:
        made_by = "onnxruntime-extensions"
    return (
        f"has operators of {domain} ({listed}), which come with {made_by}: put that library (.so, for this device's processor) "
        "among the release's files and name it in the variant (libraries: [NAME]), or export the model without them"
    )


def no_tensor(role: str, name: str, kind: str) -> str:
    """What to say of an input or output that cannot cross the socket."""
    what = f"{role} {name!r} has type {kind}, which cannot cross the socket"
    if "map(" in kind:
        return f"{what}: convert the model without ZipMap (skl2onnx: options={{'zipmap': False}})"
    if kind.startswith("seq("):
        return f"{what}: give each element as a tensor of its own, or stack them (ConcatFromSequence)"
    if kind.startswith("optional("):
        return f"{what}: export the model with plain tensors"
    if any(small in kind for small in SMALL):
        return f"{what}: let the model take and give FP16, INT8 or UINT8, and cast inside it"
    return f"{what}: export the model with plain tensors"


def left_out(outputs: Sequence[Any], types: Collection[str]) -> str | None:
    """What to say of outputs that are not served because they are no tensors; None where there are none."""
    said = [no_tensor("output", output.name, output.type) for output in outputs if output.type not in types]
    return f"not served: {'; '.join(said)}" if said else None
