"""The methods of both services: a message in, a message out. The words and values are those of the HTTP routes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from agent.serving.access import Access, Grant
from agent.serving.answers import Refusal
from agent.serving.api import descriptions
from agent.serving.api.extensions import NO_CUDA, NO_REPOSITORY, Repository
from agent.serving.api.settings import LogSettings, TraceSettings
from agent.serving.grpc.inference import Inference, version_of
from agent.serving.grpc.messages import HealthCheckResponse, ModelStreamInferResponse
from agent.serving.grpc.regions import SocketRegions
from agent.serving.models.host import ModelHost

NO_SHARED_MEMORY = "Client shared memory is disabled on this socket: it needs serve.shared_memory and serve.grpc_access control"
ACCESS = {
    "ServerLive": Access.NONE, "ServerReady": Access.NONE,
    "RepositoryIndex": Access.OBSERVE, "ModelStatistics": Access.OBSERVE,
    "RepositoryModelLoad": Access.CONTROL, "RepositoryModelUnload": Access.CONTROL,
}  # fmt: skip
HEALTH_NAMES = ("", "inference.GRPCInferenceService")
WATCH_S = 0.5


class Services:
    """What the methods answer from. Each takes the request, the class of its answer, and the call's context."""

    def __init__(
        self,
        host: ModelHost,
        inference: Inference,
        repository: Repository,
        logs: LogSettings,
        traces: TraceSettings,
        regions: SocketRegions | None,
        is_ready: Callable[[], bool],
        access: Access,
    ) -> None:
        self._host = host
        self._inference = inference
        self._repository = repository
        self._logs = logs
        self._traces = traces
        self._regions = regions
        self._is_ready = is_ready
        self._grant = Grant(access, "the gRPC socket")

    def check(self, method: str, request: Any) -> None:
        """Raises: Refusal (403)."""
        needed = ACCESS.get(method, Access.PREDICT)
        if method in ("LogSettings", "TraceSetting"):
            needed = Access.CONTROL if request.settings else Access.OBSERVE
        self._grant.check(needed)

    # -- health and metadata
    # -----------------------------------------------------------------------------------------------------

    def ServerLive(self, _request: Any, answer: Any, _context: Any) -> Any:  # noqa: N802 - methods have the protocol's names
        return answer(live=True)

    def ServerReady(self, _request: Any, answer: Any, _context: Any) -> Any:  # noqa: N802
        return answer(ready=self._is_ready())

    def ModelReady(self, request: Any, answer: Any, _context: Any) -> Any:  # noqa: N802
        return answer(ready=self._host.find(request.name, version_of(request.version)).answers)

    def ServerMetadata(self, _request: Any, answer: Any, _context: Any) -> Any:  # noqa: N802
        return answer(**descriptions.server(shared_memory=self._regions is not None))

    def ModelMetadata(self, request: Any, answer: Any, _context: Any) -> Any:  # noqa: N802
        found = descriptions.metadata(self._host, request.name, version_of(request.version))
        for tensor in (*found["inputs"], *found["outputs"]):
            tensor.pop("parameters", None)  # they have no place in this message; the configuration has them
        found.pop("parameters", None)
        return answer(**found)

    def ModelConfig(self, request: Any, answer: Any, _context: Any) -> Any:  # noqa: N802
        found = descriptions.config(self._host, request.name, version_of(request.version))
        made = answer()
        fill(made.config, found)
        return made

    def ModelStatistics(self, request: Any, answer: Any, _context: Any) -> Any:  # noqa: N802
        found = descriptions.statistics(self._host, request.name or None, version_of(request.version))
        made = answer()
        fill(made, {"model_stats": found})
        return made

    # -- predictions
    # -------------------------------------------------------------------------------------------------------------

    def ModelInfer(self, request: Any, _answer: Any, context: Any) -> Any:  # noqa: N802
        return self._inference.infer(request, time.perf_counter(), context.time_remaining(), context.is_active)

    def stream(
        self, requests: Iterable[Any], context: Any, working: Callable[[], AbstractContextManager[None]]
    ) -> Iterator[Any]:
        """One answer for each request, in order. What is wrong with one is said in its answer; the next ones are answered."""
        for request in requests:
            try:
                with working():
                    self.check("ModelInfer", request)
                    made = self._inference.infer(request, time.perf_counter(), context.time_remaining(), context.is_active)
            except Refusal as refusal:
                failed = ModelStreamInferResponse(error_message=str(refusal))
                failed.infer_response.id = request.id
                yield refusal, failed
                continue
            made.parameters["triton_final_response"].bool_param = True
            yield None, ModelStreamInferResponse(infer_response=made)

    # -- repository and settings
    # -------------------------------------------------------------------------------------------------

    def RepositoryIndex(self, request: Any, answer: Any, _context: Any) -> Any:  # noqa: N802
        _one_repository(request)
        return answer(models=descriptions.index(self._host, only_ready=request.ready))

    def RepositoryModelLoad(self, request: Any, answer: Any, _context: Any) -> Any:  # noqa: N802
        _one_repository(request)
        self._repository.load(request.model_name, request.parameters)
        return answer()

    def RepositoryModelUnload(self, request: Any, answer: Any, _context: Any) -> Any:  # noqa: N802
        _one_repository(request)
        self._repository.unload(request.model_name, request.parameters)
        return answer()

    def LogSettings(self, request: Any, answer: Any, _context: Any) -> Any:  # noqa: N802
        wanted: dict[str, object] = {}
        for name, value in request.settings.items():
            kind = value.WhichOneof("parameter_choice")
            wanted[name] = getattr(value, kind) if kind else None
        made = answer()
        for name, value in self._logs.change(wanted).items():
            field = "bool_param" if isinstance(value, bool) else "uint32_param" if isinstance(value, int) else "string_param"
            setattr(made.settings[name], field, value)
        return made

    def TraceSetting(self, request: Any, answer: Any, _context: Any) -> Any:  # noqa: N802
        if request.model_name:
            self._host.served(request.model_name)
        found = self._traces.change({name: list(setting.value) or None for name, setting in request.settings.items()})
        made = answer()
        for name, value in found.items():
            made.settings[name].value.extend([value] if isinstance(value, str) else value)
        return made

    # -- shared memory
    # -------------------------------------------------------------------------------------------------------------

    def SystemSharedMemoryStatus(self, request: Any, answer: Any, _context: Any) -> Any:  # noqa: N802
        made = answer()
        for region in self._offered().status(request.name or None):
            fill(made.regions[str(region["name"])], region)
        return made

    def SystemSharedMemoryRegister(self, request: Any, answer: Any, _context: Any) -> Any:  # noqa: N802
        self._offered().register(request.name, request.key, request.offset, request.byte_size)
        return answer()

    def SystemSharedMemoryUnregister(self, request: Any, answer: Any, _context: Any) -> Any:  # noqa: N802
        self._offered().unregister(request.name or None)
        return answer()

    def _offered(self) -> SocketRegions:
        if self._regions is None:
            raise Refusal(501, NO_SHARED_MEMORY)
        return self._regions

    def CudaSharedMemoryStatus(self, _request: Any, _answer: Any, _context: Any) -> Any:  # noqa: N802
        raise Refusal(501, NO_CUDA)

    CudaSharedMemoryRegister = CudaSharedMemoryUnregister = CudaSharedMemoryStatus


