"""What both clients can ask, as conversations over one connection: arguments in, Steps out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import msgspec
import numpy as np

from agent.client import quantization, wire
from agent.client.errors import InputRejected, document
from agent.client.inference import Inference, Link, Models, Options, Steps, get, model_path, tensors_of
from agent.client.memory import Arrays
from agent.client.tensors import Array
from agent.client.wire import Answer, Message


def label(version: int | str | None) -> str | None:
    return None if version is None else str(version)


def options(
    version: int | str | None,
    outputs: Sequence[str] | None,
    into: Mapping[str, Array] | None,
    timeout_s: float,
    priority: int,
    request_id: str,
    sequence: tuple[int | str, bool, bool] | None,
    signature: str = "",
) -> Options:
    """`sequence` is its id, and whether this is its first and its last request."""
    if not (outputs or into or request_id or sequence or signature):
        return _plain_options(version, outputs is None, timeout_s, priority)
    parameters: list[tuple[str, Any]] = [("timeout", max(1, round(timeout_s * 1e6)))]  # the server need not answer later
    if priority:
        parameters.append(("priority", priority))
    if sequence is not None:
        names = ("sequence_id", "sequence_start", "sequence_end")
        parameters.extend(zip(names, sequence, strict=True))
    if signature:
        parameters.append(("signature_name", signature))
    names_of = None if outputs is None else tuple(outputs)
    return Options(label(version), names_of, into or {}, tuple(parameters), request_id, signature)


@lru_cache(64)
def _plain_options(version: int | str | None, everything: bool, timeout_s: float, priority: int) -> Options:
    parameters: list[tuple[str, Any]] = [("timeout", max(1, round(timeout_s * 1e6)))]
    if priority:
        parameters.append(("priority", priority))
    return Options(label(version), None if everything else (), {}, tuple(parameters))


class RealInference:
    """A prediction with real numbers on this side of quantized tensors; the metadata is that of the version which answered."""

    def __init__(
        self, model: str, inputs: Mapping[str, Array] | Array, options: Options, models: Models, arrays: Arrays, share_from: int
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._options = options
        self._models = models
        self._arrays = arrays
        self._share_from = share_from

    def steps(self, link: Link) -> Steps[dict[str, Array]]:
        """Raises: ClientError."""
        key = (self._model, self._options.version)
        number = self._models.latest.get(key)
        metadata = yield from self._metadata(number or self._options.version)
        for _ in range(3):  # a version that is switched meanwhile is asked again with its own scale
            inputs = self._quantized(metadata)
            asked = Inference(self._model, inputs, self._options, self._models, self._arrays, self._share_from)
            try:
                found = yield from asked.steps(link)
            except InputRejected:
                now = yield from self._metadata(self._options.version)
                if now == metadata:
                    raise
                metadata = now
                continue
            self._models.latest[key] = asked.served_by
            served = yield from self._metadata(asked.served_by)
            if served["inputs"] == metadata["inputs"]:
                specs = _by_name(served, "outputs")
                return {name: quantization.dequantize(array, specs[name]) for name, array in found.items()}
            metadata = served
        raise InputRejected(f"model {self._model!r} changes faster than it can be asked")

    def _quantized(self, metadata: Mapping[str, Any]) -> dict[str, Array]:
        specs = _by_name(metadata, "inputs")
        inputs = self._inputs
        if not isinstance(inputs, Mapping):
            names = [spec["name"] for spec in metadata["inputs"] if not spec.get("parameters", {}).get("optional")]
            if len(names) != 1:
                raise InputRejected(
                    f"model {self._model!r} has the inputs {', '.join(map(repr, names))}: give each by its name"
                )
            inputs = {names[0]: inputs}
        return {
            name: quantization.quantize(np.asarray(value), specs[name]) if name in specs else value
            for name, value in inputs.items()
        }

    def _metadata(self, version: str | None) -> Steps[dict[str, Any]]:
        """Of a numbered version it is remembered: it never changes."""
        key = (self._model, version or "")
        found = self._models.versions.get(key)
        if found is None:
            found = cast("dict[str, Any]", (yield from get(model_path(self._model, version))))
            if version is not None and version.isdigit():
                self._models.versions[key] = found
        return found


def _by_name(metadata: Mapping[str, Any], role: str) -> dict[str, dict[str, Any]]:
    """Tensors by the model's own names and by those of its default signature."""
    default = metadata.get("parameters", {}).get("default_signature", "")
    return {spec["name"]: spec for spec in (*tensors_of(metadata, role, default), *tensors_of(metadata, role))}


def models(_link: Link) -> Steps[list[dict[str, Any]]]:
    answer = yield Message((wire.request("POST", "/v2/repository/index", b"{}"),))
    return cast("list[dict[str, Any]]", document(answer))


def plain(method: str, path: str, body: object) -> Steps[Answer]:
    """Any request. `body` is sent as JSON; bytes are sent as they are."""
    payload = b"" if body is None else bytes(body) if isinstance(body, bytes | bytearray) else msgspec.json.encode(body)
    return (yield Message((wire.request(method, path, payload),)))


def ready_path(model: str | None, version: int | str | None) -> str:
    return "/v2/health/ready" if model is None else model_path(model, label(version)) + "/ready"
