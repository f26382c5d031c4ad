"""The Open Inference Protocol's inference request, read from bytes, with the binary tensor extension. No I/O, no model.

A request body is JSON, or JSON followed by the bytes of its binary tensors in the order of the inputs (little-endian,
row-major, unpadded); the header length says where the JSON ends. `read_request` checks all of it against the model's inputs and
gives a Plan; `Plan.feeds` makes arrays that are views into the body. A Plan holds nothing of the body, so the same JSON part
needs to be read only once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from agent.serving.allowance import Allowance
from agent.serving.answers import Refusal, Template
from agent.serving.api import classification, lists, tensors
from agent.serving.api.checks import Inputs, as_asked, check_input, check_size, refuse_output
from agent.serving.api.excerpt import Excerpt, read_excerpt
from agent.serving.api.json_body import check_keys
from agent.serving.api.parameters import (
    OutputRule,
    Place,
    Value,
    check_reserved,
    flag,
    interface_of,
    output_rule,
    place_of,
    priority_of,
    sequence_of,
    timeout_of,
    whole,
)
from agent.serving.buffers import ALIGNMENT, aligned
from agent.serving.scheduling.demand import SequenceDemand
from agent.serving.shared.regions import ConnectionRegions, Regions
from runtimes.check import shape_text
from runtimes.contract import Array, TensorSpec
from runtimes.naming import Interface, Interfaces

ONE_SOURCE = (
    "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
    "'shared_memory_region' in 'parameters'. But "
)
NO_SHARED_MEMORY = "Client shared memory is disabled: send the tensor's bytes after the JSON instead"
Parameters = dict[str, Value]


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


@dataclass(slots=True)
class Plan:
    """A request, understood: where each tensor lies in the body and how the answer is wanted."""

    id: str
    views: list[
        tuple[str, np.dtype[Any], tuple[int, ...], int, int, bool]
    ]  # name, dtype, shape, offset in the body, bytes, strays
    values: dict[str, Array]  # inputs that came as JSON
    outputs: list[str] | None
    specs: tuple[TensorSpec, ...]  # of the outputs, in the order of the answer
    binary: tuple[bool, ...]  # for each of them
    size_bytes: int = 0  # of the whole body
    timeout_s: float | None = None
    priority: int = 0  # 1 is the highest, 0 the model's default
    sequence: SequenceDemand | None = None
    shared: tuple[tuple[TensorSpec, tuple[int, ...], Place], ...] = ()  # inputs in shared memory, with their shapes
    rules: tuple[OutputRule | None, ...] = ()  # for each output, when there is any
    templates: dict[Any, Template] = field(default_factory=dict)

    @property
    def reusable(self) -> bool:
        return not self.values and not self.id

    @property
    def lasting(self) -> bool:
        """Whether its feeds hold for whatever tensors come to lie in the same body: nothing of them is read, copied or looked
        up.
        """
        plain = all(dtype.kind not in "Ob" and not alone for _, dtype, _, _, _, alone in self.views)
        return plain and not (self.values or self.shared or self.rules)

    @property
    def _only_views(self) -> bool:
        """Whether its feeds are views of the client's memory, and nothing else is looked up."""
        views = all(tensors.is_view(spec, place.offset) for spec, _, place in self.shared)
        return views and not (self.views or self.values or self.rules)

    def feeds(
        self,
        body: memoryview,
        regions: ConnectionRegions | None = None,
        *,
        strays: bool = False,
        allowance: Allowance | None = None,
    ) -> dict[str, Array]:
        """The inputs as arrays. They are views into `body` and `regions`, valid as long as these are. `strays` says that the
        tensors in `body` do not begin at a multiple of ALIGNMENT: then they are copied to where they do, as is each one that
        strays by itself.

        Raises: Refusal (400; 404 for a region that is not there, also for one that an output is to go to; 413, 503 for BYTES
        that `allowance` does not allow).
        """
        if self.shared and regions is not None:
            known: dict[str, Array] | None = regions.recall(self)
            if known is not None:
                return known
        feeds: dict[str, Array] = self.values.copy()
        for name, dtype, shape, offset, size, alone in self.views:
            if dtype.kind == "O":
                feeds[name] = tensors.read_bytes(name, body[offset : offset + size], shape, allowance)
                continue
            array: Array = np.ndarray(shape, dtype, body, offset)
            if strays or alone:
                array = aligned(array)
            if dtype.kind == "b":
                tensors.check_bool(name, array)
            feeds[name] = array
        if self.shared or self.rules:
            self._look_up(feeds, regions, allowance)
        return feeds

    def _look_up(self, feeds: dict[str, Array], regions: ConnectionRegions | None, allowance: Allowance | None) -> None:
        if allowance is not None and self.shared:
            allowance.body_bytes = max(allowance.body_bytes, sum(place.size for _, _, place in self.shared))
        for spec, shape, place in self.shared:
            view = offered(regions).view(place.region, place.offset, place.size)
            feeds[spec.name] = tensors.from_memory(spec, shape, view, allowance)
        if regions is not None and self._only_views:
            regions.keep(self, feeds, [place.region for _, _, place in self.shared])
        for rule in self.rules:
            if rule is not None and rule.place is not None:
                offered(regions).check(rule.place.region, rule.place.offset, rule.place.size)


