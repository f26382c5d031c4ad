"""Whether what a request names fits the model: the same checks and words for every transport."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from agent.serving.answers import Refusal
from runtimes.check import shape_text
from runtimes.contract import DTYPES, TensorSpec
from runtimes.naming import Interface

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
    if not spec.fits(shape):
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


class Inputs:
    """The inputs that a request has not given yet."""

    def __init__(self, interface: Interface, model: str) -> None:
        self._interface = interface
        self._model = model
        self._left = dict(interface.inputs)
        self._given: set[str] = set()  # names for the runtime

    def claim(self, name: str) -> TensorSpec:
        """The tensor that a request gives as `name`.  Raises: Refusal (400)."""
        spec = self._left.pop(name, None)
        interface = self._interface
        if spec is None and name not in interface.inputs:
            known = ", ".join(f"'{spec.name}'" for spec in interface.said_inputs)
            raise Refusal(400, f"unexpected inference input '{name}' for model '{self._model}'; it takes {known}")
        if spec is None or (spec.name in self._given and not interface.is_signature):
            raise Refusal(400, f"input '{name}' is given twice")
        self._given.add(spec.name)
        return spec

    def check(self) -> None:
        """Once all were claimed.  Raises: Refusal (400) when one is missing."""
        required = self._interface.required
        missing = [spec.name for spec in required if self._interface.inputs[spec.name].name not in self._given]
        if missing:
            names = ", ".join(f"'{name}'" for name in missing)
            raise Refusal(
                400,
                f"expected {len(required)} inputs but got {len(self._given)} inputs for model '{self._model}': {names} is missing",
            )


def refuse_output(name: str, model: str, interface: Interface) -> NoReturn:
    """For a name that is not, or no longer, among the outputs.  Raises: Refusal (400)."""
    known = ", ".join(f"'{spec.name}'" for spec in interface.said_outputs)
    wrong = "asked for twice" if name in interface.outputs else f"not one of {known}"
    raise Refusal(400, f"unexpected inference output '{name}' for model '{model}': it is {wrong}")


def as_asked(spec: TensorSpec, name: str) -> TensorSpec:
    """The tensor under the name that its caller has for it."""
    return spec if spec.name == name else replace(spec, name=name)
