"""The Open Inference Protocol's inference request and response as bytes, with the binary tensor extension. No I/O, no model.

A request body is JSON, or JSON followed by the bytes of its binary tensors in the order of the inputs (little-endian, row-major,
unpadded); the header length says where the JSON ends. `read_request` checks all of it against the model's inputs and gives a Plan;
`Plan.feeds` makes arrays that are views into the body. A Plan holds nothing of the body, so the same JSON part needs to be read
only once. `write_response` is the way back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import msgspec
import numpy as np

from agent.serving import tensors
from agent.serving.answers import BINARY, Answer, Buffer, FilledTemplate, Refusal, Template
from agent.serving.inference import SequenceDemand
from runtimes.check import shape_fits, shape_text
from runtimes.contract import DTYPES, Array, TensorSpec

ONE_SOURCE = (
    "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
    "'shared_memory_region' in 'parameters'. But "
)
NO_SHARED_MEMORY = "Client shared memory is disabled: send the tensor's bytes after the JSON instead"
MAX_TEMPLATES = 16
MAX_PRIORITY = 2**32 - 1
MAX_SEQUENCE_ID = 2**64 - 1
MAX_SEQUENCE_TEXT = 128  # as long as Triton takes
MAX_TIMEOUT_US = 10**15  # thirty years
MAX_SHOWN = 60
MAX_ELEMENTS = 2**48  # NumPy counts bytes in 63 bits, and counts sizes beside a 0 too

Parameters = dict[str, Any]


class InputDocument(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters = {}
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class OutputDocument(msgspec.Struct):
    name: str
    parameters: Parameters = {}


class RequestDocument(msgspec.Struct):
    inputs: list[InputDocument]
    id: str = ""
    outputs: list[OutputDocument] = []
    parameters: Parameters = {}


_decoder = msgspec.json.Decoder(RequestDocument)
_encode = msgspec.json.encode


@dataclass(slots=True)
class Plan:
    """A request, understood: where each tensor lies in the body and how the answer is wanted."""

    id: str
    views: list[tuple[str, np.dtype[Any], tuple[int, ...], int, int]]  # name, dtype, shape, offset in the body, bytes
    values: dict[str, Array]  # inputs that came as JSON
    outputs: list[str] | None
    specs: tuple[TensorSpec, ...]  # of the outputs, in the order of the answer
    binary: tuple[bool, ...]  # for each of them
    size_bytes: int = 0  # of the whole body
    timeout_s: float | None = None
    priority: int = 0  # 1 is the highest, 0 the model's default
    sequence: SequenceDemand | None = None
    templates: dict[Any, Template] = field(default_factory=dict)

    @property
    def reusable(self) -> bool:
        return not self.values and not self.id and self.sequence is None

    def feeds(self, body: memoryview) -> dict[str, Array]:
        """The inputs as arrays. They are views into `body`, valid as long as it is.  Raises: Refusal (400)."""
        feeds: dict[str, Array] = self.values.copy()
        for name, dtype, shape, offset, size in self.views:
            if dtype.kind == "O":
                feeds[name] = tensors.read_bytes(name, body[offset : offset + size], shape)
                continue
            array: Array = np.ndarray(shape, dtype, body, offset)
            if not array.flags.aligned:
                array = array.copy()  # some kernels fault on it; large bodies are received where their tensors are aligned
            if dtype.kind == "b":
                tensors.check_bool(name, array)
            feeds[name] = array
        return feeds


def read_request(
    body: memoryview, header_length: int | None, model: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> Plan:
    """The plan of the request in `body`, whose JSON part has `header_length` bytes (all of it when None).

    Raises: Refusal (400, 501) that says what is wrong with it.
    """
    if header_length == 0:
        return _raw_plan(body, model, inputs, outputs)
    size = len(body) if header_length is None else header_length
    try:
        document = _decoder.decode(body[:size])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f"the body is not an inference request: {error}") from error
    _check_parameters(document.parameters)
    plan = Plan(document.id, [], {}, None, (), (), len(body))
    end = _place_inputs(plan, document, size, body, model, inputs)
    if end != len(body):
        raise Refusal(
            400, f"unexpected additional input data for model '{model}': {len(body) - end} bytes after the last tensor"
        )
    _place_outputs(plan, document, model, outputs)
    if document.parameters:
        plan.priority = priority_of(document.parameters)
        plan.timeout_s = timeout_of(document.parameters)
        plan.sequence = sequence_of(document.parameters)
    return plan


def _check_parameters(parameters: Parameters) -> None:
    for key in parameters:
        if key.startswith("triton_"):
            raise Refusal(400, f"parameter {key!r} is reserved: names must not start with 'triton_'")


def timeout_of(parameters: Mapping[str, Any]) -> float | None:
    """Seconds; None when there is no limit.  Raises: Refusal (400)."""
    timeout = parameters.get("timeout")
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int) or timeout < 0:
        raise Refusal(400, f"parameter 'timeout' is {shown(timeout)}; expected microseconds as a whole number")
    return min(timeout, MAX_TIMEOUT_US) / 1e6 if timeout else None


def priority_of(parameters: Mapping[str, Any]) -> int:
    """Raises: Refusal (400)."""
    priority = parameters.get("priority", 0)
    if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= MAX_PRIORITY:
        raise Refusal(400, f"parameter 'priority' is {shown(priority)}; expected a whole number, 1 being the highest")
    return priority


def sequence_of(parameters: Mapping[str, Any]) -> SequenceDemand | None:
    """None for a request of no sequence.  Raises: Refusal (400)."""
    number = parameters.get("sequence_id", 0)
    if isinstance(number, bool) or not isinstance(number, int | str):
        raise Refusal(400, f"parameter 'sequence_id' is {shown(number)}; expected a whole number or a string")
    if isinstance(number, int) and not 0 <= number <= MAX_SEQUENCE_ID:
        raise Refusal(400, f"parameter 'sequence_id' is {shown(number)}; expected a number from 0 to {MAX_SEQUENCE_ID}")
    if isinstance(number, str) and len(number) > MAX_SEQUENCE_TEXT:
        raise Refusal(400, f"parameter 'sequence_id' is longer than {MAX_SEQUENCE_TEXT} characters")
    start, end = _flag(parameters, "sequence_start"), _flag(parameters, "sequence_end")
    if number:
        return SequenceDemand(number, start, end)
    return None


def shown(value: object) -> str:
    """For a message: `value` as its sender would recognize it, cut short."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**64 else "a number beyond 64 bits"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _place_inputs(
    plan: Plan, document: RequestDocument, at: int, body: memoryview, model: str, inputs: Sequence[TensorSpec]
) -> int:
    """Fills in where each input lies and gives the end of the last one."""
    specs = {spec.name: spec for spec in inputs}
    for given in document.inputs:
        spec = specs.pop(given.name, None)
        if spec is None:
            _refuse_name(given.name, model, inputs)
        _check_input(given, spec, model)
        shape = tuple(given.shape)
        size = _binary_size(given)
        if size is None:
            assert given.data is not msgspec.UNSET
            plan.values[given.name] = tensors.from_json(given.name, given.data, spec.datatype, shape)
            continue
        itemsize = spec.dtype.itemsize
        expected = math.prod(shape) * itemsize
        if spec.datatype != "BYTES" and size != expected:
            raise Refusal(
                400,
                f"unexpected size for input '{given.name}', expecting {expected - size} additional bytes for model '{model}' "
                f"({expected} bytes for {spec.datatype} {shape_text(shape)}, got {size})",
            )
        if at + size > len(body):
            raise Refusal(
                400, f"input '{given.name}' should have {size} bytes after the JSON, but only {len(body) - at} bytes are left"
            )
        plan.views.append((given.name, spec.dtype, shape, at, size))
        at += size
    if specs:
        missing = ", ".join(f"'{name}'" for name in specs)
        raise Refusal(
            400,
            f"expected {len(inputs)} inputs but got {len(document.inputs)} inputs for model '{model}': {missing} is missing",
        )
    return at


