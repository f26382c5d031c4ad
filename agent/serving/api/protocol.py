"""The Open Inference Protocol's routes other than the work of a prediction: health, metadata, configuration, index, statistics."""

from __future__ import annotations

import functools

import msgspec

from agent.serving.access import Access
from agent.serving.answers import Answer, Refusal, json_answer
from agent.serving.api import descriptions
from agent.serving.api.json_body import read_body
from agent.serving.api.oip import OIP
from agent.serving.dataplane import Dataplane
from agent.serving.models.host import LABELS, ModelHost
from agent.serving.routes import Kind, Request, Route

VERSION = r"[0-9]{1,16}|" + "|".join(LABELS)


class IndexRequest(msgspec.Struct):
    ready: bool = False


class Protocol:
    """The handlers. `is_ready` tells whether the process takes requests: models are loaded and it is not on its way out."""

    def __init__(self, host: ModelHost, dataplane: Dataplane, *, shared_memory: bool = False) -> None:
        self._host = host
        self._infer = functools.partial(dataplane.infer, OIP)
        self._shared_memory = shared_memory
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
                Route("GET", base + "/config", Access.PREDICT, self.config),
                Route("GET", base + "/ready", Access.PREDICT, self.model_ready),
                Route("POST", base + "/infer", Access.PREDICT, self._infer, Kind.PREDICT, parks=True),
                Route("GET", base + "/stats", Access.OBSERVE, self.stats),
            ]
        return found

    def server(self, _request: Request) -> Answer:
        return json_answer(descriptions.server(shared_memory=self._shared_memory))

    def live(self, _request: Request) -> Answer:
        return Answer()

    def ready(self, _request: Request) -> Answer:
        """One bad model does not make the others unready; a server without models is ready."""
        if not self.is_ready:
            raise Refusal(503, "Server not ready")
        return Answer()

    def metadata(self, call: Request) -> Answer:
        return json_answer(descriptions.metadata(self._host, call.params["model"], call.params.get("version")))

    def config(self, call: Request) -> Answer:
        return json_answer(descriptions.config(self._host, call.params["model"], call.params.get("version")))

    def model_ready(self, call: Request) -> Answer:
        if not self._host.find(call.params["model"], call.params.get("version")).answers:
            raise Refusal(400, "Model version not ready")
        return Answer()

    def index(self, call: Request) -> Answer:
        only_ready = read_body(call.body, IndexRequest, "an index request").ready
        return json_answer(descriptions.index(self._host, only_ready=only_ready))

    def stats(self, call: Request) -> Answer:
        found = descriptions.statistics(self._host, call.params.get("model"), call.params.get("version"))
        return json_answer({"model_stats": found})
