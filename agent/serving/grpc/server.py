"""The gRPC server on its Unix socket: methods wired to messages, refusals to status codes."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import grpc  # type: ignore[import-untyped]

from agent.config import ServeSettings
from agent.serving.access import Access
from agent.serving.answers import Refusal
from agent.serving.api.extensions import Repository
from agent.serving.api.settings import LogSettings, TraceSettings
from agent.serving.buffers import BufferPool
from agent.serving.dataplane import Dataplane
from agent.serving.grpc.inference import Came, Inference
from agent.serving.grpc.messages import HEALTH, INFERENCE, classes_of
from agent.serving.grpc.regions import SocketRegions
from agent.serving.grpc.services import Health, Services
from agent.serving.models.host import ModelHost
from agent.serving.shared.systemmemory import SystemMemory
from agent.serving.transport.sockets import MAX_PATH_BYTES, SocketError, make_way

log = logging.getLogger(__name__)

MAX_WATCHES = 8  # each keeps a thread, as does each stream
MAX_WAITING = 256  # calls besides that are neither answered nor refused yet
LAST_WORDS_S = 0.5  # for answers that are made to reach their clients
OVERHEAD_BYTES = 64 * 1024  # of a message besides its tensors
STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    499: grpc.StatusCode.CANCELLED,
    500: grpc.StatusCode.INTERNAL,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
    507: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
REAL_STATUS = "triton_grpc_error"  # metadata of a stream that wants its errors as gRPC's own


class Served(Protocol):
    """What the process serves with, as far as these methods need it."""

    @property
    def host(self) -> ModelHost: ...

    @property
    def dataplane(self) -> Dataplane: ...

    @property
    def protocol(self) -> Readiness: ...

    @property
    def repository(self) -> Repository: ...

    @property
    def logs(self) -> LogSettings: ...

    @property
    def traces(self) -> TraceSettings: ...

    @property
    def system(self) -> SystemMemory: ...

    @property
    def pool(self) -> BufferPool: ...


class Readiness(Protocol):
    @property
    def is_ready(self) -> bool: ...


def build(parts: Served, settings: ServeSettings) -> GrpcServer:
    """The server that `settings` ask for, bound and not yet started.  Raises: SocketError."""
    assert settings.grpc_socket is not None

    def is_ready() -> bool:
        return parts.protocol.is_ready

    access = Access[settings.grpc_access.upper()]
    regions = None
    if access is Access.CONTROL and settings.shared_memory != "off":  # nobody else may act as the user that runs the server
        regions = SocketRegions(parts.system, os.geteuid())
    services = Services(
        parts.host,
        Inference(parts.host, parts.dataplane, regions, parts.pool),
        parts.repository,
        parts.logs,
        parts.traces,
        regions,
        is_ready,
        access,
    )
    return GrpcServer(
        settings.grpc_socket,
        settings.grpc_socket_mode,
        services,
        Health(is_ready),
        settings,
    )


class GrpcServer:
    """Serves from `start` to `stop`. Raises: SocketError when the socket cannot be had."""

    def __init__(self, path: Path, mode: int, services: Services, health: Health, settings: ServeSettings) -> None:
        self.path = path
        self._health = health
        self._services = services
        self._max_streams = streams = settings.grpc_streams
        self._streams = threading.BoundedSemaphore(streams)
        self._watches = threading.BoundedSemaphore(MAX_WATCHES)
        self._at_work = 0
        self._idle = threading.Condition()
        self._pool = ThreadPoolExecutor(2 * settings.threads + streams + MAX_WATCHES, "grpc")
        self._server = grpc.server(
            self._pool,
            handlers=self._handlers(),
            maximum_concurrent_rpcs=MAX_WAITING + streams,
            options=[
                ("grpc.max_receive_message_length", settings.max_body_bytes + OVERHEAD_BYTES),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
                *_pings(settings.grpc_ping_interval_s),
            ],
        )
        self._made = self._bind(mode)

    def _bind(self, mode: int) -> os.stat_result:
        if len(os.fsencode(self.path)) > MAX_PATH_BYTES:
            raise SocketError(
                f"gRPC socket path {str(self.path)!r} is longer than the {MAX_PATH_BYTES} bytes that Linux allows"
            )
        make_way(self.path)
        before = os.umask(0o777 & ~mode)
        try:
            self._server.add_insecure_port(f"unix:{self.path}")
            return self.path.stat()
        except (RuntimeError, OSError) as error:
            raise SocketError(f"cannot listen on {str(self.path)!r} for gRPC: {error}") from error
        finally:
            os.umask(before)

    def start(self) -> None:
        self._server.start()

    def stop(self, grace_s: float) -> None:
        """Takes nothing more, and gives what is under way up to `grace_s`."""
        self._health.ended.set()
        stopped = self._server.stop(grace_s)
        with self._idle:
            self._idle.wait_for(lambda: not self._at_work, grace_s)
        if not stopped.wait(LAST_WORDS_S):  # what is left are streams whose clients say nothing
            self._server.stop(0.0).wait()
        self._pool.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(FileNotFoundError):
            now = self.path.stat()
            if (now.st_dev, now.st_ino) == (self._made.st_dev, self._made.st_ino):
                self.path.unlink()

    def _handlers(self) -> tuple[Any, ...]:
        inference = {}
        for method in INFERENCE.methods:
            takes, gives = classes_of(method)
            if method.name == "ModelStreamInfer":
                inference[method.name] = grpc.stream_stream_rpc_method_handler(self._stream, Came, gives.SerializeToString)
                continue
            read = Came if method.name == "ModelInfer" else _short(takes)
            inference[method.name] = grpc.unary_unary_rpc_method_handler(
                self._unary(method.name, getattr(self._services, method.name), gives), read, gives.SerializeToString
            )
        takes, gives = classes_of(HEALTH.methods_by_name["Check"])
        health = {
            "Check": grpc.unary_unary_rpc_method_handler(self._check, takes.FromString, gives.SerializeToString),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch, takes.FromString, gives.SerializeToString),
        }
        return (
            grpc.method_handlers_generic_handler(INFERENCE.full_name, inference),
            grpc.method_handlers_generic_handler(HEALTH.full_name, health),
        )

    def _unary(self, name: str, method: Callable[[Any, Any, Any], Any], gives: Any) -> Callable[[Any, Any], Any]:
        def answer(request: Any, context: Any) -> Any:
            try:
                if isinstance(request, Refusal):
                    raise request  # noqa: TRY301
                with self._working():
                    self._services.check(name, request)
                    return method(request, gives, context)
            except Refusal as refusal:
                _abort(context, refusal)
            except Exception:
                log.exception("gRPC method %s failed in an unforeseen way", name)
                _abort(context, Refusal(500, "internal error; the server's log says more"))

        return answer

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        with self._idle:
            self._at_work += 1
        try:
            yield
        finally:
            with self._idle:
                self._at_work -= 1
                self._idle.notify_all()

    def _stream(self, requests: Iterable[Any], context: Any) -> Iterator[Any]:
        if not self._streams.acquire(blocking=False):
            _abort(context, Refusal(507, f"all {self._max_streams} streams are in use (serve.grpc_streams)"))
        try:
            real = dict(context.invocation_metadata()).get(REAL_STATUS) == "true"
            for refusal, answer in self._services.stream(requests, context, self._working):
                if refusal is not None and real:
                    _abort(context, refusal)
                yield answer
        finally:
            self._streams.release()

    def _check(self, request: Any, context: Any) -> Any:
        try:
            return self._health.status(request.service)
        except Refusal as refusal:
            _abort(context, refusal)

    def _watch(self, request: Any, context: Any) -> Iterator[Any]:
        if not self._watches.acquire(blocking=False):
            _abort(context, Refusal(507, f"all {MAX_WATCHES} watchers of health are in use"))
        try:
            yield from self._health.watch(request.service, context)
        finally:
            self._watches.release()


def _pings(interval_s: float) -> list[tuple[str, int]]:
    """How often clients may ping: what gRPC presets, five minutes without calls, is meant for networks."""
    allowed = [
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", round(interval_s * 1000)),
    ]
    return allowed if interval_s else [*allowed, ("grpc.http2.max_ping_strikes", 0)]


def _short(takes: Any) -> Callable[[bytes], Any]:
    """Reads a message that has no tensors; one that is too long becomes its refusal."""

    def read(data: bytes) -> Any:
        if len(data) > OVERHEAD_BYTES:
            return Refusal(413, f"the message has {len(data)} bytes; without tensors at most {OVERHEAD_BYTES} are allowed")
        return takes.FromString(data)

    return read


def _abort(context: Any, refusal: Refusal) -> None:
    context.abort(STATUS.get(refusal.status, grpc.StatusCode.UNKNOWN), str(refusal))
