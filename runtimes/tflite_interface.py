"""What a TFLite file can be asked, and under which names: its first subgraph, and each of its signatures.

Tensors are called as the file calls them. One without a name, or with the name of another, is called as the default signature
calls it, else by its place (`input_0`). Signatures have names of their own; see `runtimes.contract.Signature`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.contract import DATATYPES, ModelInvalid, Quantization, Signature, TensorSpec
from runtimes.tflite_graph import Facts, FileSignature

SERVING_DEFAULT = "serving_default"
NARROW = {17: (-8, 7), 19: (-2, 1), 20: (0, 15)}  # INT4, INT2, UINT4: the engine takes bytes, and fails on others
Details = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Feed:
    """An input: `at` is its tensor's index, or its name in the signature."""

    name: str
    dtype: np.dtype[Any]
    at: Any


@dataclass(frozen=True, slots=True)
class Method:
    """One way to run the file. `key` is the signature that the engine is to run; None for the first subgraph, by the indexes of
    tensors.
    """

    key: str | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    feeds: tuple[Feed, ...]
    results: Mapping[str, Any]  # output → its tensor's index, or its name in the signature
    signature: Signature | None
    narrow: Mapping[str, tuple[int, int]] = field(
        default_factory=dict
    )  # inputs whose values have fewer bits than their arrays: from, to

    @property
    def has_scalars(self) -> bool:
        """Whether a text that goes in, or anything that comes out, may have no dimensions."""
        texts = [spec for spec in self.inputs if spec.datatype == "BYTES"]
        return any(spec.any_rank or not spec.shape for spec in (*texts, *self.outputs))


def methods_of(native: Any, facts: Facts, path: Path, wanted: str) -> tuple[Method, ...]:
    """The default one first: the signature `wanted`, else serving_default, else the first one; the first subgraph where it has
    none.

    Raises: ModelInvalid.
    """
    _check_outputs(native, facts, path)
    signatures = [signature for signature in facts.signatures if signature.key and signature.outputs]
    default = _default(signatures, wanted, path)
    if default is None:
        return (_primary(native, facts, None),)
    first = (
        _primary(native, facts, default) if default.subgraph == 0 else _signed(native, facts, default, set(), is_default=True)
    )
    methods, taken = [first], {spec.name for spec in (*first.inputs, *first.outputs)}
    for signature in signatures:
        if signature is not default:
            method = _signed(native, facts, signature, taken, is_default=False)
            taken |= {spec.name for spec in (*method.inputs, *method.outputs)}
            methods.append(method)
    return tuple(methods)


def _check_outputs(native: Any, facts: Facts, path: Path) -> None:
    """The engine would give whatever lies in memory, or crash."""
    for detail in native.get_output_details():
        if (0, int(detail["index"])) in facts.unwritten:
            raise ModelInvalid(f"{path.name}: nothing in the model writes its output {detail['name']!r}")
    for signature in facts.signatures:
        for name, index in signature.outputs.items():
            if (signature.subgraph, index) in facts.unwritten:
                raise ModelInvalid(f"{path.name}: nothing in the model writes output {name!r} of signature {signature.key!r}")


def _default(signatures: Sequence[FileSignature], wanted: str, path: Path) -> FileSignature | None:
    by_key = {signature.key: signature for signature in signatures}
    if wanted:
        if wanted not in by_key:
            known = ", ".join(map(repr, by_key)) or "none"
            raise ModelInvalid(f"option signature={wanted!r}: {path.name} has no such signature (it has: {known})")
        return by_key[wanted]
    return by_key.get(SERVING_DEFAULT, signatures[0] if signatures else None)


def _primary(native: Any, facts: Facts, signature: FileSignature | None) -> Method:
    """The first subgraph. A tensor that is an input or output twice is one."""
    inputs = _distinct(native.get_input_details())
    outputs = _distinct(native.get_output_details())
    names_in = _named(inputs, signature.inputs if signature else {}, "input")
    names_out = _named(outputs, signature.outputs if signature else {}, "output")
    specs_in = {index: _spec(detail, names_in[index], facts, 0, "input") for index, detail in inputs.items()}
    specs_out = {index: _spec(detail, names_out[index], facts, 0, "output") for index, detail in outputs.items()}
    said = None
    if signature is not None:
        said = Signature(signature.key, _said(signature.inputs, specs_in), _said(signature.outputs, specs_out, only_said=True))
    feeds = tuple(Feed(spec.name, spec.dtype, index) for index, spec in specs_in.items())
    results = {spec.name: index for index, spec in specs_out.items()}
    narrow = {spec.name: bounds for index, spec in specs_in.items() if (bounds := _bounds(facts, 0, index))}
    return Method(None, tuple(specs_in.values()), tuple(specs_out.values()), feeds, results, said, narrow)


