"""TensorFlow Serving's REST API for the same models: predict, classify, regress, status and metadata, under /v1/models.

A request names a signature of the model's file, or is for its default one; a model whose file has none has
one called serving_default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from agent.serving.access import Access
from agent.serving.answers import Answer, json_answer
from agent.serving.api import descriptions
from agent.serving.api.tfserving_forms import FORMS
from agent.serving.models.host import LABELS, ModelHost
from agent.serving.routes import Kind, Request, Route
from runtimes.contract import TensorSpec
from runtimes.naming import Interfaces

STATES = {"LOADING": "LOADING", "READY": "AVAILABLE", "UNAVAILABLE": "END"}
TYPES = {
    "BOOL": "DT_BOOL", "UINT8": "DT_UINT8", "UINT16": "DT_UINT16", "UINT32": "DT_UINT32", "UINT64": "DT_UINT64",
    "INT8": "DT_INT8", "INT16": "DT_INT16", "INT32": "DT_INT32", "INT64": "DT_INT64", "FP16": "DT_HALF", "BF16": "DT_BFLOAT16",
    "FP32": "DT_FLOAT", "FP64": "DT_DOUBLE", "BYTES": "DT_STRING",
}  # fmt: skip


class Predictions(Protocol):
    def infer(self, form: Any, call: Request) -> Answer | None: ...


class TensorFlowServing:
    """The handlers."""

    def __init__(self, host: ModelHost, dataplane: Predictions) -> None:
        self._host = host
        self._dataplane = dataplane

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
                Route("POST", f"{base}:{verb}", Access.PREDICT, self._handler(verb), Kind.PREDICT, parks=True) for verb in FORMS
            ]
        return found

    def _handler(self, verb: str) -> Callable[[Request], Answer | None]:
        form = FORMS[verb]

        def answer(call: Request) -> Answer | None:
            return self._dataplane.infer(form, call)

        return answer

    def status(self, call: Request) -> Answer:
        name, wanted = call.params["model"], call.params.get("version")
        versions = [self._host.find(name, wanted)] if wanted else list(self._host.served(name).versions.values())
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
        _, found = descriptions.find_ready(self._host, call.params["model"], call.params.get("version"))
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
