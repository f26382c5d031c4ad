"""The serving process, wired together. The only place that knows all parts.

The order of a start: bind the socket (so that a second server fails at once, and clients wait instead of being refused), load
the models, let the threads run, ask the socket once as a client would, tell systemd READY. The order of the end: tell systemd
STOPPING, answer what was asked, close the models, remove the socket.
"""

from __future__ import annotations

import logging
import os
import resource
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.config import AgentConfig, ConfigError, ServeSettings
from agent.diary import Diary
from agent.host import notify, peer
from agent.host.signals import Ending
from agent.host.throttle import Throttle
from agent.serving import selfcheck
from agent.serving.access import AccessTable
from agent.serving.api import memoryroutes
from agent.serving.api.control import Control
from agent.serving.api.extensions import Extensions, Repository
from agent.serving.api.pictures import Pictures
from agent.serving.api.protocol import Protocol
from agent.serving.api.tfserving import TensorFlowServing
from agent.serving.candidates.shadowing import Shadows
from agent.serving.dataplane import Dataplane
from agent.serving.models import loading
from agent.serving.models.host import ModelHost, Version
from agent.serving.models.loading import Source
from agent.serving.models.residency import Residency, file_bytes
from agent.serving.models.swapping import Swapper
from agent.serving.routes import Route, Router
from agent.serving.scheduling.scheduler import Scheduler, busy_threads
from agent.serving.service import Service
from agent.serving.settings import LogSettings, TraceSettings
from agent.serving.shared.memory import ClientMemory, MemoryBudget
from agent.serving.shared.systemmemory import SystemMemory
from agent.serving.telemetry.metrics import Metrics
from agent.serving.telemetry.observing import ObservedService, Observer
from agent.serving.transport.loop import Loop
from agent.serving.transport.sockets import Listeners, open_listeners
from agent.store import Choice, Selection, Store, StoreError
from runtimes.contract import RuntimeFailure

if TYPE_CHECKING:
    from agent.serving.grpc.server import GrpcServer

log = logging.getLogger(__name__)

STOP_GRACE_S = 15.0  # systemd kills after 90 s; clients have given up before
STUCK_S = (
    300.0  # runs may take minutes; that long without a thread coming free while others wait is a hang that only a restart ends
)
FILES_BESIDES_CONNECTIONS = 1024  # the store, engines, wake-ups, and what clients share: see memory.py and systemmemory.py

Announce = Callable[[list[str]], None]  # given the loopback addresses


@dataclass(frozen=True)
class Parts:
    """What one process serves with, before any socket or thread exists."""

    host: ModelHost
    dataplane: Dataplane
    residency: Residency
    shadows: Shadows
    protocol: Protocol
    control: Control
    repository: Repository
    logs: LogSettings
    traces: TraceSettings
    system: SystemMemory
    router: Router
    service: Service
    observers: Sequence[Observer]

    @property
    def routes(self) -> Sequence[Route]:
        return self.router.routes


def assemble(store: Store | None, settings: ServeSettings) -> Parts:
    host = ModelHost(max_sequences=settings.max_sequences, sequence_idle_s=settings.sequence_idle_s)
    scheduler = Scheduler(busy_threads(settings.threads), limit=settings.max_queue_size, held_s=settings.reload_timeout_s)
    dataplane = Dataplane(host, scheduler)
    residency = Residency(
        host,
        dataplane,
        engine_threads=settings.engine_threads,
        budget_bytes=settings.memory_budget_bytes,
        pinned=settings.pinned,
        min_residency_s=settings.min_residency_s,
    )
    protocol = Protocol(host, dataplane, shared_memory=settings.shared_memory != "off")
    shadows = Shadows(host, scheduler, Throttle(settings.shadow_max_load, settings.shadow_max_celsius))
    control = Control(host, store, residency, Swapper(host, dataplane, residency), shadows)
    repository, logs, traces = (
        Repository(control),
        LogSettings(),
        TraceSettings(settings.trace_ratio if settings.traces else 0.0),
    )
    system = SystemMemory(settings.shared_memory, settings.max_body_bytes)
    extensions = Extensions(host, repository, logs, traces)
    router = Router(
        [
            *protocol.routes(),
            *TensorFlowServing(host, dataplane).routes(),
            *Pictures(dataplane).routes(),
            *extensions.routes(),
            *control.routes(),
            *Metrics(host, residency, shadows).routes(),
            *memoryroutes.routes(),
        ]
    )
    observers = observers_of(settings)
    service = (
        ObservedService(dataplane, settings.max_body_bytes, observers)
        if observers
        else Service(dataplane, settings.max_body_bytes)
    )
    return Parts(
        host, dataplane, residency, shadows, protocol, control, repository, logs, traces, system, router, service, observers
    )


