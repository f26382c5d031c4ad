"""TensorFlow Serving's REST API for the same models: predict, classify, regress, status and metadata, under /v1/models.

A request says its tensors in rows (`instances`, a value or an object per row) or in columns (`inputs`, a whole tensor each); the
answer takes the same form. A request names a signature of the model's file, or is for its default one; a model whose file has none has
one called serving_default.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec

from agent.contract.codec import decoder
from agent.serving.access import Access
from agent.serving.answers import Answer, Refusal, json_answer
from agent.serving.api import documents, strict, tensors
from agent.serving.api.classification import floats
from agent.serving.api.parameters import shown
from agent.serving.inference import SequenceDemand
from agent.serving.models.host import LABELS, ModelHost, Version
from agent.serving.routes import Kind, Request, Route
from runtimes.check import shape_text
from runtimes.contract import Array, TensorSpec
from runtimes.naming import Interface, Interfaces

STATES = {"LOADING": "LOADING", "READY": "AVAILABLE", "UNAVAILABLE": "END"}
TYPES = {
    "BOOL": "DT_BOOL", "UINT8": "DT_UINT8", "UINT16": "DT_UINT16", "UINT32": "DT_UINT32", "UINT64": "DT_UINT64",
    "INT8": "DT_INT8", "INT16": "DT_INT16", "INT32": "DT_INT32", "INT64": "DT_INT64", "FP16": "DT_HALF", "BF16": "DT_BFLOAT16",
    "FP32": "DT_FLOAT", "FP64": "DT_DOUBLE", "BYTES": "DT_STRING",
}  # fmt: skip
_Document = TypeVar("_Document", bound=msgspec.Struct)
Write = Callable[[Version, "Plan", Sequence[Array]], object]


class PredictRequest(msgspec.Struct):
    signature_name: str = ""
    instances: list[msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET
    inputs: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class ExamplesRequest(msgspec.Struct):
    examples: list[dict[str, msgspec.Raw]]
    signature_name: str = ""
    context: dict[str, msgspec.Raw] = {}


@dataclass(slots=True)
class Plan:
    """A request, understood. `specs` are of the outputs in the order of the answer; None in `outputs` is all of them."""

    feeds: dict[str, Array]
    specs: tuple[TensorSpec, ...]
    rows: int | None = None  # how many there are, of a request in rows
    outputs: list[str] | None = None
    priority: int = 0
    timeout_s: float | None = None
    sequence: SequenceDemand | None = field(default=None)


class Form:
    """How one verb reads its request and writes its answer."""

    def __init__(self, read: Callable[[Version, bytes], Plan], write: Write) -> None:
        self._read = read
        self._write = write

    def read(self, version: Version, call: Request) -> Plan:
        return self._read(version, bytes(call.body))

    def feeds(self, plan: Plan, _call: Request) -> Mapping[str, Array]:
        return plan.feeds

    def write(self, version: Version, plan: Plan, _call: Request, arrays: Sequence[Array]) -> Answer:
        return _json(self._write(version, plan, arrays))


class Predictions(Protocol):
    def infer(self, call: Request, form: Any) -> Answer | None: ...


class TensorFlowServing:
    """The handlers."""

    def __init__(self, host: ModelHost, dataplane: Predictions) -> None:
        self._host = host
        self._dataplane = dataplane
        self._forms = {
            "predict": Form(_read_predict, _write_predict),
            "classify": Form(_read_classify, _write_classes),
            "regress": Form(_read_regress, _write_values),
        }

    def routes(self) -> list[Route]:
        found = []
        for base in (
            "/v1/models/{model}",
            "/v1/models/{model}/versions/{version:[0-9]{1,16}}",
            "/v1/models/{model}/labels/{version:" + "|".join(LABELS) + "}",
        ):
            found.append(Route("GET", base, Access.PREDICT, self.status))
            found.append(Route("GET", base + "/metadata", Access.PREDICT, self.metadata))
            found += [
                Route("POST", f"{base}:{verb}", Access.PREDICT, self._handler(verb), Kind.PREDICT, parks=True)
                for verb in self._forms
            ]
        return found

    def _handler(self, verb: str) -> Callable[[Request], Answer | None]:
        form = self._forms[verb]

        def answer(call: Request) -> Answer | None:
            return self._dataplane.infer(call, form)

        return answer

    def status(self, call: Request) -> Answer:
        name, wanted = call.params["model"], call.params.get("version")
        versions = [self._host.look(name, wanted)] if wanted else list(self._host.served(name).versions.values())
        return json_answer({
            "model_version_status": [
                {
                    "version": str(version.number),
                    "state": STATES[version.state],
                    "status": {
                        "error_code": "OK" if version.state == "READY" else "UNAVAILABLE",
                        "error_message": version.reason,
                    },
                }
                for version in sorted(versions, key=lambda version: -version.number)
            ]
        })  # fmt: skip

    def metadata(self, call: Request) -> Answer:
        _, found = documents.find_ready(self._host, call.params["model"], call.params.get("version"))
        return json_answer({
            "model_spec": {"name": found.name, "signature_name": "", "version": str(found.number)},
            "metadata": {"signature_def": {"signature_def": _signatures(found.interfaces)}},
        })  # fmt: skip


def _signatures(interfaces: Interfaces) -> dict[str, Any]:
    return {
        name: {
            "inputs": {spec.name: _described(spec, found.inputs[spec.name].name) for spec in found.said_inputs},
            "outputs": {spec.name: _described(spec, found.outputs[spec.name].name) for spec in found.said_outputs},
            "method_name": "tensorflow/serving/predict",
            "defaults": {},
        }
        for name, found in (interfaces.signatures or {interfaces.default_name: interfaces.plain}).items()
    }


def _described(spec: TensorSpec, tensor: str) -> dict[str, Any]:
    dims = [] if spec.any_rank else [{"size": str(size), "name": ""} for size in spec.shape]
    return {"dtype": TYPES[spec.datatype], "tensor_shape": {"dim": dims, "unknown_rank": spec.any_rank}, "name": tensor}


# -- predict ---------------------------------------------------------------------------------------------------------------------


def _read_predict(version: Version, body: bytes) -> Plan:
    request = _document(body, PredictRequest)
    interface = _interface(version, request.signature_name)
    model, outputs, asked = version.name, interface.said_outputs, interface.asked
    rows = request.instances
    if (rows is msgspec.UNSET) == (request.inputs is msgspec.UNSET):
        raise Refusal(400, "Missing 'inputs' or 'instances' key: a request has one of the two")
    if rows is msgspec.UNSET:
        assert request.inputs is not msgspec.UNSET
        feeds = _feeds(model, interface, _columns(model, interface, bytes(request.inputs)))
        return Plan(feeds, outputs, outputs=asked)
    if not rows:
        raise Refusal(400, "'instances' is empty: a prediction needs one or more")
    feeds = _feeds(model, interface, _stacked(model, interface, [bytes(row) for row in rows]))
    return Plan(feeds, outputs, len(rows), asked)


def _columns(model: str, interface: Interface, text: bytes) -> dict[str, bytes]:
    """The JSON of each input's whole tensor."""
    if text.lstrip()[:1] == b"{":
        found = {name: bytes(value) for name, value in _decoded(text, dict[str, msgspec.Raw]).items()}
        if set(found) != {"b64"}:
            return found
    return {_only(model, interface): text}


