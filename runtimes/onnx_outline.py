"""What an ONNX file is made of, read from the file itself: its operators and weights, wherever they are.

Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from pathlib import Path

from runtimes.onnx_external import PARTS, external
from runtimes.protobuf import UNREADABLE, fields, mapped, message, packed, signed, text

MODEL_PRODUCER, MODEL_PRODUCER_VERSION, MODEL_OPSET = 2, 3, 8
OPSET_DOMAIN, OPSET_VERSION = 1, 2
NODE_OP, NODE_DOMAIN = 4, 7
TENSOR_DIMS, TENSOR_TYPE, TENSOR_STRINGS = 1, 2, 6
ATTRIBUTE_FLOATS, ATTRIBUTE_INTS, ATTRIBUTE_STRINGS = 7, 8, 9

BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16, 17: 8, 18: 8, 19: 8,
    20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
"""The size of an element, by the number of its type."""
FEW = 8  # numbers in an attribute are the geometry of an operator (strides, pads); more of them are what it has learned


@dataclass(slots=True)
class Outline:
    """What a model is made of. `operators` counts nodes by type, in the bodies of If, Loop and Scan and in functions too;
    `weights_bytes` are those of all tensors, in the file and in its other files, and of what the operators of trees and linear
    models keep in attributes.
    """

    opsets: dict[str, int] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)
    weights_bytes: int = 0
    producer: str = ""
    outside: set[tuple[str, str, str]] = field(
        default_factory=set
    )  # what was counted of other files: several tensors may share it


def read_outline(path: Path) -> Outline:
    """As far as the file is understood."""
    outline = Outline()
    with contextlib.suppress(*UNREADABLE):
        _look(outline, mapped(path), "model")
    return outline


def _look(outline: Outline, data: memoryview, part: str) -> None:
    if part == "tensor":
        _count(outline, data)
        return
    if part == "node":
        node = dict(fields(data))
        domain, name = text(node.get(NODE_DOMAIN, b"")), text(node.get(NODE_OP, b""))
        name = f"{domain}:{name}" if domain not in ("", "ai.onnx") else name
        outline.operators[name] = outline.operators.get(name, 0) + 1
    listed = 0
    for number, value in fields(data):
        inside = PARTS[part].get(number)
        if inside is not None:
            _look(outline, message(value), inside)
        elif part == "model":
            _look_at_model(outline, number, value)
        elif part == "attribute":
            listed += _listed_bytes(number, value)
    if listed > FEW * 8:
        outline.weights_bytes += listed


def _look_at_model(outline: Outline, number: int, value: int | memoryview) -> None:
    if number == MODEL_PRODUCER:
        outline.producer = text(value)
    elif number == MODEL_PRODUCER_VERSION:
        outline.producer = f"{outline.producer} {text(value)}".strip()
    elif number == MODEL_OPSET:
        opset = dict(fields(message(value)))
        version = opset.get(OPSET_VERSION)
        if isinstance(version, int):
            outline.opsets[text(opset.get(OPSET_DOMAIN, b""))] = version


def _listed_bytes(number: int, value: int | memoryview) -> int:
    """The bytes of an attribute's list; each number may be written alone, or all in one field."""
    if number == ATTRIBUTE_FLOATS:
        return 4 if isinstance(value, int) else len(value)
    if number == ATTRIBUTE_INTS:
        return 8 if isinstance(value, int) else 8 * sum(1 for _ in packed(value))
    return len(message(value)) if number == ATTRIBUTE_STRINGS else 0


def _count(outline: Outline, tensor: memoryview) -> None:
    dimensions: list[int] = []
    bits = texts = 0
    for number, value in fields(tensor):
        if number == TENSOR_DIMS:
            dimensions += [signed(n) for n in ([value] if isinstance(value, int) else packed(value))]
        elif number == TENSOR_TYPE and isinstance(value, int):
            bits = BITS.get(value, 0)
        elif number == TENSOR_STRINGS:
            texts += len(message(value))
    place = external(tensor)
    if place is not None:
        key = (place.get("location", ""), place.get("offset", "0"), place.get("length", ""))
        if key in outline.outside:
            return
        outline.outside.add(key)
    outline.weights_bytes += texts or -(-max(0, math.prod(dimensions)) * bits // 8)