def _refuse_name(name: str, model: str, inputs: Sequence[TensorSpec]) -> NoReturn:
    if any(spec.name == name for spec in inputs):
        raise Refusal(400, f"input '{name}' is given twice")
    known = ", ".join(f"'{spec.name}'" for spec in inputs)
    raise Refusal(400, f"unexpected inference input '{name}' for model '{model}'; it takes {known}")


def _check_input(given: InputDocument, spec: TensorSpec, model: str) -> None:
    if given.datatype != spec.datatype:
        known = "" if given.datatype in DTYPES else ", which is not a datatype of this server"
        raise Refusal(
            400,
            f"inference input '{given.name}' has datatype '{given.datatype}'{known}; model '{model}' expects '{spec.datatype}'",
        )
    if any(size < 0 for size in given.shape):
        raise Refusal(400, f"shape {shape_text(given.shape)} of input '{given.name}' has a negative size")
    if math.prod(size or 1 for size in given.shape) > MAX_ELEMENTS:
        raise Refusal(400, f"shape {shape_text(given.shape)} of input '{given.name}' is larger than any memory")
    if not shape_fits(given.shape, spec.shape):
        raise Refusal(
            400,
            f"unexpected shape for input '{given.name}' for model '{model}'. "
            f"Expected {shape_text(spec.shape)}, got {shape_text(given.shape)}",
        )


def _binary_size(given: InputDocument) -> int | None:
    """How many bytes of the body are this input's; None when its data is in the JSON.  Raises: Refusal when it is both or none."""
    binary = "binary_data_size" in given.parameters
    shared = "shared_memory_region" in given.parameters
    has_data = given.data is not msgspec.UNSET
    if binary + shared + has_data != 1:
        said = [n for n, there in (("data", has_data), ("binary_data_size", binary), ("shared_memory_region", shared)) if there]
        raise Refusal(400, f"{ONE_SOURCE}input '{given.name}' sets {' and '.join(said) or 'none of them'}")
    if shared:
        raise Refusal(501, NO_SHARED_MEMORY)
    if not binary:
        return None
    size = given.parameters["binary_data_size"]
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise Refusal(400, f"binary_data_size of input '{given.name}' is {size!r}; expected a number of bytes")
    return size


