"""Why arrays do not fit a model, in words. Called after an engine refused them, so a good request never pays for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from runtimes.contract import DATATYPES, Array, InputInvalid, TensorSpec


def shape_text(shape: Sequence[int]) -> str:
    return "[" + ",".join(str(size) for size in shape) + "]"


def shape_fits(actual: Sequence[int], declared: Sequence[int]) -> bool:
    return len(actual) == len(declared) and all(d in (-1, a) for a, d in zip(actual, declared, strict=True))


def check_feeds(specs: Sequence[TensorSpec], feeds: Mapping[str, Array]) -> None:
    """Raises: InputInvalid naming the first input that is missing, unknown, or of the wrong datatype or shape."""
    expected = {spec.name for spec in specs}
    for name in feeds:
        if name not in expected:
            raise InputInvalid(f"input {name!r} is not known; the model takes {_names(specs)}")
    for spec in specs:
        array = feeds.get(spec.name)
        if array is None:
            raise InputInvalid(f"input {spec.name!r} is missing")
        if array.dtype != spec.dtype:
            datatype = DATATYPES.get(np.dtype(array.dtype), str(array.dtype))
            raise InputInvalid(f"input {spec.name!r} has datatype {datatype}, expected {spec.datatype}")
        if not shape_fits(array.shape, spec.shape):
            raise InputInvalid(f"input {spec.name!r} has shape {shape_text(array.shape)}, expected {shape_text(spec.shape)}")


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(repr(spec.name) for spec in specs) or "no inputs"
