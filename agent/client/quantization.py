"""Real values to and from the integers of quantized tensors: real = scale * (quantized - zero_point).

`metadata` is a tensor's entry of the model's metadata. Tensors whose datatype is not an integer, or that carry no quantization,
pass as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.client.tensors import DTYPES, Array


def quantize(values: Array, metadata: Mapping[str, Any]) -> Array:
    """Floating-point `values` as the tensor's integers, rounded to the nearest and kept within its range; integers stay as they
    are.
    """
    found = _parameters(metadata, np.ndim(values))
    array: Array = np.asarray(values)
    if found is None or array.dtype.kind != "f":
        return array
    scale, zero = found
    dtype = np.dtype(DTYPES[metadata["datatype"]])
    limits = np.iinfo(dtype)
    rounded = np.rint(array / scale + zero)
    return np.nan_to_num(rounded, nan=0.0, posinf=limits.max, neginf=limits.min).clip(limits.min, limits.max).astype(dtype)


def dequantize(values: Array, metadata: Mapping[str, Any]) -> Array:
    """The float32 that the tensor's integers stand for."""
    found = _parameters(metadata, values.ndim)
    if found is None:
        return values
    scale, zero = found
    return ((values.astype(np.float32) - zero) * scale).astype(np.float32)


def _parameters(metadata: Mapping[str, Any], dimensions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Scale and zero point, shaped so that they apply along the axis they are for."""
    given = metadata.get("parameters", {}).get("quantization")
    if given is None or "INT" not in metadata["datatype"]:
        return None
    scale, zero = (np.asarray(given[name], np.float32) for name in ("scale", "zero_point"))
    if scale.ndim:
        shape = [1] * dimensions
        shape[int(given["axis"])] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape) if zero.ndim else zero
    return scale, zero
