"""TensorFlow Serving's REST API for the same models: predict, classify, regress, status and metadata, under /v1/models.

A request says its tensors in rows (`instances`, a value or an object per row) or in columns (`inputs`, a whole tensor each); the
answer takes the same form. A request names a signature of the model's file, or is for its default one; a model whose file has none has
one called serving_default.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np

from agent.contract.codec import decoder
from agent.serving.access import Access
from agent.serving.answers import Answer, Refusal, json_answer
from agent.serving.api import documents, lists, pieces, skim, strict, tensors
from agent.serving.api.classification import floats
from agent.serving.api.parameters import shown
from agent.serving.api.resting import Resting
from agent.serving.inference import SequenceDemand
from agent.serving.models.host import LABELS, ModelHost, Version
from agent.serving.routes import Kind, Request, Route
from agent.serving.transport.allowance import Allowance
from runtimes.check import shape_text
from runtimes.contract import Array, TensorSpec
from runtimes.naming import Interface, Interfaces

MAX_ROWS_BYTES = 4 * 1024 * 1024  # of a request besides its long lists: rows of single numbers
HEAD_BYTES = 256  # in which a value shows of which kind it is
MEMBER_BYTES = 256  # of an object, in memory
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
    instances: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    inputs: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class ExamplesRequest(msgspec.Struct):
    examples: msgspec.Raw
    signature_name: str = ""
    context: msgspec.Raw = msgspec.Raw(b"{}")


Text = bytes | memoryview  # of one JSON value
_COMMA = re.compile(rb"[ \t\r\n]*,")


class Body:
    """A request's body. What is made of it is taken from `allowance`."""

    def __init__(self, text: Text, allowance: Allowance | None = None) -> None:
        self.text = memoryview(text)
        self.allowance = allowance or Allowance(body_bytes=len(text))
        if self.allowance.made:
            self.allowance.again()
        self._skimmed: skim.Skimmed | None = None

    def document(self, kind: type[_Document]) -> _Document:
        """Raises: Refusal (400)."""
        try:
            found, rest, self._skimmed = skim.read(self.text, decoder(kind), MAX_ROWS_BYTES)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Refusal(400, f"JSON Parse error: {error}") from error
        document: _Document = found
        text, places = (bytes(self.text), 0) if self._skimmed is None else (rest, len(self._skimmed.found))
        # Numbers in lists have no colon: with more of them than keys, one may be there twice. What is huge is rows for the most part.
        if len(text) <= skim.REST_BYTES:
            keys = sum(f'"{name}"'.encode() in text for name in kind.__struct_fields__)
            if text.count(b":") > keys + places:
                strict.check_keys(text, (), "a request that TensorFlow Serving takes")
        return document

    def text_of(self, raw: msgspec.Raw) -> Text:
        return bytes(raw) if self._skimmed is None else self._skimmed.text_of(raw)

    def members(self, raw: msgspec.Raw | bytes) -> dict[str, msgspec.Raw]:
        """Of an object.  Raises: Refusal (400; 413, 503 when they are too many)."""
        text = bytes(raw)
        self.allowance.take(text.count(b":") * MEMBER_BYTES, "the members of the request's objects")
        found: dict[str, msgspec.Raw] = _decoded(text, dict[str, msgspec.Raw])
        return found

    def rows(self, raw: msgspec.Raw) -> Iterator[list[dict[str, Text]]]:
        """The objects of a list, some at a time, with the JSON of their members.  Raises: Refusal (400)."""
        text, at, resting = bytes(raw).strip(), 1, Resting()
        while True:
            chunk, at = _chunk(text, at, resting.size)
            found: list[dict[str, Any]] = _decoded(b"[%b]" % chunk, list[dict[str, msgspec.Raw]])
            if self._skimmed is not None and self._skimmed.has_place(chunk):
                found = [{name: self._skimmed.text_of(value) for name, value in row.items()} for row in found]
            yield found
            if at >= len(text):
                return
            resting.rest()

    def stacked(self, rows: Iterator[list[Mapping[str, Text]]], row_name: str, values_name: str) -> tuple[dict[str, Text], int]:
        """The list of each member's values in all rows, and how many there are. `row_name` and `values_name` are what
        a row and its members are called.

        Raises: Refusal (400 when a row has other members than the first; 413, 503).
        """
        self.allowance.take(2 * len(self.text), "what the rows say")
        found: dict[str, list[Text]] = {}
        count = 0
        for some in rows:
            for row in some:
                if count and row.keys() != found.keys():
                    known = ", ".join(map(repr, found))
                    raise Refusal(400, f"{row_name} {count} has other {values_name} than the ones before it: expected {known}")
                if not count:
                    found = {name: [] for name in row}
                count += 1
            for name, values in found.items():
                values.append(b",".join([row[name] for row in some]))
        return {name: b"[%b]" % b",".join(filter(None, values)) for name, values in found.items()}, count


def _chunk(text: bytes, at: int, size: int) -> tuple[bytes, int]:
    """Whole rows from `at` on, of some `size` bytes or of one that is longer, and where the next ones begin."""
    while at + size < len(text):
        part = pieces.whole(text[at : at + size], last=False)
        codes = np.frombuffer(pieces.outside(part, part)[0], np.uint8)
        depths = np.cumsum((codes == ord("{")).astype(np.int32) - (codes == ord("}")), dtype=np.int32)
        ends = np.flatnonzero((codes == ord("}")) & (depths == 0))
        if len(ends):
            stop = at + int(ends[-1]) + 1
            comma = _COMMA.match(text, stop)
            if comma is not None:
                return text[at:stop], comma.end()
        size *= 2
    return text[at:-1], len(text)


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

    def __init__(self, read: Callable[[Version, Body], Plan], write: Write) -> None:
        self._read = read
        self._write = write

    def read(self, version: Version, call: Request) -> Plan:
        return self._read(version, Body(call.body, call.allowance))

    def feeds(self, plan: Plan, _call: Request) -> Mapping[str, Array]:
        return plan.feeds

    def write(self, version: Version, plan: Plan, _call: Request, arrays: Sequence[Array]) -> Answer:
        return json_answer(self._write(version, plan, arrays))


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
    """The same of rows: each a value of the only input, or an object with one for every input."""
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


# -- classify and regress --------------------------------------------------------------------------------------------------------


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


# -- JSON ------------------------------------------------------------------------------------------------------------------------


def _interface(version: Version, signature: str) -> Interface:
    """Of the signature that a request names, or of the default one.  Raises: Refusal (400)."""
    interfaces = version.interfaces
    try:
        return interfaces.find(signature) if signature else interfaces.default
    except KeyError:
        known = ", ".join(f"'{name}'" for name in interfaces.signatures or (interfaces.default_name,))
        raise Refusal(400, f"Serving signature name: {shown(signature)} not found in signature def; there is {known}") from None


def _decoded(text: bytes, kind: Any) -> Any:
    try:
        return decoder(kind).decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f"JSON Parse error: {error}") from error
