"""TensorFlow Serving's verbs as forms of a prediction: how predict, classify and regress read their requests and write their
answers.

A request says its tensors in rows (`instances`, a value or an object per row) or in columns (`inputs`, a whole tensor each);
the answer takes the same form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from agent.serving.answers import Answer, Refusal, json_answer
from agent.serving.api import lists, tensors
from agent.serving.api.classification import floats
from agent.serving.api.parameters import shown
from agent.serving.api.tfserving_body import Body, Text
from agent.serving.models.version import Version
from agent.serving.prediction import Form
from agent.serving.routes import Request
from agent.serving.scheduling.demand import SequenceDemand
from runtimes.check import shape_text
from runtimes.contract import Array, TensorSpec
from runtimes.naming import Interface

HEAD_BYTES = 256  # in which a value shows of which kind it is
Write = Callable[[Version, "Plan", Sequence[Array]], object]


class PredictRequest(msgspec.Struct):
    signature_name: str = ""
    instances: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    inputs: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class ExamplesRequest(msgspec.Struct):
    examples: msgspec.Raw
    signature_name: str = ""
    context: msgspec.Raw = msgspec.Raw(b"{}")


@dataclass(slots=True)
class Plan:
    """A request, understood. `specs` are of the outputs in the order of the answer; None in `outputs` is all of them."""

    feeds: dict[str, Array]
    specs: tuple[TensorSpec, ...]
    rows: int | None = None  # how many there are, of a request in rows
    outputs: list[str] | None = None
    priority: int = 0
    timeout_s: float | None = None
    sequence: SequenceDemand | None = None


class RestForm(Form):
    """How one verb reads its request and writes its answer."""

    def __init__(self, read: Callable[[Version, Body], Plan], write: Write) -> None:
        self._read = read
        self._write = write

    def read(self, version: Version, call: Request) -> Plan:
        return self.read_body(version, Body(call.body, call.allowance))

    def read_body(self, version: Version, body: Body) -> Plan:
        """The plan of a request with this body.  Raises: Refusal."""
        return self._read(version, body)

    def feeds(self, _version: Version, plan: Plan, _call: Request) -> Mapping[str, Array]:
        return plan.feeds

    def write(self, version: Version, plan: Plan, _call: Request, arrays: Sequence[Array]) -> Answer:
        return json_answer(self._write(version, plan, arrays))


# -- predict
# ---------------------------------------------------------------------------------------------------------------------


def _read_predict(version: Version, body: Body) -> Plan:
    request = body.document(PredictRequest)
    interface = _interface(version, request.signature_name)
    model, outputs, asked = version.name, interface.said_outputs, interface.asked
    rows = request.instances
    if (rows is msgspec.UNSET) == (request.inputs is msgspec.UNSET):
        raise Refusal(400, "Missing 'inputs' or 'instances' key: a request has one of the two")
    if rows is msgspec.UNSET:
        assert request.inputs is not msgspec.UNSET
        feeds = _feeds(model, interface, _columns(model, interface, request.inputs, body), body)
        return Plan(feeds, outputs, outputs=asked)
    texts = _stacked(model, interface, rows, body)
    feeds = _feeds(model, interface, texts, body)
    counts = {len(array) if array.ndim else 0 for array in feeds.values()}
    if not counts or 0 in counts:
        raise Refusal(400, "'instances' is empty: a prediction needs one or more")
    return Plan(feeds, outputs, max(counts), asked)


def _columns(model: str, interface: Interface, raw: msgspec.Raw, body: Body) -> dict[str, Text]:
    """The JSON of each input's whole tensor."""
    if _begins(raw, b"{"):
        text = body.text_of(raw)
        if not isinstance(text, memoryview):  # not a place that stands for a list
            found = body.members(raw)
            if set(found) != {"b64"}:
                return {name: body.text_of(value) for name, value in found.items()}
        return {_only(model, interface): text}
    return {_only(model, interface): body.text_of(raw)}