def _distinct(details: Sequence[Details]) -> dict[int, Details]:
    return {int(detail["index"]): detail for detail in details}


def _named(details: Mapping[int, Details], said: Mapping[str, int], role: str) -> dict[int, str]:
    counts = Counter(detail["name"] for detail in details.values())
    names = {index: detail["name"] for index, detail in details.items() if detail["name"] and counts[detail["name"]] == 1}
    for place, index in enumerate(details):
        if index not in names:
            other = [name for name, at in said.items() if at == index and name]
            names[index] = _free([*other, f"{role}_{place}"], names.values())
    return names


def _free(names: Sequence[str], taken: Collection[str]) -> str:
    for name in names:
        if name not in taken:
            return name
    return _free([f"{names[-1]}_"], taken)


def _said(said: Mapping[str, int], specs: Mapping[int, TensorSpec], *, only_said: bool = False) -> dict[str, TensorSpec]:
    """In the order of the subgraph; an input that the signature does not name is needed all the same."""
    found: dict[str, TensorSpec] = {}
    for index, spec in specs.items():
        names = [name for name, at in said.items() if at == index]
        if not names and not only_said:
            names = [spec.name]
        found.update(dict.fromkeys(names, spec))
    return found


def _signed(native: Any, facts: Facts, signature: FileSignature, taken: set[str], *, is_default: bool) -> Method:
    """A signature that the engine runs by its name."""
    runner = native.get_signature_runner(signature.key)
    details = runner.get_input_details(), runner.get_output_details()
    specs: list[dict[str, TensorSpec]] = []
    for role, said, found in zip(("input", "output"), (signature.inputs, signature.outputs), details, strict=True):
        raw = _named(_distinct(list(found.values())), said, role) if is_default else {}
        specs.append({
            name: _spec(
                found[name],
                raw[index] if is_default else _free([f"{signature.key}/{name}"], taken),
                facts,
                signature.subgraph,
                role,
            )
            for name, index in said.items()
            if name in found
        })  # fmt: skip
    inputs, outputs = specs
    return Method(
        signature.key,
        tuple({spec.name: spec for spec in inputs.values()}.values()),
        tuple({spec.name: spec for spec in outputs.values()}.values()),
        tuple(Feed(spec.name, spec.dtype, name) for name, spec in inputs.items()),
        {spec.name: name for name, spec in outputs.items()},
        Signature(signature.key, inputs, outputs),
        {
            spec.name: bounds
            for name, spec in inputs.items()
            if (bounds := _bounds(facts, signature.subgraph, signature.inputs[name]))
        },
    )


def _bounds(facts: Facts, subgraph: int, index: int) -> tuple[int, int] | None:
    _, _, kind = facts.ends.get((subgraph, index), ("", "", -1))
    return NARROW.get(kind)


def _spec(detail: Details, name: str, facts: Facts, subgraph: int, role: str) -> TensorSpec:
    dtype = np.dtype(detail["dtype"])
    datatype = "BYTES" if dtype.kind in "SUO" else DATATYPES.get(dtype)
    if datatype is None:
        raise ModelInvalid(f"{role} {name!r} has type {dtype}, which cannot cross the socket")
    shape = detail.get("shape_signature")
    if shape is None or len(shape) == 0:
        shape = detail["shape"]
    any_rank = len(shape) == 0 and (subgraph, int(detail["index"])) in facts.rankless
    sizes = (-1,) if any_rank else tuple(int(n) for n in shape)
    return TensorSpec(name, datatype, sizes, _quantization(detail), any_rank=any_rank)


def _quantization(detail: Details) -> Quantization | None:
    parameters = detail["quantization_parameters"]
    scales, zeros = parameters["scales"], parameters["zero_points"]
    if len(scales) == 0 or len(scales) != len(zeros):
        return None
    axis = int(parameters["quantized_dimension"]) if len(scales) > 1 else None
    return Quantization(tuple(float(s) for s in scales), tuple(int(z) for z in zeros), axis)