def observers_of(settings: ServeSettings) -> list[Observer]:
    """Who is told of every request. Their modules are loaded only when they are wanted.  Raises: ConfigError."""
    found: list[Observer] = []
    if settings.access_log:
        from agent.serving.telemetry.accesslog import AccessLog

        found.append(AccessLog(settings.access_log))
    if settings.traces:
        try:
            from agent.serving.telemetry.tracing import Tracing
        except ImportError as error:
            raise ConfigError(
                f"traces need a package that is not installed ({error}): pip install 'edge-inference-agent[tracing]'"
            ) from error
        found.append(Tracing(settings.traces, settings.trace_ratio))
    return found


def serve_store(config: AgentConfig) -> int:
    """Serves what the store selects until SIGTERM. The exit status of the process.

    Raises: StoreError, ConfigError, SocketError when it cannot start at all. A model that cannot be loaded does not stop the others.
    """
    store = Store(config.store)
    store.check_format(may_be_missing=True)  # at first boot `serve` may be earlier than `sync`
    parts = assemble(store, config.serve)
    diary, instance = Diary(config.diary_folder), parts.control.instance

    def load() -> None:
        diary.begin(instance)  # only now: a second server has failed at the socket
        load_selections(parts, store, config.serve.engine_threads)

    status = _serve(parts, config.serve, load)
    if status == 0:
        diary.end(instance)  # what an engine does to the process while it is closed has been done
    return status


def serve_files(sources: Iterable[Source], settings: ServeSettings, announce: Callable[[ModelHost, list[str]], None]) -> int:
    """Serves the given files until SIGTERM or Ctrl-C; `announce` is called with the models and the loopback addresses when
    predictions can be asked for.
    """
    parts = assemble(None, settings)
    return _serve(
        parts,
        settings,
        lambda: load_sources(parts, sources, settings.engine_threads),
        lambda http: announce(parts.host, http),
    )


def _serve(parts: Parts, settings: ServeSettings, load: Callable[[], None], announce: Announce | None = None) -> int:
    table = AccessTable(settings, os.geteuid())
    _allow_files(settings.max_connections + FILES_BESIDES_CONNECTIONS)
    with Ending() as end:
        listeners = open_listeners(settings.socket, settings.socket_mode, settings.http_listen)
        rpc = None
        try:
            rpc = _grpc(parts, settings)
            load()
            if end.is_set():
                return 0
            if announce is not None and not any(served.active for served in parts.host):
                return 1  # started by hand on files of which none can be served; each was logged with its reason
            return _run(parts, settings, table, listeners, rpc, end, announce)
        finally:
            if rpc is not None:
                rpc.stop(0.0)
            parts.host.close()
            listeners.close()
            for observer in parts.observers:
                observer.close()


