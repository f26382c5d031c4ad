"""An inference request over gRPC as arrays and a Demand, and the way back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from agent.serving.allowance import Allowance
from agent.serving.answers import Refusal
from agent.serving.api import classification, tensors
from agent.serving.api.checks import Inputs, as_asked, check_input, check_size, refuse_output
from agent.serving.api.parameters import (
    OutputRule,
    Place,
    check_reserved,
    interface_of,
    output_rule,
    place_of,
    priority_of,
    sequence_of,
    timeout_of,
)
from agent.serving.api.pauses import Pauses
from agent.serving.api.protocol import VERSION
from agent.serving.buffers import BufferPool, aligned, empty
from agent.serving.dataplane import Dataplane
from agent.serving.grpc import wire
from agent.serving.grpc.messages import ModelInferRequest, ModelInferResponse
from agent.serving.models.host import ModelHost
from agent.serving.scheduling.demand import Demand
from agent.serving.shared.regions import Regions
from runtimes.contract import Array, TensorSpec
from runtimes.naming import Interface

EMPTY_FINAL = "triton_enable_empty_final_response"
NO_SHARED_MEMORY = "Client shared memory is disabled: send the tensor's bytes instead"
CONTENTS = {
    "BOOL": "bool_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
AT_ONCE = 1024  # values
INT32_BYTES = 4  # what the smaller whole numbers come in
_VERSION = re.compile(VERSION)


def parameters_of(message: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values of a map of parameters."""
    found: dict[str, Any] = {}
    for name, value in message.items():
        kind = value.WhichOneof("parameter_choice")
        found[name] = getattr(value, kind) if kind else None
    return found


def version_of(text: str) -> str | None:
    """What to look the version up by; None when it is not said.  Raises: Refusal (404)."""
    if not text:
        return None
    if not _VERSION.fullmatch(text):
        raise Refusal(404, f"version '{text}' is not found: expected a number, stable, candidate or previous")
    return text


