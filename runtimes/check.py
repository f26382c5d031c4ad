"""Why arrays do not fit a model, in words, and arrays that fit: zeros, and those of a file.

An engine checks for itself: a good request never pays for this.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from runtimes.contract import DATATYPES, Array, InputInvalid, TensorSpec

MAX_ZEROS_BYTES = 256 * 1024 * 1024  # inputs larger than this are not worth a run without meaning


def shape_text(shape: Sequence[int]) -> str:
    return "[" + ",".join(str(size) for size in shape) + "]"


def check_feeds(specs: Sequence[TensorSpec], feeds: Mapping[str, Array]) -> None:
    """Raises: InputInvalid naming the first input that is missing, unknown, or of the wrong datatype or shape."""
    expected = {spec.name for spec in specs}
    for name in feeds:
        if name not in expected:
            raise InputInvalid(f"input {name!r} is not known; the model takes {_names(specs)}")
    for spec in specs:
        array = feeds.get(spec.name)
        if array is None:
            if spec.optional:
                continue
            raise InputInvalid(f"input {spec.name!r} is missing")
        if array.dtype != spec.dtype:
            datatype = DATATYPES.get(np.dtype(array.dtype), str(array.dtype))
            raise InputInvalid(f"input {spec.name!r} has datatype {datatype}, expected {spec.datatype}")
        if not spec.fits(array.shape):
            raise InputInvalid(f"input {spec.name!r} has shape {shape_text(array.shape)}, expected {shape_text(spec.shape)}")


def zeros(specs: Sequence[TensorSpec]) -> dict[str, Array] | None:
    """An array of zeros per input that is not optional, free sizes being 1. None when zeros would mean nothing, or take much
    memory.
    """
    specs = [spec for spec in specs if not spec.optional]
    if any(spec.datatype == "BYTES" for spec in specs):
        return None
    shapes = [tuple(1 if size == -1 else size for size in spec.shape) for spec in specs]
    size = sum(math.prod(shape) * spec.dtype.itemsize for shape, spec in zip(shapes, specs, strict=True))
    if size > MAX_ZEROS_BYTES:
        return None
    return {spec.name: np.zeros(shape, spec.dtype) for shape, spec in zip(shapes, specs, strict=True)}


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays of an .npz as models take them: in C order, texts (which NumPy saves as S or U) as `bytes` objects. Those
    without dimensions stay so. Pickled objects are not read: they could run code.

    Raises: ValueError when it is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: _plain(archive[name]) for name in archive.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an .npz of plain arrays: {error}") from error


def _plain(array: Array) -> Array:
    if array.dtype.kind not in "SU":
        return np.asarray(array, order="C")  # `ascontiguousarray` would give it a dimension
    texts = np.empty(array.size, np.object_)
    texts[:] = [element.encode() if isinstance(element, str) else bytes(element) for element in array.flat]
    return texts.reshape(array.shape)


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(repr(spec.name) for spec in specs) or "no inputs"