def _stacked(model: str, interface: Interface, rows: Sequence[bytes]) -> dict[str, bytes]:
    """The same of rows: each a value of the only input, or an object with one for every input."""
    found: dict[str, list[bytes]] = {}
    for at, row in enumerate(rows):
        values = (
            {name: bytes(v) for name, v in _decoded(row, dict[str, msgspec.Raw]).items()} if row.lstrip()[:1] == b"{" else None
        )
        if values is None or set(values) == {"b64"}:
            values = {_only(model, interface): row}
        if found and set(values) != set(found):
            raise Refusal(
                400, f"instance {at} has other inputs than the ones before it: expected {', '.join(map(repr, found))}"
            )
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: b"[" + b",".join(values) + b"]" for name, values in found.items()}


def _only(model: str, interface: Interface) -> str:
    required = interface.required
    if len(required) != 1:
        names = ", ".join(f"'{spec.name}'" for spec in required)
        raise Refusal(400, f"model '{model}' has {len(required)} inputs: give each by its name ({names})")
    return required[0].name


def _feeds(model: str, interface: Interface, texts: Mapping[str, bytes]) -> dict[str, Array]:
    feeds: dict[str, Array] = {}
    for name, text in texts.items():
        spec = interface.inputs.get(name)
        if spec is None:
            known = ", ".join(f"'{spec.name}'" for spec in interface.said_inputs)
            raise Refusal(400, f"input {shown(name)} is not one of model '{model}'; it takes {known}")
        array = tensors.from_values(name, text, spec.datatype)
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
    return {"predictions": [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]}


