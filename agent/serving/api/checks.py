"""Whether what a request names fits the model: the same checks and words for every transport."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NoReturn

from agent.serving.answers import Refusal
from runtimes.check import shape_fits, shape_text
from runtimes.contract import DTYPES, TensorSpec

MAX_ELEMENTS = 2**48  # NumPy counts bytes in 63 bits, and counts sizes beside a 0 too


def check_input(name: str, datatype: str, shape: Sequence[int], spec: TensorSpec, model: str) -> None:
    """Raises: Refusal (400) when a tensor that is said to be so is not what `spec` takes."""
    if datatype != spec.datatype:
        known = "" if datatype in DTYPES else ", which is not a datatype of this server"
        raise Refusal(
            400,
            f"inference input '{name}' has datatype '{datatype}'{known}; model '{model}' expects '{spec.datatype}'",
        )
    if any(size < 0 for size in shape):
        raise Refusal(400, f"shape {shape_text(shape)} of input '{name}' has a negative size")
    if math.prod(size or 1 for size in shape) > MAX_ELEMENTS:
        raise Refusal(400, f"shape {shape_text(shape)} of input '{name}' is larger than any memory")
    if not shape_fits(shape, spec.shape):
        raise Refusal(
            400,
            f"unexpected shape for input '{name}' for model '{model}'. "
            f"Expected {shape_text(spec.shape)}, got {shape_text(shape)}",
        )


def check_size(name: str, size: int, shape: Sequence[int], spec: TensorSpec, model: str) -> None:
    """Raises: Refusal (400) when `size` bytes do not make such a tensor. BYTES carry their own lengths."""
    if spec.datatype == "BYTES":
        return
    expected = math.prod(shape) * spec.dtype.itemsize
    if size != expected:
        raise Refusal(
            400,
            f"unexpected size for input '{name}', expecting {expected - size} additional bytes for model '{model}' "
            f"({expected} bytes for {spec.datatype} {shape_text(shape)}, got {size})",
        )


def refuse_input(name: str, model: str, inputs: Sequence[TensorSpec]) -> NoReturn:
    """For a name that is not, or no longer, among those that the model waits for.  Raises: Refusal (400)."""
    if any(spec.name == name for spec in inputs):
        raise Refusal(400, f"input '{name}' is given twice")
    known = ", ".join(f"'{spec.name}'" for spec in inputs)
    raise Refusal(400, f"unexpected inference input '{name}' for model '{model}'; it takes {known}")


def refuse_missing(names: Iterable[str], given: int, model: str, inputs: Sequence[TensorSpec]) -> NoReturn:
    missing = ", ".join(f"'{name}'" for name in names)
    raise Refusal(400, f"expected {len(inputs)} inputs but got {given} inputs for model '{model}': {missing} is missing")


def refuse_output(name: str, model: str, outputs: Sequence[TensorSpec]) -> NoReturn:
    known = ", ".join(f"'{spec.name}'" for spec in outputs)
    wrong = "asked for twice" if any(spec.name == name for spec in outputs) else f"not one of {known}"
    raise Refusal(400, f"unexpected inference output '{name}' for model '{model}': it is {wrong}")