def offered(regions: Regions | None) -> Regions:
    if regions is None:
        raise Refusal(501, NO_SHARED_MEMORY)
    return regions


def read_request(
    body: memoryview,
    header_length: int | None,
    model: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    interfaces: Interfaces | None = None,
    allowance: Allowance | None = None,
) -> Plan:
    """The plan of the request in `body`, whose JSON part has `header_length` bytes (all of it when None). `interfaces` are
    those of the model; without, there are the names in `inputs` and `outputs` alone.

    Raises: Refusal (400, 501; 413, 503 where `allowance` does not allow what it would become) that says what is wrong with it.
    """
    if header_length == 0:
        return _raw_plan(body, model, inputs, outputs)
    size = len(body) if header_length is None else header_length
    try:
        document, rest, excerpt = read_excerpt(body[:size], _decoder)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f"the body is not an inference request: {error}") from error
    _check_keys(document, body[:size], rest, excerpt)
    plan = Plan(document.id, [], {}, None, (), (), len(body))
    interface = interface_of(document.parameters, interfaces or Interfaces(inputs, outputs), model)
    end = _Inputs(plan, body, size, excerpt, allowance).place(document, model, interface)
    if excerpt is not None:
        excerpt.check_unread()
    if end != len(body):
        raise Refusal(
            400, f"unexpected additional input data for model '{model}': {len(body) - end} bytes after the last tensor"
        )
    _place_outputs(plan, document, model, interface)
    if document.parameters:
        check_reserved(document.parameters)
        plan.priority = priority_of(document.parameters)
        plan.timeout_s = timeout_of(document.parameters)
        plan.sequence = sequence_of(document.parameters)
    return plan


def _check_keys(document: RequestDocument, text: memoryview, rest: bytes, excerpt: Excerpt | None) -> None:
    """A colon for every key that is there for certain; more of them may be a key twice, of which JSON readers take either."""
    keys = 1 + bool(document.id) + bool(document.outputs) + bool(document.parameters) + len(document.parameters)
    for given in document.inputs:
        keys += 3 + (given.data is not msgspec.UNSET) + bool(given.parameters) + len(given.parameters)
    for wanted in document.outputs:
        keys += 1 + bool(wanted.parameters) + len(wanted.parameters)
    raw = bytes(text) if excerpt is None else rest
    if excerpt is not None:
        keys += len(excerpt.found)
    if raw.count(b":") > keys:
        check_keys(raw, [given.data for given in document.inputs if given.data is not msgspec.UNSET])