class Came:
    """The bytes of a ModelInferRequest, until they are read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.id = ""  # once it is read

    def read(self, allowance: Allowance) -> Any:
        """The message.  Raises: Refusal (400; 413, 503 when it would take too much)."""
        wire.Scale(allowance, "the request").weigh(memoryview(self.data), wire.REQUEST)
        try:
            request = ModelInferRequest.FromString(self.data)
        except DecodeError as error:
            raise Refusal(400, f"the request is no ModelInferRequest: {error}") from error
        self.data = b""
        self.id = request.id
        return request


class Inference:
    """One call of `infer` is one prediction; any number of threads may make it."""

    def __init__(
        self, host: ModelHost, dataplane: Dataplane, regions: Regions | None = None, pool: BufferPool | None = None
    ) -> None:
        self._host = host
        self._dataplane = dataplane
        self._regions = regions
        self._pool = pool

    def infer(self, came: Came, arrived_s: float, deadline_s: float | None, alive: Callable[[], bool]) -> Any:
        """The answer to a ModelInferRequest that has `deadline_s` seconds left.  Raises: Refusal."""
        allowance = Allowance(self._pool, len(came.data))
        try:
            allowance.charge(len(came.data))
            request = came.read(allowance)
            return self._infer(request, allowance, arrived_s, deadline_s, alive)
        finally:
            allowance.end()

    def _infer(
        self, request: Any, allowance: Allowance, arrived_s: float, deadline_s: float | None, alive: Callable[[], bool]
    ) -> Any:
        wanted = version_of(request.model_version)
        version = self._host.find(request.model_name, wanted)
        if not version.answers:
            self._host.enter(version.name, wanted).leave()
        parameters = parameters_of(request.parameters)
        parameters.pop(EMPTY_FINAL, None)
        check_reserved(parameters)
        interface = interface_of(parameters, version.interfaces, version.name)
        feeds = self._feeds(request, version.name, interface, allowance)
        names, specs, rules = _outputs(request, version.name, interface)
        self._check_places(rules)
        timeout = timeout_of(parameters)
        if deadline_s is not None:
            timeout = deadline_s if timeout is None else min(timeout, deadline_s)
        demand = Demand(
            names,
            priority_of(parameters),
            timeout,
            sequence_of(parameters),
            arrived_s,
        )
        result = self._dataplane.predict(request.model_name, wanted, feeds, demand, alive)
        if result.version is not version:  # another one answered, whose outputs may be others
            interface = interface_of(parameters, result.version.interfaces, version.name)
            _, specs, rules = _outputs(request, version.name, interface)
        answer = ModelInferResponse(model_name=version.name, model_version=str(result.version.number), id=request.id)
        for spec, rule, array in zip(specs, rules, result.arrays, strict=True):
            self._put(answer, spec, rule, array, result.version.labels)
        return answer

    def _feeds(self, request: Any, model: str, interface: Interface, allowance: Allowance) -> dict[str, Array]:
        waiting = Inputs(interface, model)
        feeds: dict[str, Array] = {}
        raw = iter(request.raw_input_contents)
        for given in request.inputs:
            spec = waiting.claim(given.name)
            shape = tuple(given.shape)
            check_input(given.name, given.datatype, shape, spec, model)
            place = place_of(parameters_of(given.parameters), given.name)
            if place is not None:
                allowance.body_bytes += place.size
                check_size(given.name, place.size, shape, spec, model)
                feeds[spec.name] = tensors.from_memory(as_asked(spec, given.name), shape, self._view(place), allowance)
            elif request.raw_input_contents:
                if given.HasField("contents"):
                    raise Refusal(400, f"contents field must not be specified when using raw_input_contents for '{given.name}'")
                feeds[spec.name] = _from_raw(next(raw, None), shape, as_asked(spec, given.name), model, allowance)
            else:
                feeds[spec.name] = _from_contents(given, shape, as_asked(spec, given.name), allowance)
        waiting.check()
        if next(raw, None) is not None:
            raise Refusal(400, f"raw_input_contents has more entries than model '{model}' has inputs outside shared memory")
        return feeds

    def _view(self, place: Place) -> memoryview:
        return self._offered().view(place.region, place.offset, place.size)

    def _offered(self) -> Regions:
        if self._regions is None:
            raise Refusal(501, NO_SHARED_MEMORY)
        return self._regions

    def _check_places(self, rules: Sequence[OutputRule | None]) -> None:
        for rule in rules:
            if rule is not None and rule.place is not None:
                self._offered().check(rule.place.region, rule.place.offset, rule.place.size)

    def _put(
        self, answer: Any, spec: TensorSpec, rule: OutputRule | None, array: Array, labels: Mapping[str, Sequence[str]]
    ) -> None:
        datatype = spec.datatype
        if rule is not None and rule.classes:
            array, datatype = classification.classify(array, spec, rule.classes, labels.get(spec.name, ())), "BYTES"
        output = answer.outputs.add(name=spec.name, datatype=datatype, shape=array.shape)
        data = tensors.write_bytes(array) if datatype == "BYTES" else array.tobytes()
        if rule is not None and rule.place is not None:
            self._offered().store(rule.place.region, rule.place.offset, rule.place.size, data)
            output.parameters["shared_memory_region"].string_param = rule.place.region
            output.parameters["shared_memory_byte_size"].int64_param = len(data)
            data = b""  # clients find the others by position
        answer.raw_output_contents.append(data)


def _outputs(
    request: Any, model: str, interface: Interface
) -> tuple[list[str] | None, Sequence[TensorSpec], Sequence[OutputRule | None]]:
    """What to ask the runtime for, and each output as its caller calls it and wants it."""
    if not request.outputs:
        return interface.asked, interface.said_outputs, (None,) * len(interface.said_outputs)
    specs = dict(interface.outputs)
    names, chosen, rules = [], [], []
    for wanted in request.outputs:
        found = specs.pop(wanted.name, None)
        if found is None:
            refuse_output(wanted.name, model, interface)
        names.append(found.name)
        spec = as_asked(found, wanted.name)
        rule = output_rule(parameters_of(wanted.parameters), wanted.name)
        if rule is not None and rule.classes:
            classification.check(spec)
        chosen.append(spec)
        rules.append(rule)
    return names, chosen, rules


def _from_raw(data: bytes | None, shape: tuple[int, ...], spec: TensorSpec, model: str, allowance: Allowance) -> Array:
    if data is None:
        raise Refusal(400, f"raw_input_contents has no entry for input '{spec.name}'")
    check_size(spec.name, len(data), shape, spec, model)
    array = tensors.from_memory(spec, shape, memoryview(data), allowance)
    return array if spec.datatype in ("BOOL", "BYTES") else aligned(array)  # what was checked is a copy already


def _from_contents(given: Any, shape: tuple[int, ...], spec: TensorSpec, allowance: Allowance) -> Array:
    field = CONTENTS.get(spec.datatype)
    if field is None:
        raise Refusal(400, f"{spec.datatype} of input '{spec.name}' can only be sent in raw_input_contents")
    others = [other.name for other, _ in given.contents.ListFields() if other.name != field]
    if others:
        raise Refusal(400, f"input '{spec.name}' is {spec.datatype}: its values belong in {field}, not in {others[0]}")
    values = getattr(given.contents, field)
    count = int(np.prod(shape, dtype=object))
    if len(values) != count:
        raise Refusal(400, f"input '{spec.name}' has {len(values)} elements in {field}, its shape needs {count}")
    if spec.datatype == "BYTES":
        allowance.elements(count, given.ByteSize(), f"input '{spec.name}'")
        array: Array = np.empty(count, np.object_)
    else:
        allowance.reserve(count * spec.dtype.itemsize, f"input '{spec.name}'")
        array = empty(count * spec.dtype.itemsize).view(spec.dtype)
    pauses = Pauses()
    for at in range(0, count, AT_ONCE):
        array[at : at + AT_ONCE] = _values(values[at : at + AT_ONCE], spec)
        pauses.rest()
    return array.reshape(shape)


def _values(some: Sequence[Any], spec: TensorSpec) -> Any:
    """Raises: Refusal (400)."""
    if spec.dtype.kind in "iu" and spec.dtype.itemsize < INT32_BYTES:
        limits = np.iinfo(spec.dtype)
        if min(some) < limits.min or max(some) > limits.max:
            raise Refusal(400, f"input '{spec.name}' has a value that does not fit {spec.datatype}")
    return some
