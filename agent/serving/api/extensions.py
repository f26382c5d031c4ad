"""Triton's extension routes over HTTP: the repository, logging, tracing, and the memory of GPUs, which is not shared here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from agent.contract.names import check_model
from agent.serving.access import Access
from agent.serving.answers import Answer, Refusal, json_answer
from agent.serving.api.changes import Changes
from agent.serving.api.json_body import read_body
from agent.serving.api.parameters import shown
from agent.serving.api.settings import LogSettings, TraceSettings
from agent.serving.models.host import ModelHost
from agent.serving.routes import Kind, Request, Route

T = TypeVar("T")

NO_REPOSITORY = "'repository_name' specification is not supported"
NO_CUDA = "shared memory of a GPU is not supported: send the tensor's bytes, or share memory of the system"


class RepositoryRequest(msgspec.Struct):
    parameters: dict[str, msgspec.Raw] = {}


class Repository:
    """Loading and unloading by model name, for every transport. What is loaded is what was signed, so nothing can be put over
    it.
    """

    def __init__(self, changes: Changes) -> None:
        self._changes = changes

    def load(self, name: str, parameters: Mapping[str, object]) -> None:
        """Raises: Refusal."""
        for key in parameters:
            if key == "config" or key.startswith("file:"):
                raise Refusal(
                    501, f"parameter {shown(key)} is not supported: a model runs with the files and settings of its release"
                )
            raise Refusal(400, f"parameter {shown(key)} is not known; loading takes none")
        self._changes.load_selected(_checked(name))

    def unload(self, name: str, parameters: Mapping[str, object]) -> None:
        """Raises: Refusal."""
        for key in parameters:
            if key != "unload_dependents":
                raise Refusal(400, f"parameter {shown(key)} is not known; unloading takes 'unload_dependents'")
        self._changes.unload_all(_checked(name))


def _checked(name: str) -> str:
    try:
        return check_model(name)
    except ValueError as error:
        raise Refusal(400, str(error)) from error


class Extensions:
    """The handlers."""

    def __init__(self, host: ModelHost, repository: Repository, logs: LogSettings, traces: TraceSettings) -> None:
        self._host = host
        self._repository = repository
        self._logs = logs
        self._traces = traces

    def routes(self) -> list[Route]:
        model = "/v2/repository/models/{model}"
        other = "/v2/repository/{repository}"
        found = [
            Route("POST", model + "/load", Access.CONTROL, self.load, Kind.CONTROL),
            Route("POST", model + "/unload", Access.CONTROL, self.unload, Kind.CONTROL),
            Route("POST", other + "/index", Access.OBSERVE, self.no_repository),
            Route("POST", other + "/models/{model}/load", Access.CONTROL, self.no_repository),
            Route("POST", other + "/models/{model}/unload", Access.CONTROL, self.no_repository),
            Route("GET", "/v2/logging", Access.OBSERVE, self.logging),
            Route("POST", "/v2/logging", Access.CONTROL, self.change_logging),
        ]
        for base in ("/v2", "/v2/models/{model}"):
            found.append(Route("GET", base + "/trace/setting", Access.OBSERVE, self.tracing))
            found.append(Route("POST", base + "/trace/setting", Access.CONTROL, self.change_tracing))
        for base in ("/v2/cudasharedmemory", "/v2/cudasharedmemory/region/{region}"):
            found.append(Route("GET", base + "/status", Access.OBSERVE, self.no_cuda))
            found.append(Route("POST", base + "/unregister", Access.PREDICT, self.no_cuda))
        found.append(Route("POST", "/v2/cudasharedmemory/region/{region}/register", Access.PREDICT, self.no_cuda))
        return found

    def load(self, call: Request) -> Answer:
        self._repository.load(call.params["model"], read(call, RepositoryRequest).parameters)
        return Answer()

    def unload(self, call: Request) -> Answer:
        self._repository.unload(call.params["model"], read(call, RepositoryRequest).parameters)
        return Answer()

    def no_repository(self, _request: Request) -> Answer:
        raise Refusal(501, NO_REPOSITORY)

    def no_cuda(self, _request: Request) -> Answer:
        raise Refusal(501, NO_CUDA)

    def logging(self, _request: Request) -> Answer:
        return json_answer(self._logs.document())

    def change_logging(self, call: Request) -> Answer:
        return json_answer(self._logs.change(read(call, dict[str, bool | int | str | None])))

    def tracing(self, call: Request) -> Answer:
        self._check_model(call)
        return json_answer(self._traces.document())

    def change_tracing(self, call: Request) -> Answer:
        self._check_model(call)
        return json_answer(self._traces.change(read(call, dict[str, str | list[str] | None])))

    def _check_model(self, call: Request) -> None:
        if "model" in call.params:
            self._host.served(call.params["model"])


def read(call: Request, kind: type[T]) -> T:
    """The body as JSON, `{}` when it is empty.  Raises: Refusal (400)."""
    return read_body(call.body, kind)