class _Inputs:
    """Fills in a plan where each input lies, of a request whose JSON ends `at` a byte of `body`."""

    def __init__(self, plan: Plan, body: memoryview, at: int, excerpt: Excerpt | None, allowance: Allowance | None) -> None:
        self._plan = plan
        self._body = body
        self._begin = self._at = at
        self._excerpt = excerpt
        self._allowance = allowance

    def place(self, document: RequestDocument, model: str, interface: Interface) -> int:
        """Gives the end of the last one.  Raises: Refusal (400, 413, 503)."""
        plan = self._plan
        waiting = Inputs(interface, model)
        shared = []
        for given in document.inputs:
            spec = waiting.claim(given.name)
            check_input(given.name, given.datatype, given.shape, spec, model)
            shape = tuple(given.shape)
            source = _source(given)
            if source is None:
                plan.values[spec.name] = self._values(given, shape)
            elif isinstance(source, Place):
                check_size(given.name, source.size, shape, spec, model)
                shared.append((spec, shape, source))
            else:
                check_size(given.name, source, shape, spec, model)
                self._behind(given.name, spec, shape, source)
        waiting.check()
        plan.shared = tuple(shared)
        return self._at

    def _values(self, given: InputDocument, shape: tuple[int, ...]) -> Array:
        assert given.data is not msgspec.UNSET
        if given.datatype in tensors.NOT_IN_JSON:
            raise Refusal(
                400,
                f"receiving {given.datatype} data via JSON is not supported. Please use the binary data format for input {given.name}",
            )
        text = bytes(given.data) if self._excerpt is None else self._excerpt.text_of(given.data)
        return lists.read(given.name, text, given.datatype, shape, allowance=self._allowance)

    def _behind(self, name: str, spec: TensorSpec, shape: tuple[int, ...], size: int) -> None:
        at = self._at
        if at + size > len(self._body):
            left = len(self._body) - at
            raise Refusal(400, f"input '{name}' should have {size} bytes after the JSON, but only {left} bytes are left")
        self._plan.views.append((spec.name, spec.dtype, shape, at, size, bool((at - self._begin) % ALIGNMENT)))
        self._at += size


def _source(given: InputDocument) -> int | Place | None:
    """How many bytes of the body are this input's, or its place in shared memory; None when its data is in the JSON.

    Raises: Refusal (400) when it says none of these or more than one.
    """
    binary = "binary_data_size" in given.parameters
    shared = "shared_memory_region" in given.parameters
    has_data = given.data is not msgspec.UNSET
    if binary + shared + has_data != 1:
        said = [n for n, there in (("data", has_data), ("binary_data_size", binary), ("shared_memory_region", shared)) if there]
        raise Refusal(400, f"{ONE_SOURCE}input '{given.name}' sets {' and '.join(said) or 'none of them'}")
    if shared:
        return place_of(given.parameters, given.name)
    return whole(given.parameters, "binary_data_size", given.name) if binary else None


def _place_outputs(plan: Plan, document: RequestDocument, model: str, interface: Interface) -> None:
    default = flag(document.parameters, "binary_data_output")
    if not document.outputs:
        plan.outputs, plan.specs = interface.asked, interface.said_outputs
        plan.binary = (default,) * len(plan.specs)
        if not default:
            for output in plan.specs:
                tensors.check_in_json(output.name, output.datatype)
        return
    specs = dict(interface.outputs)
    chosen, binary, rules = [], [], []
    names = []
    for wanted in document.outputs:
        found = specs.pop(wanted.name, None)
        if found is None:
            refuse_output(wanted.name, model, interface)
        names.append(found.name)
        spec = as_asked(found, wanted.name)
        rule = output_rule(wanted.parameters, wanted.name)
        if rule is not None and rule.classes:
            classification.check(spec)
        rules.append(rule)
        chosen.append(spec)
        binary.append(flag(wanted.parameters, "binary_data", default=default))
        if not binary[-1] and rule is None:
            tensors.check_in_json(spec.name, spec.datatype)
    plan.outputs = names
    plan.specs, plan.binary = tuple(chosen), tuple(binary)
    if any(rule is not None for rule in rules):
        plan.rules = tuple(rules)


def _raw_plan(body: memoryview, model: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Plan:
    """Header length 0: the whole body is the model's only input, every output comes back as bytes."""
    required = [spec for spec in inputs if not spec.optional]
    if len(required) != 1:
        raise Refusal(400, f"a raw body is for models with one input; model '{model}' has {len(required)}")
    spec = required[0]
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
    view = (spec.name, spec.dtype, tuple(shape), 0, len(body), False)
    return Plan("", [view], {}, None, tuple(outputs), (True,) * len(outputs))
