"""Whether this processor and engine add int8 products exactly, found out by having them do it.

On x86 without VNNI, ONNX Runtime's kernels for uint8 and int8 add two products in 16 bits, and what does not fit is cut off.
What an engine does on which processor changes with its versions, so nothing is concluded from the processor's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

DEPTH = 64  # products in a sum: whole vectors of every kind of kernel
WIDTH = 16
ROWS = (1, 4, 16)  # engines have kernels of their own for few rows
UINT8, INT8, INT32 = 2, 3, 6
LARGEST = ((255, 127), (255, -128))


@cache
def overflow(engine: Any) -> bool:
    """Whether sums of large products come out wrong. Takes a millisecond, once. An engine that cannot be asked is taken to be
    wrong.
    """
    settings = engine.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    try:
        session = engine.InferenceSession(product_model(), settings, providers=["CPUExecutionProvider"])
        return any(not _is_exact(session, rows, *pair) for rows in ROWS for pair in LARGEST)
    except Exception:  # noqa: BLE001 - an engine built without the operator
        return True


def _is_exact(session: Any, rows: int, left: int, right: int) -> bool:
    feeds = {"a": np.full((rows, DEPTH), left, np.uint8), "b": np.full((DEPTH, WIDTH), right, np.int8)}
    (sums,) = session.run(["c"], feeds)
    return bool((sums == DEPTH * left * right).all())


def product_model() -> bytes:
    """An ONNX file: c = MatMulInteger(a, b), of uint8 and int8. Field numbers are those of onnx.proto."""
    node = _text(1, "a") + _text(1, "b") + _text(2, "c") + _text(4, "MatMulInteger")
    graph = _bytes(1, node) + _text(2, "g")
    graph += _bytes(11, _value("a", UINT8)) + _bytes(11, _value("b", INT8)) + _bytes(12, _value("c", INT32))
    return _number(1, 8) + _bytes(7, graph) + _bytes(8, _number(2, 13))  # IR version 8, opset 13


def _value(name: str, kind: int) -> bytes:
    shape = _bytes(1, _text(2, "m" + name)) + _bytes(1, _text(2, "n" + name))
    return _text(1, name) + _bytes(2, _bytes(1, _number(1, kind) + _bytes(2, shape)))


def _number(field: int, value: int) -> bytes:
    return bytes([field << 3, value])


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())


def _bytes(field: int, value: Sequence[int] | bytes) -> bytes:
    return bytes([field << 3 | 2, len(value)]) + bytes(value)
