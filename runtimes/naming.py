"""Which names requests may use for the tensors of a model, and which tensor each of them means.

A request that names no signature uses the model's own names, and those of the default signature where they are not another
tensor's. One that names a signature uses that signature's names; with the default one, the model's own too where they mean
nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from runtimes.contract import Model, Signature, TensorSpec, signatures_of

SERVING_DEFAULT = "serving_default"  # how TensorFlow calls the signature of a model that has only one

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Interface:
    """One way to ask. `inputs` and `outputs` have every name that is understood; the tensors there have the names that
    `Model.run` takes. `said_inputs` and `said_outputs` are what is told of it, under the names that belong to it.
    """

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    said_inputs: tuple[TensorSpec, ...]
    said_outputs: tuple[TensorSpec, ...]
    asked: list[str] | None  # for `Model.run`, when a request names no outputs; None: all that the model has
    is_signature: bool  # whose names may mean one tensor twice

    @property
    def required(self) -> list[TensorSpec]:
        """What every request gives, as said."""
        return [spec for spec in self.said_inputs if not spec.optional]

    def own_names(self, values: Mapping[str, T]) -> dict[str, T]:
        """Inputs under the names that `Model.run` takes; unknown names stay, for it to refuse."""
        return {self.inputs[name].name if name in self.inputs else name: value for name, value in values.items()}

    def run_name(self, output: str) -> str:
        return self.outputs[output].name if output in self.outputs else output


class Interfaces:
    """All ways to ask one model. `signatures` has those that its file names, the default one first."""

    def __init__(
        self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], signatures: Sequence[Signature] = ()
    ) -> None:
        own_inputs, own_outputs = {s.name: s for s in inputs}, {s.name: s for s in outputs}
        default = signatures[0] if signatures else Signature("", {}, {})
        self.plain = Interface(
            {**default.inputs, **own_inputs}, {**default.outputs, **own_outputs}, tuple(inputs), tuple(outputs), None,
            is_signature=False,
        )  # fmt: skip
        self.signatures: dict[str, Interface] = {}
        for signature in signatures:
            is_default = signature is default
            self.signatures[signature.name] = _interface(
                signature, own_inputs if is_default else {}, own_outputs if is_default else {}
            )
        self.default_name = default.name or SERVING_DEFAULT
        elsewhere = [s for s in signatures if s is not default]
        self._elsewhere = {spec.name: s for s in elsewhere for spec in (*s.inputs.values(), *s.outputs.values())}
        more = {spec.name: spec for s in elsewhere for spec in s.outputs.values()}
        self.every_output: tuple[TensorSpec, ...] = (*outputs, *more.values())

    @classmethod
    def of(cls, model: Model) -> Interfaces:
        return cls(model.inputs, model.outputs, signatures_of(model))

    @property
    def default(self) -> Interface:
        """The default signature; what the model calls its tensors itself where its file names none."""
        return self.signatures.get(self.default_name, self.plain)

    def find(self, signature: str) -> Interface:
        """An empty name is none.  Raises: KeyError."""
        if not signature or (not self.signatures and signature == SERVING_DEFAULT):
            return self.plain
        return self.signatures[signature]

    def by_every_name(self, values: Mapping[str, T]) -> dict[str, T]:
        """Values of outputs, given under any of their names, under all of their names."""
        found = dict(values)
        for interface in (self.plain, *self.signatures.values()):
            tensors = {interface.outputs[name].name: value for name, value in values.items() if name in interface.outputs}
            for name, spec in interface.outputs.items():
                if spec.name in tensors:
                    found.setdefault(name, tensors[spec.name])
        return found

    def inputs_for(self, names: Iterable[str]) -> Sequence[TensorSpec]:
        """The inputs of the one that has all of these, which are names for `Model.run`; the model's own where none does."""
        for name in names:
            if name in self._elsewhere:
                return tuple({spec.name: spec for spec in self._elsewhere[name].inputs.values()}.values())
        return self.plain.said_inputs


def _interface(signature: Signature, own_inputs: Mapping[str, TensorSpec], own_outputs: Mapping[str, TensorSpec]) -> Interface:
    return Interface(
        {**own_inputs, **signature.inputs},
        {**own_outputs, **signature.outputs},
        tuple(_said(name, spec) for name, spec in signature.inputs.items()),
        tuple(_said(name, spec) for name, spec in signature.outputs.items()),
        [spec.name for spec in signature.outputs.values()],
        is_signature=True,
    )


def _said(name: str, spec: TensorSpec) -> TensorSpec:
    return spec if spec.name == name else replace(spec, name=name)
