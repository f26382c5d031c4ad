"""What a version answers, counted: which class is the best one, how sure it is of it, and whether it is a number at all. Nothing of an
answer is kept.

A prediction that is not looked at pays for one comparison of times. Looking is done by the thread that answers, at most ten times a second
and for no more than two thousandths of the time; so of a model that is asked more often it is a sample.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np

from agent.contract.telemetry import CLASSES, CONFIDENCES
from runtimes.contract import Array, TensorSpec

EVERY_S = 0.1
PART = 1 / 500
"""Of the time, which looking may take at most."""

MAX_ROWS = 64
MAX_SCORES = 1 << 16
"""More columns than this are no classes."""

MAX_ELEMENTS = 1 << 18
"""A larger output takes too long to look at."""


class OutputSketch:
    """Of one version. `next_s`: no answer that is ready before this moment (a perf_counter) is looked at."""

    __slots__ = ("_lock", "classes", "confidence", "next_s", "rows", "unusable")

    def __init__(self) -> None:
        self.next_s = 0.0
        self.rows = self.unusable = 0
        self.classes = np.zeros(CLASSES, np.int64)
        self.confidence = np.zeros(CONFIDENCES, np.int64)
        self._lock = threading.Lock()

    def take(self, specs: Sequence[TensorSpec], outputs: Sequence[str] | None, arrays: Sequence[Array], now_s: float) -> None:
        """Looks at an answer: `arrays` of the `outputs` that were asked for, all of `specs` where those are None.  Never raises."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if now_s < self.next_s:
                return
            self.next_s = now_s + EVERY_S  # also when what follows fails
            begun = time.perf_counter()
            self._look(specs, outputs, arrays)
            self.next_s = now_s + max(EVERY_S, (time.perf_counter() - begun) / PART)
        except Exception:  # noqa: BLE001, S110 - what somebody's runtime made need not be what it said; the answer goes its way
            pass
        finally:
            self._lock.release()

    def counts(self) -> dict[str, object]:
        """As fields of `Figures`."""
        with self._lock:
            return {
                "rows": self.rows, "unusable": self.unusable,
                "classes": {at: int(count) for at, count in enumerate(self.classes) if count},
                "confidence": {at: int(count) for at, count in enumerate(self.confidence) if count},
            }  # fmt: skip

    def _look(self, specs: Sequence[TensorSpec], outputs: Sequence[str] | None, arrays: Sequence[Array]) -> None:
        by_name = {spec.name: spec for spec in specs}
        found = [
            (by_name[name], array) for name, array in zip(outputs or list(by_name), arrays, strict=False) if name in by_name
        ]
        scores = next(((spec, array) for spec, array in found if _are_scores(array)), None)
        if scores is not None:
            self._add_scores(_real(*scores))
            return
        numbers = next((array for spec, array in found if array.dtype.kind == "f" and 0 < array.size <= MAX_ELEMENTS), None)
        if numbers is not None:
            self.rows += 1
            self.unusable += not np.isfinite(numbers).all()

    def _add_scores(self, rows: Array) -> None:
        good = rows[np.isfinite(rows).all(axis=1)]
        best = good.argmax(axis=1)
        top = good[np.arange(len(good)), best]
        if good.size and not (good.min() >= 0 and good.max() <= 1):  # no probabilities yet
            top = 1.0 / np.exp(good - top[:, None]).sum(axis=1)
        self.classes += np.bincount(best % CLASSES, minlength=CLASSES)
        self.confidence += np.bincount(
            np.minimum((top * CONFIDENCES + 1e-6).astype(np.int64), CONFIDENCES - 1), minlength=CONFIDENCES
        )
        self.rows += len(rows)
        self.unusable += len(rows) - len(good)


def _are_scores(array: Array) -> bool:
    """Whether it has a row per case and two columns or more of numbers."""
    is_table = array.ndim == 2 and array.shape[0] > 0 and 2 <= array.shape[1] <= MAX_SCORES
    return is_table and array.dtype.kind in "fiu" and array.size <= MAX_ELEMENTS


def _real(spec: TensorSpec, array: Array) -> Array:
    """The first rows as the numbers they stand for."""
    rows = array[:MAX_ROWS]
    if spec.datatype == "BF16":
        return (rows.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    real: Array = rows.astype(np.float64)
    quantization = spec.quantization
    if quantization is None or array.dtype.kind == "f" or len(quantization.scales) != 1:
        return real
    scaled: Array = (real - quantization.zero_points[0]) * quantization.scales[0]
    return scaled
