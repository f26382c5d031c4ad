"""The Open Inference Protocol's routes other than the work of a prediction: health, metadata, index, statistics."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from agent.serving.access import Access
from agent.serving.answers import Answer, Refusal, json_answer
from agent.serving.dataplane import Dataplane
from agent.serving.host import LABELS, ModelHost, Version
from agent.serving.routes import Kind, Request, Route
from runtimes.contract import TensorSpec

EXTENSIONS = ("binary_tensor_data", "model_repository", "statistics")
VERSION = r"[0-9]{1,16}|" + "|".join(LABELS)


class IndexRequest(msgspec.Struct):
    ready: bool = False


def agent_version() -> str:
    try:
        return version("edge-inference-agent")
    except PackageNotFoundError:
        return "0"


class Protocol:
    """The handlers. `is_ready` tells whether the process takes requests: models are loaded and it is not on its way out."""

    def __init__(self, host: ModelHost, dataplane: Dataplane) -> None:
        self._host = host
        self._dataplane = dataplane
        self.is_ready = False

    def routes(self) -> list[Route]:
        model, versioned = "/v2/models/{model}", "/v2/models/{model}/versions/{version:" + VERSION + "}"
        found = [
            Route("GET", "/v2", Access.PREDICT, self.server),
            Route("GET", "/v2/health/live", Access.NONE, self.live),
            Route("GET", "/v2/health/ready", Access.NONE, self.ready),
            Route("GET", "/v2/models/stats", Access.OBSERVE, self.stats),
            Route("POST", "/v2/repository/index", Access.OBSERVE, self.index),
        ]
        for base in (model, versioned):
            found += [
                Route("GET", base, Access.PREDICT, self.metadata),
                Route("GET", base + "/ready", Access.PREDICT, self.model_ready),
                Route("POST", base + "/infer", Access.PREDICT, self.infer, Kind.PREDICT),
                Route("GET", base + "/stats", Access.OBSERVE, self.stats),
            ]
        return found

    def infer(self, call: Request) -> Answer:
        match = call.match
        assert match.model is not None
        return self._dataplane.infer(match.model, match.version, call.body, call.header_length, call.arrived_s, call.regions)

    def server(self, _request: Request) -> Answer:
        return json_answer({"name": "edge-agent", "version": agent_version(), "extensions": EXTENSIONS})

    def live(self, _request: Request) -> Answer:
        return Answer()

    def ready(self, _request: Request) -> Answer:
        """One bad model does not make the others unready; a server without models is ready."""
        if not self.is_ready:
            raise Refusal(503, "Server not ready")
        return Answer()

    def metadata(self, call: Request) -> Answer:
        found = self._host.look(call.params["model"], call.params.get("version"))
        if found.state != "READY":
            self._host.enter(found.name, str(found.number)).leave()
        versions = [str(n) for n, v in sorted(self._host.served(found.name).versions.items()) if v.state == "READY"]
        return json_answer({
            "name": found.name,
            "versions": versions,
            "platform": found.runtime,
            "inputs": [_tensor(spec) for spec in found.inputs],
            "outputs": [_tensor(spec) for spec in found.outputs],
        })  # fmt: skip

    def model_ready(self, call: Request) -> Answer:
        if self._host.look(call.params["model"], call.params.get("version")).state != "READY":
            raise Refusal(400, "Model version not ready")
        return Answer()

    def index(self, call: Request) -> Answer:
        try:
            only_ready = bool(call.body) and msgspec.json.decode(call.body, type=IndexRequest).ready
        except msgspec.DecodeError as error:
            raise Refusal(400, f"the body is not an index request: {error}") from error
        found: list[dict[str, str]] = []
        for served in self._host:
            for number, item in sorted(served.versions.items()):
                if only_ready and item.state != "READY":
                    continue
                entry = {"name": served.name, "version": str(number), "state": item.state}
                found.append({**entry, "reason": item.reason} if item.reason else entry)
        return json_answer(found)

    def stats(self, call: Request) -> Answer:
        name, wanted = call.params.get("model"), call.params.get("version")
        if name is None:
            versions = [v for served in self._host for v in served.versions.values()]
        elif wanted is None:
            versions = list(self._host.served(name).versions.values())
        else:
            versions = [self._host.look(name, wanted)]
        return json_answer({"model_stats": [_statistics(v) for v in sorted(versions, key=lambda v: (v.name, v.number))]})


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    document: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}
    quantization = spec.quantization
    if quantization is None:
        return document
    if quantization.axis is None and len(quantization.scales) == 1:
        values: dict[str, Any] = {"scale": quantization.scales[0], "zero_point": quantization.zero_points[0]}
    else:
        values = {"scale": quantization.scales, "zero_point": quantization.zero_points, "axis": quantization.axis}
    document["parameters"] = {"quantization": values}
    return document


def _statistics(item: Version) -> dict[str, Any]:
    stats = item.stats
    failed = sum(stats.failures.values())
    none = {"count": 0, "ns": 0}
    infer = {"count": stats.ok, "ns": int(stats.run_s * 1e9)}
    return {
        "name": item.name,
        "version": str(item.number),
        "last_inference": int(stats.last_unix_s * 1000),
        "inference_count": stats.ok,
        "execution_count": stats.ok,
        "inference_stats": {
            "success": {"count": stats.ok, "ns": int(stats.total_s * 1e9)},
            "fail": {"count": failed, "ns": 0},
            "queue": none, "compute_input": none, "compute_infer": infer, "compute_output": none,
            "cache_hit": none, "cache_miss": none,
        },
        "response_stats": {},
        "batch_stats": [],
        "memory_usage": [{"type": "CPU", "id": 0, "byte_size": item.memory_bytes}],
    }  # fmt: skip