def _run(
    parts: Parts,
    settings: ServeSettings,
    table: AccessTable,
    listeners: Listeners,
    rpc: GrpcServer | None,
    end: Ending,
    announce: Announce | None,
) -> int:
    address = listeners.local
    budget = MemoryBudget(settings.client_memory_bytes)
    system = parts.system
    loop = Loop(
        listeners.sockets,
        parts.service,
        parts.router,
        lambda sock: table.grant(peer.peer_of(sock)) if sock.family == socket.AF_UNIX else table.http,
        threads=settings.threads,
        max_body_bytes=settings.max_body_bytes,
        max_connections=settings.max_connections,
        scheduler=parts.dataplane.scheduler,
        memory_of=lambda grant: None if grant.uid is None else ClientMemory(budget, system, grant.uid),
    )
    parts.residency.begin(loop.defer)
    loop.start()
    watchdog = selfcheck.Watchdog(lambda: not loop.stuck(STUCK_S) and selfcheck.answers(address))
    try:
        parts.protocol.is_ready = True
        if not selfcheck.answers(address):
            log.error("the server does not answer on its own socket %r", address)
            return 1
        if rpc is not None:
            rpc.start()
        if announce is not None:
            announce(listeners.http)
        for http in listeners.http:
            log.info("listening on http://%s too, for everyone on this machine (%s)", http, settings.http_access)
        notify.notify("READY=1")
        watchdog.start()
        end.wait()
        return 0
    finally:
        notify.notify("STOPPING=1")
        parts.protocol.is_ready = False
        watchdog.stop()
        parts.residency.end()
        parts.shadows.close()
        if rpc is not None:
            rpc.stop(STOP_GRACE_S)
        if not loop.stop(STOP_GRACE_S):
            log.error("requests were still running after %.0f s; they are cut off", STOP_GRACE_S)
            os._exit(1)  # a thread inside an engine cannot be ended in any other way


def _grpc(parts: Parts, settings: ServeSettings) -> GrpcServer | None:
    """The gRPC server, bound and not yet started. Its libraries are loaded only when it is wanted.  Raises: ConfigError, SocketError."""
    if settings.grpc_socket is None:
        return None
    try:
        from agent.serving.grpc.server import build
    except ImportError as error:
        raise ConfigError(
            f"gRPC needs a package that is not installed ({error}): pip install 'edge-inference-agent[grpc]'"
        ) from error
    return build(parts, settings)


def load_selections(parts: Parts, store: Store, threads: int) -> None:
    """Loads the active release of every selected model, or its previous one when that fails. Nothing here stops the process.
    What is over the memory budget is put out again, known from then on.
    """
    host = parts.host
    for name, selection in store.selections().items():
        if isinstance(selection, StoreError):
            log.error("model %r is not served: %s", name, selection)
            host.add(loading.failed(Source(name, 0, store.root, ""), str(selection)))
            continue
        _load_selection(parts, store, selection, threads)
        parts.residency.settle()


def _load_selection(parts: Parts, store: Store, selection: Selection, threads: int) -> None:
    reason = ""
    for choice in (selection.active, selection.previous):
        if choice is None:
            continue
        error = _load_choice(parts, store, selection.model, choice, threads)
        if error is None:
            served = parts.host.activate(selection.model, choice.version)
            if reason and served.active is not None:
                served.active.reason = f"serves in place of the active release: {reason}"
            return
        reason = reason or error


def _load_choice(parts: Parts, store: Store, model: str, choice: Choice, threads: int) -> str | None:
    """Why it could not be loaded; None when it is."""
    source = Source(model, choice.version, store.root, "", variant=choice.variant)
    try:
        source = loading.source_of(store.release(model, choice))
        parts.host.add(_first(parts, source, threads))
    except (StoreError, RuntimeFailure, MemoryError, OSError, ValueError) as error:
        text = f"cannot load model {model!r} version {choice.version}: {error}"
        log.error("%s", text)  # noqa: TRY400 - an expected failure with its reason; a trace would hide it
    except Exception as error:
        text = f"cannot load model {model!r} version {choice.version}: {type(error).__name__}: {error}"
        log.exception("%s: the runtime broke its contract", text)
    else:
        return None
    parts.host.add(loading.failed(source, text))
    return text


def load_sources(parts: Parts, sources: Iterable[Source], threads: int) -> None:
    """Loads named files and makes each active; one that cannot be loaded is listed with its reason."""
    host = parts.host
    for source in sources:
        parts.residency.settle(file_bytes(source))
        try:
            host.add(_first(parts, source, threads))
        except (RuntimeFailure, MemoryError, OSError) as error:
            log.error("cannot load model %r: %s", source.name, error)  # noqa: TRY400 - as above
            host.add(loading.failed(source, str(error)))
            continue
        host.activate(source.name, source.version)
        parts.residency.settle()


def _first(parts: Parts, source: Source, threads: int) -> Version:
    """Loaded without regard to the budget, which is settled when it is active.  Raises: as `loading.load`."""
    version = loading.load(source, threads=threads)
    parts.residency.watch(version)
    return version


def _allow_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