def _one_repository(request: Any) -> None:
    if request.repository_name:
        raise Refusal(501, NO_REPOSITORY)


def fill(message: Any, document: Any) -> None:
    """The values of `document` that `message` has fields for."""
    fields = message.DESCRIPTOR.fields_by_name
    for name, value in document.items():
        field = fields.get(name)
        if field is None:
            continue
        if field.message_type is None:
            if isinstance(value, (list, tuple)):
                getattr(message, name).extend(value)
            else:
                setattr(message, name, _enumerated(field, value))
        elif field.message_type.GetOptions().map_entry:
            for key, item in value.items():
                fill(getattr(message, name)[key], item)
        elif isinstance(value, list):
            for item in value:
                fill(getattr(message, name).add(), item)
        else:
            getattr(message, name).SetInParent()
            fill(getattr(message, name), value)


def _enumerated(field: Any, value: Any) -> Any:
    return field.enum_type.values_by_name[value].number if field.enum_type is not None else value


class Health:
    """gRPC's health protocol: the server as a whole, and the inference service by its name."""

    def __init__(self, is_ready: Callable[[], bool]) -> None:
        self._is_ready = is_ready
        self.ended = threading.Event()

    def status(self, service: str) -> Any:
        """Raises: Refusal (404)."""
        if service not in HEALTH_NAMES:
            raise Refusal(404, f"service '{service}' is not served here")
        return self._now()

    def _now(self) -> Any:
        return HealthCheckResponse(status="SERVING" if self._is_ready() and not self.ended.is_set() else "NOT_SERVING")

    def watch(self, service: str, context: Any) -> Iterator[Any]:
        """The status now, and again whenever it changes."""
        if service not in HEALTH_NAMES:
            yield HealthCheckResponse(status="SERVICE_UNKNOWN")
            return
        said: Any = None
        while context.is_active():
            now = self._now()
            if said != now:
                said = now
                yield now
            if self.ended.wait(WATCH_S):
                yield self._now()
                return