def _stacked(model: str, interface: Interface, raw: msgspec.Raw, body: Body) -> dict[str, Text]:
    """The JSON of each input, stacked from rows: each is a value of the only input, or an object with one for every input."""
    inner = bytes(memoryview(raw)[:HEAD_BYTES]).lstrip()[1:].lstrip()
    if inner[:1] == b"]":
        raise Refusal(400, "'instances' is empty: a prediction needs one or more")
    if _begins(raw, b"{") or not (_begins(raw, b"[") and inner[:1] == b"{"):  # taken out, or no objects
        text = body.text_of(raw)
        if isinstance(text, bytes) and not _begins(raw, b"["):
            raise Refusal(400, "JSON Parse error: 'instances' is no list")
        return {_only(model, interface): text}

    def rows() -> Iterator[list[Mapping[str, Text]]]:
        for some in body.rows(raw):
            yield [_named(model, interface, row) for row in some]

    return body.stacked(rows(), "instance", "inputs")[0]


def _named(model: str, interface: Interface, row: dict[str, Text]) -> dict[str, Text]:
    return {_only(model, interface): b"".join((b'{"b64":', row["b64"], b"}"))} if len(row) == 1 and "b64" in row else row


def _begins(raw: msgspec.Raw, with_: bytes) -> bool:
    return bytes(memoryview(raw)[:HEAD_BYTES]).lstrip()[:1] == with_


def _only(model: str, interface: Interface) -> str:
    required = interface.required
    if len(required) != 1:
        names = ", ".join(f"'{spec.name}'" for spec in required)
        raise Refusal(400, f"model '{model}' has {len(required)} inputs: give each by its name ({names})")
    return required[0].name


def _feeds(model: str, interface: Interface, texts: Mapping[str, Text], body: Body) -> dict[str, Array]:
    feeds: dict[str, Array] = {}
    for name, text in texts.items():
        spec = interface.inputs.get(name)
        if spec is None:
            known = ", ".join(f"'{spec.name}'" for spec in interface.said_inputs)
            raise Refusal(400, f"input {shown(name)} is not one of model '{model}'; it takes {known}")
        array = lists.read(name, text, spec.datatype, None, encoded=True, allowance=body.allowance)
        if not spec.fits(array.shape):
            raise Refusal(
                400,
                f"unexpected shape for input '{name}' for model '{model}'. "
                f"Expected {shape_text(spec.shape)}, got {shape_text(array.shape)}",
            )
        feeds[spec.name] = array
    for spec in interface.required:
        if interface.inputs[spec.name].name not in feeds:
            raise Refusal(400, f"input '{spec.name}' of model '{model}' is missing")
    return feeds


def _write_predict(version: Version, plan: Plan, arrays: Sequence[Array]) -> object:
    values = {spec.name: _values(spec, array) for spec, array in zip(plan.specs, arrays, strict=True)}
    if plan.rows is None:
        return {"outputs": next(iter(values.values())) if len(values) == 1 else values}
    for spec, array in zip(plan.specs, arrays, strict=True):
        if array.ndim == 0 or array.shape[0] != plan.rows:
            raise Refusal(
                400,
                f"output '{spec.name}' of model '{version.name}' has shape {shape_text(array.shape)}, no row for each of "
                f"{plan.rows} instances: ask with 'inputs' instead",
            )
    if len(values) == 1:
        return {"predictions": next(iter(values.values()))}
    columns = [_by_row(spec, array) for spec, array in zip(plan.specs, arrays, strict=True)]
    return {"predictions": [dict(zip(values, row, strict=True)) for row in zip(*columns, strict=True)]}


def _by_row(spec: TensorSpec, array: Array) -> list[Any]:
    if spec.datatype == "BYTES":
        rows: list[Any] = _values(spec, array)
        return rows
    return [_values(spec, np.asarray(row)) for row in array]


def _values(spec: TensorSpec, array: Array) -> Any:
    if spec.datatype == "BYTES":
        return tensors.texts(array, encode=spec.name.endswith("_bytes"))
    return tensors.numbers(floats(array) if spec.datatype == "BF16" else array)


