"""Two versions' answers to the same inputs, as numbers. Pure; nothing of an input or an answer is kept.

The rules:
- A sample agrees when every output does: the same shape, and every element within `atol + rtol * |live|`. A NaN only matches a
  NaN.
- An output looks like scores of classes when it has a row per case and two columns or more: then its rows' largest element is
  compared too, and another one is a flip.
- Whole numbers with quantization are compared as the real numbers they stand for.
- Times are compared in pairs, as the ratio of the candidate's run to the live one's on the same input.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from runtimes.contract import Array, TensorSpec

RATIO_BOUNDS: tuple[float, ...] = tuple(round(2.0 ** (n / 4), 4) for n in range(-12, 29))
"""From an eighth to 128 times, in steps of 19 %: fine enough for a limit, and sums over restarts add up."""

MAX_SCORES = 1 << 16
"""More columns than this are no classes."""


class Tolerance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far an element may be from the live one."""

    atol: float = 1e-3
    rtol: float = 1e-2


class OutputCounts:
    """What was seen of one output."""

    __slots__ = ("agreed", "flips", "max_difference", "rows", "samples")

    def __init__(self) -> None:
        self.samples = self.agreed = 0
        self.rows = self.flips = 0  # of outputs that look like scores
        self.max_difference = 0.0

    def add(self, live: Array, other: Array, spec: TensorSpec, tolerance: Tolerance) -> bool:
        """Whether they agree."""
        self.samples += 1
        if live.shape != other.shape:
            return False
        if spec.datatype == "BYTES":
            agrees = bool(np.array_equal(live, other))
        else:
            agrees = self._add_numbers(_real(live, spec), _real(other, spec), tolerance)
        self.agreed += agrees
        return agrees

    def _add_numbers(self, live: Array, other: Array, tolerance: Tolerance) -> bool:
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.abs(live - other)
            same = (difference <= tolerance.atol + tolerance.rtol * np.abs(live)) | (live == other)
        same |= np.isnan(live) & np.isnan(other)
        finite = difference[np.isfinite(difference)]
        if finite.size:
            self.max_difference = max(self.max_difference, float(finite.max()))
        if live.ndim == 2 and 2 <= live.shape[1] <= MAX_SCORES and len(live):
            self.rows += len(live)
            self.flips += int((live.argmax(axis=1) != other.argmax(axis=1)).sum())
        return bool(same.all())

    def document(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


class Comparison:
    """The sum over all samples. One thread adds, any other may read."""

    def __init__(self, specs: Sequence[TensorSpec], tolerances: Mapping[str, Tolerance]) -> None:
        """`tolerances` by output; under `*` for those that are not named."""
        self._specs = {spec.name: spec for spec in specs}
        self._tolerances = tolerances
        self._default = tolerances.get("*", Tolerance())
        self.samples = self.agreed = 0
        self.outputs = {name: OutputCounts() for name in self._specs}
        self._lock = threading.Lock()
        self.pairs = 0
        self.run_s = self.live_s = 0.0
        self._ratios = [0] * (len(RATIO_BOUNDS) + 1)

    def add(
        self, names: Sequence[str], live: Sequence[Array], other: Sequence[Array], live_s: float = 0.0, run_s: float = 0.0
    ) -> bool:
        """Whether the sample agrees. The live run took `live_s` (0: not to be compared), the candidate's `run_s`."""
        with self._lock:
            self._time(live_s, run_s)
            return self._add(names, live, other)

    def _add(self, names: Sequence[str], live: Sequence[Array], other: Sequence[Array]) -> bool:
        agrees = True
        for name, mine, others in zip(names, live, other, strict=True):
            tolerance = self._tolerances.get(name, self._default)
            agrees &= self.outputs[name].add(mine, others, self._specs[name], tolerance)
        self.samples += 1
        self.agreed += agrees
        return agrees

    def _time(self, live_s: float, run_s: float) -> None:
        if live_s <= 0:
            return
        self.pairs += 1
        self.live_s += live_s
        self.run_s += run_s
        self._ratios[bisect_left(RATIO_BOUNDS, run_s / live_s)] += 1

    @property
    def rows(self) -> int:
        return sum(counts.rows for counts in self.outputs.values())

    @property
    def flips(self) -> int:
        return sum(counts.flips for counts in self.outputs.values())

    @property
    def median_ratio(self) -> float:
        """0 without pairs; the upper bound of its bucket."""
        below = 0
        for index, count in enumerate(self._ratios):
            below += count
            if count and 2 * below >= self.pairs:
                return RATIO_BOUNDS[min(index, len(RATIO_BOUNDS) - 1)]
        return 0.0

    def document(self) -> dict[str, Any]:
        """Numbers of one moment."""
        with self._lock:
            return self._document()

    def _document(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "agreed": self.agreed,
            "rows": self.rows,
            "flips": self.flips,
            "outputs": {name: counts.document() for name, counts in self.outputs.items()},
            "latency": {
                "pairs": self.pairs,
                "live_ms": self.live_s * 1e3,
                "run_ms": self.run_s * 1e3,
                "median_ratio": self.median_ratio,
                "bounds": RATIO_BOUNDS,
                "counts": tuple(self._ratios),
            },
        }


def _real(array: Array, spec: TensorSpec) -> Array:
    """As float64; BF16, which comes as its bits, and quantized numbers as what they stand for."""
    if spec.datatype == "BF16":
        wide: Array = (array.astype(np.uint32) << 16).view(np.float32)
        return wide.astype(np.float64)
    values: Array = array.astype(np.float64)
    quantization = spec.quantization
    if quantization is None or array.dtype.kind not in "iu":
        return values
    scales, zeros = np.array(quantization.scales), np.array(quantization.zero_points)
    if quantization.axis is not None and len(scales) > 1:
        shape = [1] * values.ndim
        shape[quantization.axis] = len(scales)
        scales, zeros = scales.reshape(shape), zeros.reshape(shape)
    real: Array = (values - zeros) * scales
    return real
