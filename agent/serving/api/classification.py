"""The best classes of an output as text, `value:index` or `value:index:label`: Triton's classification extension."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agent.serving.answers import Refusal
from runtimes.contract import Array, TensorSpec


def check(spec: TensorSpec) -> None:
    """Raises: Refusal (400) when the output's values have no order."""
    if spec.datatype in ("BOOL", "BYTES"):
        raise Refusal(400, f"output '{spec.name}' is {spec.datatype}: classification is for numbers")


def classify(array: Array, spec: TensorSpec, count: int, labels: Sequence[str] = ()) -> Array:
    """BYTES of shape [classes], or [batch, classes] for an output of two dimensions and more: the largest values first, the
    lower index first among equal ones. Never more classes than there are; NaN comes last.
    """
    values = floats(array) if spec.datatype == "BF16" else array
    rows = values.reshape(values.shape[0] if values.ndim > 1 else 1, -1) if values.size else np.zeros((len(values), 0))
    count = min(count, rows.shape[1])
    result = np.empty((len(rows), count), np.object_)
    for at, row in enumerate(rows):
        result[at] = [_text(row[index], int(index), labels) for index in largest(row, count)]
    return result if values.ndim > 1 else result.reshape(-1)


def floats(bits: Array) -> Array:
    """BF16, which crosses as its 16 bits, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def largest(row: Array, count: int) -> Array:
    """The indexes of the largest values, the lower index first among equal ones; NaN comes last."""
    if row.dtype.kind == "f":
        row = np.where(np.isnan(row), -np.inf, row)
    backwards = np.argsort(row[::-1], kind="stable")[::-1]
    order: Array = len(row) - 1 - backwards
    return order[:count]


def _text(value: object, index: int, labels: Sequence[str]) -> bytes:
    label = f":{labels[index]}" if index < len(labels) else ""
    return f"{value!s}:{index}{label}".encode()
