"""The Open Inference Protocol's inference response, written as bytes, with the binary tensor extension. No I/O, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from agent.serving.answers import BINARY, Answer, Buffer, FilledTemplate, Template
from agent.serving.api import classification, tensors
from agent.serving.api.oip_request import Plan, offered
from agent.serving.api.parameters import Place
from agent.serving.shared.regions import Regions
from runtimes.contract import Array

MAX_TEMPLATES = 16  # per plan: a model whose outputs have many shapes is answered anew each time

_encode = msgspec.json.encode


def write_response(
    plan: Plan,
    arrays: Sequence[Array],
    model: str,
    version: str,
    labels: Mapping[str, Sequence[str]] = {},
    regions: Regions | None = None,
) -> Answer:
    """The answer with `arrays`, which are in the order of `plan.specs`. `labels` has the classes' names of some outputs.

    Raises: Refusal (500 when JSON cannot carry one, 400 when it does not fit its region).
    """
    key = arrays[0].shape if len(arrays) == 1 else tuple([a.shape for a in arrays])
    template = plan.templates.get(key)
    if template is not None:
        return FilledTemplate(template, arrays)
    documents: list[dict[str, Any]] = []
    parts: list[Buffer] = []
    fixed = not plan.id and not plan.rules
    size = 0
    for at, (spec, array, binary) in enumerate(zip(plan.specs, arrays, plan.binary, strict=True)):
        rule = plan.rules[at] if plan.rules else None
        datatype = spec.datatype
        if rule is not None and rule.classes:
            array, datatype = classification.classify(array, spec, rule.classes, labels.get(spec.name, ())), "BYTES"  # noqa: PLW2901
        document: dict[str, Any] = {"name": spec.name, "datatype": datatype, "shape": array.shape}
        if rule is not None and rule.place is not None:
            document["parameters"] = _store(rule.place, _bytes_of(array, datatype), regions)
        elif binary:
            part = _bytes_of(array, datatype)
            count = len(part) if isinstance(part, bytes) else part.nbytes
            document["parameters"] = {"binary_data_size": count}
            size += count
            parts.append(part)
        else:
            document["data"] = tensors.to_json(spec.name, array, datatype)
        fixed = fixed and binary and datatype != "BYTES"
        documents.append(document)
    head = {"id": plan.id} if plan.id else {}
    json = _encode({**head, "model_name": model, "model_version": version, "outputs": documents})
    if size == 0:
        return Answer((json,))
    if fixed and len(plan.templates) < MAX_TEMPLATES and all(a.flags.c_contiguous for a in arrays):
        plan.templates[key] = Template(json, len(json) + size)
    return Answer((json, *parts), content_type=BINARY, json_bytes=len(json))


def _bytes_of(array: Array, datatype: str) -> Any:
    return tensors.write_bytes(array) if datatype == "BYTES" else np.ascontiguousarray(array)


def _store(place: Place, part: Any, regions: Regions | None) -> dict[str, Any]:
    """Puts an output where its caller wants it, and gives what the answer says of that."""
    offered(regions).store(place.region, place.offset, place.size, part)
    used = len(part) if isinstance(part, bytes) else part.nbytes
    return {"shared_memory_region": place.region, "shared_memory_byte_size": used}