def _place_outputs(plan: Plan, document: RequestDocument, model: str, outputs: Sequence[TensorSpec]) -> None:
    default = _flag(document.parameters, "binary_data_output")
    if not document.outputs:
        plan.specs = tuple(outputs)
        plan.binary = (default,) * len(plan.specs)
        return
    specs = {spec.name: spec for spec in outputs}
    chosen, binary = [], []
    for wanted in document.outputs:
        spec = specs.pop(wanted.name, None)
        if spec is None:
            known = ", ".join(f"'{s.name}'" for s in outputs)
            twice = "asked for twice" if any(s.name == wanted.name for s in outputs) else f"not one of {known}"
            raise Refusal(400, f"unexpected inference output '{wanted.name}' for model '{model}': it is {twice}")
        if "shared_memory_region" in wanted.parameters:
            raise Refusal(501, NO_SHARED_MEMORY)
        if wanted.parameters.get("classification", 0):
            raise Refusal(501, f"classification of output '{wanted.name}' is not supported: ask for the values")
        chosen.append(spec)
        binary.append(_flag(wanted.parameters, "binary_data", default=default))
    plan.outputs = [spec.name for spec in chosen]
    plan.specs, plan.binary = tuple(chosen), tuple(binary)


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise Refusal(400, f"parameter {name!r} is {value!r}; expected true or false")
    return value


def _raw_plan(body: memoryview, model: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Plan:
    """Header length 0: the whole body is the model's only input, every output comes back as bytes."""
    if len(inputs) != 1:
        raise Refusal(400, f"a raw body is for models with one input; model '{model}' has {len(inputs)}")
    spec = inputs[0]
    shape = list(spec.shape)
    if spec.datatype == "BYTES":
        if any(size not in (-1, 1) for size in shape):
            raise Refusal(
                400, f"a raw body for BYTES input '{spec.name}' needs a shape of one element, it has {shape_text(shape)}"
            )
        value = np.empty((1,) * len(shape), np.object_)
        value[...] = bytes(body)
        return Plan("", [], {spec.name: value}, None, tuple(outputs), (True,) * len(outputs))
    if shape and shape[0] == -1 and shape.count(-1) > 1:
        shape[0] = 1
    if shape.count(-1) > 1:
        raise Refusal(
            400,
            f"the shape of input '{spec.name}', {shape_text(spec.shape)}, cannot be told from a raw body: send a JSON header",
        )
    known = math.prod(size for size in shape if size != -1) * spec.dtype.itemsize
    if -1 in shape and known and len(body) % known == 0:
        shape[shape.index(-1)] = len(body) // known
    if math.prod(shape) * spec.dtype.itemsize != len(body) or -1 in shape:
        raise Refusal(
            400,
            f"unexpected size for input '{spec.name}' for model '{model}': "
            f"{len(body)} bytes do not make {spec.datatype} {shape_text(spec.shape)}",
        )
    view = (spec.name, spec.dtype, tuple(shape), 0, len(body))
    return Plan("", [view], {}, None, tuple(outputs), (True,) * len(outputs))


def write_response(plan: Plan, arrays: Sequence[Array], model: str, version: str) -> Answer:
    """The answer with `arrays`, which are in the order of `plan.specs`.  Raises: Refusal (400) when JSON cannot carry one."""
    key = arrays[0].shape if len(arrays) == 1 else tuple([a.shape for a in arrays])
    template = plan.templates.get(key)
    if template is not None:
        return FilledTemplate(template, arrays)
    documents: list[dict[str, Any]] = []
    parts: list[Buffer] = []
    fixed = not plan.id
    size = 0
    for spec, array, binary in zip(plan.specs, arrays, plan.binary, strict=True):
        document: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": array.shape}
        if binary:
            part = tensors.write_bytes(array) if spec.datatype == "BYTES" else np.ascontiguousarray(array)
            document["parameters"] = {"binary_data_size": len(part) if isinstance(part, bytes) else part.nbytes}
            size += document["parameters"]["binary_data_size"]
            parts.append(part)
        else:
            document["data"] = tensors.to_json(spec.name, array, spec.datatype)
        fixed = fixed and binary and spec.datatype != "BYTES"
        documents.append(document)
    head = {"id": plan.id} if plan.id else {}
    json = _encode({**head, "model_name": model, "model_version": version, "outputs": documents})
    if size == 0:
        return Answer((json,))
    if fixed and len(plan.templates) < MAX_TEMPLATES and all(a.flags.c_contiguous for a in arrays):
        plan.templates[key] = Template(json, len(json) + size)
    return Answer((json, *parts), content_type=BINARY, json_bytes=len(json))