def _values(spec: TensorSpec, array: Array) -> Any:
    if spec.datatype == "BYTES":
        return tensors.texts(array, encode=spec.name.endswith("_bytes"))
    return (floats(array) if spec.datatype == "BF16" else array).tolist()


# -- classify and regress --------------------------------------------------------------------------------------------------------


def _read_examples(version: Version, body: bytes, choose: Callable[[str, Interface], TensorSpec]) -> Plan:
    request = _document(body, ExamplesRequest)
    interface = _interface(version, request.signature_name)
    output = choose(version.name, interface)
    if not request.examples:
        raise Refusal(400, "'examples' is empty: one or more are needed")
    rows: dict[str, list[bytes]] = {}
    for at, example in enumerate(request.examples):
        features = {**request.context, **example}
        if rows and set(features) != set(rows):
            raise Refusal(
                400, f"example {at} has other features than the ones before it: expected {', '.join(map(repr, rows))}"
            )
        for name, value in features.items():
            rows.setdefault(name, []).append(bytes(value))
    ranks = {name: len(spec.shape) for name, spec in interface.inputs.items()}
    texts = {name: _joined(values, rank=ranks.get(name, 1)) for name, values in rows.items()}
    feeds = _feeds(version.name, interface, texts)
    return Plan(feeds, (output,), len(request.examples), [interface.run_name(output.name)])


def _joined(values: Sequence[bytes], *, rank: int) -> bytes:
    """A feature is a value or a list of values; a row of an input of two dimensions is a list."""
    rows = [b"[" + v + b"]" if rank > 1 and v.lstrip()[:1] != b"[" else v for v in values]
    return b"[" + b",".join(rows) + b"]"


def _read_classify(version: Version, body: bytes) -> Plan:
    return _read_examples(version, body, _scores)


def _scores(model: str, interface: Interface) -> TensorSpec:
    fitting = [s for s in interface.said_outputs if len(s.shape) == 2 and s.datatype not in ("BYTES", "BOOL")]
    return _one_output(model, fitting, "a score per class and example")


def _read_regress(version: Version, body: bytes) -> Plan:
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
    (spec,), scores = plan.specs, _values(plan.specs[0], arrays[0])
    _check_rows(version, plan, scores)
    labels = version.labels.get(spec.name, ())
    return {"result": [[[labels[n] if n < len(labels) else str(n), score] for n, score in enumerate(row)] for row in scores]}


def _write_values(version: Version, plan: Plan, arrays: Sequence[Array]) -> object:
    values = _values(plan.specs[0], arrays[0].reshape(-1))
    _check_rows(version, plan, values)
    return {"result": values}


def _check_rows(version: Version, plan: Plan, rows: Sequence[object]) -> None:
    if len(rows) != plan.rows:
        raise Refusal(400, f"model '{version.name}' gave {len(rows)} results for {plan.rows} examples: use :predict")


# -- JSON ------------------------------------------------------------------------------------------------------------------------


def _interface(version: Version, signature: str) -> Interface:
    """Of the signature that a request names, or of the default one.  Raises: Refusal (400)."""
    interfaces = version.interfaces
    try:
        return interfaces.find(signature) if signature else interfaces.default
    except KeyError:
        known = ", ".join(f"'{name}'" for name in interfaces.signatures or (interfaces.default_name,))
        raise Refusal(400, f"Serving signature name: {shown(signature)} not found in signature def; there is {known}") from None


def _document(text: bytes, kind: type[_Document]) -> _Document:
    """A whole request."""
    document: _Document = _decoded(text, kind)
    # Numbers in lists have no colon: with more of them than keys, one may be there twice. What is huge is numbers for the most part.
    if len(text) > strict.MAX_BYTES:
        return document
    if text.count(b":") > sum(f'"{name}"'.encode() in text for name in kind.__struct_fields__):
        strict.check_keys(text, (), "a request that TensorFlow Serving takes")
    return document


def _decoded(text: bytes, kind: Any) -> Any:
    try:
        return decoder(kind).decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f"JSON Parse error: {error}") from error


def _json(document: object) -> Answer:
    """As TensorFlow Serving writes it: what is not finite is NaN, Infinity or -Infinity, which its clients read."""
    text = msgspec.json.encode(document)
    if b"null" in text:  # what msgspec makes of a number that is not finite; a text may hold it too
        text = json.dumps(document, separators=(",", ":")).encode()
    return Answer((text,))
