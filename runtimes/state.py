"""State that a release declares as pairs of an input and the output it is fed from, for engines that hold none themselves.

The inputs named vanish from what callers see. They begin as zeros, a free size being 1, and then are what the run before it
gave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from runtimes.check import shape_text
from runtimes.contract import Array, Growing, Model, ModelInvalid, Placement, Signature, TensorSpec, signatures_of
from runtimes.naming import Interfaces


class DeclaredState:
    """A model whose `state` inputs are fed from here."""

    stateful = True

    def __init__(self, model: Model, state: Mapping[str, str]) -> None:
        """Raises: ModelInvalid when the pairs do not fit the model."""
        self._model = model
        interfaces = Interfaces.of(model)
        own = {**interfaces.default.inputs, **interfaces.plain.inputs}
        given = {**interfaces.default.outputs, **interfaces.plain.outputs}
        self.pairs = {_own_name(name, own): _own_name(output, given) for name, output in state.items()}
        self.initial = _initial(model, self.pairs)
        self.inputs = tuple(spec for spec in model.inputs if spec.name not in self.pairs)
        self.all_outputs = [spec.name for spec in model.outputs]
        self.signatures = tuple(self._without_state(signature) for signature in signatures_of(model))
        self._own_outputs = frozenset(self.all_outputs)

    def _without_state(self, signature: Signature) -> Signature:
        inputs = {name: spec for name, spec in signature.inputs.items() if spec.name not in self.pairs}
        return replace(signature, inputs=inputs)

    def keeps_state(self, outputs: Sequence[str] | None) -> bool:
        """Whether a run for these is one of the default signature, whose inputs the state is among."""
        return not outputs or outputs[0] in self._own_outputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._model.outputs

    @property
    def placement(self) -> Placement:
        return self._model.placement

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Array]:
        if not self.keeps_state(outputs):
            return self._model.run(feeds, outputs)
        return self._model.run({**feeds, **self.initial}, outputs)

    @property
    def grown_bytes(self) -> int:
        return self._model.grown_bytes if isinstance(self._model, Growing) else 0

    def sequence(self) -> DeclaredSequence:
        return DeclaredSequence(self, self._model)

    def close(self) -> None:
        self._model.close()


class DeclaredSequence:
    def __init__(self, declared: DeclaredState, model: Model) -> None:
        self._declared, self._pairs, self._all, self._model = declared, declared.pairs, declared.all_outputs, model
        self._values: Mapping[str, Array] = declared.initial

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Array]:
        if not self._declared.keeps_state(outputs):
            return self._model.run(feeds, outputs)
        wanted = list(outputs or self._all)
        names = wanted + [name for name in self._pairs.values() if name not in wanted]
        found = dict(zip(names, self._model.run({**feeds, **self._values}, names), strict=True))
        self._values = {name: _own(found[output]) for name, output in self._pairs.items()}
        return [found[name] for name in wanted]

    def close(self) -> None:
        self._values = {}


def _own(array: Array) -> Array:
    """The caller gets the array too, and may write into it."""
    return array.copy(order="C")


def _own_name(name: str, tensors: Mapping[str, TensorSpec]) -> str:
    """A release may call a tensor as the default signature does."""
    return tensors[name].name if name in tensors else name


def _initial(model: Model, state: Mapping[str, str]) -> dict[str, Array]:
    inputs = {spec.name: spec for spec in model.inputs}
    outputs = {spec.name: spec for spec in model.outputs}
    for name, output in state.items():
        if name not in inputs or output not in outputs:
            missing = f"input {name!r}" if name not in inputs else f"output {output!r}"
            raise ModelInvalid(f"the release declares state {name!r} from {output!r}, but the model has no {missing}")
        fed, given = inputs[name], outputs[output]
        if fed.datatype != given.datatype or fed.datatype == "BYTES" or not _may_fit(given.shape, fed.shape):
            raise ModelInvalid(
                f"state {name!r} is {fed.datatype} {shape_text(fed.shape)}, "
                f"but output {output!r} that it is to be fed from is {given.datatype} {shape_text(given.shape)}"
            )
    return {name: _zeros(inputs[name]) for name in state}


def _zeros(spec: TensorSpec) -> Array:
    array: Array = np.zeros([1 if size == -1 else size for size in spec.shape], spec.dtype)
    array.flags.writeable = False  # every sequence and every request begins with it
    return array


def _may_fit(given: Sequence[int], fed: Sequence[int]) -> bool:
    return len(given) == len(fed) and all(-1 in (a, b) or a == b for a, b in zip(given, fed, strict=True))