# -- classify and regress
# --------------------------------------------------------------------------------------------------------


def _read_examples(version: Version, body: Body, choose: Callable[[str, Interface], TensorSpec]) -> Plan:
    request = body.document(ExamplesRequest)
    interface = _interface(version, request.signature_name)
    output = choose(version.name, interface)
    context = {name: body.text_of(value) for name, value in body.members(request.context).items()}
    ranks = {name: len(spec.shape) for name, spec in interface.inputs.items()}

    def rows() -> Iterator[list[Mapping[str, Text]]]:
        for some in body.rows(request.examples):
            yield [{n: _row(t, ranks.get(n, 1)) for n, t in {**context, **row}.items()} for row in some]

    texts, count = body.stacked(rows(), "example", "features")
    if not count:
        raise Refusal(400, "'examples' is empty: one or more are needed")
    return Plan(_feeds(version.name, interface, texts, body), (output,), count, [interface.run_name(output.name)])


def _row(text: Text, rank: int) -> Text:
    """A feature is a value or a list of values; a row of an input of two dimensions is a list."""
    return b"".join((b"[", text, b"]")) if rank > 1 and bytes(memoryview(text)[:HEAD_BYTES]).lstrip()[:1] != b"[" else text


def _read_classify(version: Version, body: Body) -> Plan:
    return _read_examples(version, body, _scores)


def _scores(model: str, interface: Interface) -> TensorSpec:
    fitting = [s for s in interface.said_outputs if len(s.shape) == 2 and s.datatype not in ("BYTES", "BOOL")]
    return _one_output(model, fitting, "a score per class and example")


def _read_regress(version: Version, body: Body) -> Plan:
    return _read_examples(version, body, _numbers)


def _numbers(model: str, interface: Interface) -> TensorSpec:
    fitting = [
        spec
        for spec in interface.said_outputs
        if spec.shape[1:] in ((), (1,)) and spec.shape and spec.datatype not in ("BYTES", "BOOL")
    ]
    return _one_output(model, fitting, "one number per example")


def _one_output(model: str, fitting: Sequence[TensorSpec], what: str) -> TensorSpec:
    if len(fitting) != 1:
        raise Refusal(400, f"model '{model}' has {len(fitting) or 'no'} outputs that are {what}: use :predict")
    return fitting[0]


def _write_classes(version: Version, plan: Plan, arrays: Sequence[Array]) -> object:
    (spec,) = plan.specs
    scores = (floats(arrays[0]) if spec.datatype == "BF16" else arrays[0]).tolist()
    _check_rows(version, plan, scores)
    labels = version.labels.get(spec.name, ())
    results = [[[labels[n] if n < len(labels) else str(n), score] for n, score in enumerate(row)] for row in scores]
    return {"result": msgspec.Raw(tensors.finite_or_not(results))}


def _write_values(version: Version, plan: Plan, arrays: Sequence[Array]) -> object:
    values = arrays[0].reshape(-1)
    _check_rows(version, plan, values)
    return {"result": _values(plan.specs[0], values)}


def _check_rows(version: Version, plan: Plan, rows: Sequence[object] | Array) -> None:
    if len(rows) != plan.rows:
        raise Refusal(400, f"model '{version.name}' gave {len(rows)} results for {plan.rows} examples: use :predict")


def _interface(version: Version, signature: str) -> Interface:
    """The interface of the signature that a request names, or of the default one.  Raises: Refusal (400)."""
    interfaces = version.interfaces
    try:
        return interfaces.find(signature) if signature else interfaces.default
    except KeyError:
        known = ", ".join(f"'{name}'" for name in interfaces.signatures or (interfaces.default_name,))
        raise Refusal(400, f"Serving signature name: {shown(signature)} not found in signature def; there is {known}") from None


FORMS = {
    "predict": RestForm(_read_predict, _write_predict),
    "classify": RestForm(_read_classify, _write_classes),
    "regress": RestForm(_read_regress, _write_values),
}
"""By the verb at the end of the path."""
