"""The serving process, wired together. The only place that knows all parts.

The order of a start: bind the socket (so that a second server fails at once, and clients wait instead of being refused), load
the models (`starting`), let the threads run, ask the socket once as a client would, tell systemd READY. The order of the end:
tell systemd STOPPING, answer what was asked, close the models, remove the socket.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import resource
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agent.common import systemd
from agent.config import AgentConfig, ConfigError, ServeSettings
from agent.diary import Diary
from agent.host import peer
from agent.host.signals import Ending
from agent.host.throttle import Throttle
from agent.serving import selfcheck
from agent.serving.access import AccessTable
from agent.serving.api import memoryroutes
from agent.serving.api.changes import Changes
from agent.serving.api.control import Control
from agent.serving.api.extensions import Extensions, Repository
from agent.serving.api.metrics import Metrics
from agent.serving.api.pictures import Pictures
from agent.serving.api.protocol import Protocol
from agent.serving.api.settings import LogSettings, TraceSettings
from agent.serving.api.tfserving import TensorFlowServing
from agent.serving.buffers import LARGE_BODIES_AT_ONCE, BufferPool
from agent.serving.candidates.shadowing import Shadows
from agent.serving.dataplane import Dataplane
from agent.serving.models.host import ModelHost
from agent.serving.models.loading import Limits, Source
from agent.serving.models.loading_note import LoadingNote
from agent.serving.models.residency import Residency
from agent.serving.models.swapping import Swapper
from agent.serving.routes import Route, Router
from agent.serving.scheduling.scheduler import Scheduler
from agent.serving.scheduling.threads import busy_threads
from agent.serving.service import Service
from agent.serving.shared.memory import ClientMemory, MemoryBudget
from agent.serving.shared.systemmemory import SystemMemory
from agent.serving.start import FilesStart, Start, StoreStart
from agent.serving.telemetry.observing import ObservedService, Observer
from agent.serving.transport.loop import Loop
from agent.serving.transport.sockets import Listeners, SocketError, open_listeners
from agent.store import Store

if TYPE_CHECKING:
    from agent.serving.grpc.server import GrpcServer

log = logging.getLogger(__name__)

STOP_GRACE_S = 15.0  # systemd kills after 90 s; clients have given up before
END_LIMIT_S = 10.0  # besides; then the process ends with the traces of its threads, which may hang in engines
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
    pool: BufferPool  # of requests' memory, whatever transport brings them

    @property
    def routes(self) -> Sequence[Route]:
        return self.router.routes


def assemble(store: Store | None, settings: ServeSettings, notes: Path | None = None) -> Parts:
    """`notes` is the folder where it stands which model is being loaded."""
    host = ModelHost(
        max_sequences=settings.max_sequences, sequence_idle_s=settings.sequence_idle_s, sketches=settings.output_sketches
    )
    scheduler = Scheduler(busy_threads(settings.threads), limit=settings.max_queue_size, away_s=settings.reload_timeout_s)
    dataplane = Dataplane(host, scheduler)
    residency = Residency(
        host,
        scheduler,
        dataplane,
        engine_threads=settings.engine_threads,
        budget_bytes=settings.memory_budget_bytes,
        pinned=settings.pinned,
        min_residency_s=settings.min_residency_s,
        limits=limits_of(settings),
        note=LoadingNote(notes),
    )
    dataplane.summon = residency.summon
    protocol = Protocol(host, dataplane, shared_memory=settings.shared_memory != "off")
    shadows = Shadows(host, scheduler, Throttle(settings.shadow_max_load, settings.shadow_max_celsius))
    changes = Changes(host, store, residency, Swapper(host, scheduler, residency))
    control = Control(host, residency, changes, shadows)
    repository, logs, traces = (
        Repository(changes),
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
            *Metrics(host, residency.room, shadows).routes(),
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
        host, dataplane, residency, shadows, protocol, control, repository, logs, traces, system, router, service, observers,
        BufferPool(LARGE_BODIES_AT_ONCE * settings.max_body_bytes),
    )  # fmt: skip


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

    Raises: StoreError, ConfigError, SocketError when it cannot start at all. A model that cannot be loaded does not stop the
    others.
    """
    store = Store(config.store)
    store.check_format(may_be_missing=True)  # at first boot `serve` may be earlier than `sync`
    parts = assemble(store, config.serve, config.diary_folder)
    diary, instance = Diary(config.diary_folder), parts.control.instance
    start = StoreStart(
        parts.host,
        parts.residency,
        store,
        parts.residency.note,
        threads=config.serve.engine_threads,
        limits=limits_of(config.serve),
        before=lambda: diary.begin(instance),  # a second server has failed at the socket
    )
    return _serve(parts, config.serve, start, ended=lambda: diary.end(instance))


def serve_files(sources: Iterable[Source], settings: ServeSettings, announce: Callable[[ModelHost, list[str]], None]) -> int:
    """Serves the given files until SIGTERM or Ctrl-C; `announce` is called with the models and the loopback addresses when
    predictions can be asked for.
    """
    parts = assemble(None, settings)
    start = FilesStart(parts.host, parts.residency, sources, threads=settings.engine_threads, limits=limits_of(settings))
    return _serve(parts, settings, start, lambda http: announce(parts.host, http))


def limits_of(settings: ServeSettings) -> Limits:
    return Limits(load_s=settings.load_timeout_s, run_s=settings.run_timeout_s)


def _serve(
    parts: Parts,
    settings: ServeSettings,
    start: Start,
    announce: Announce | None = None,
    ended: Callable[[], None] = lambda: None,
) -> int:
    """`ended` is called last, and only when all ended in order."""
    table = AccessTable(settings, os.geteuid())
    _allow_files(settings.max_connections + FILES_BESIDES_CONNECTIONS)
    idle, refused = True, None
    with Ending() as end:
        listeners = open_listeners(settings.socket, settings.socket_mode, settings.http_listen)
        rpc = None
        try:
            start.begin(
                [listener.fileno() for listener in listeners.sockets]
            )  # before there are threads: it makes copies of this process
            rpc = _grpc(parts, settings)
            status = (
                _run(parts, settings, table, listeners, rpc, end, announce)
                if start.wait(end) and not end.is_set()
                else int(not end.is_set())
            )
        except (ConfigError, SocketError) as error:
            refused = error
            raise
        finally:
            faulthandler.dump_traceback_later(END_LIMIT_S, exit=True)  # whatever an engine does now, and whatever lock it holds
            idle = start.end()
            if rpc is not None:
                rpc.stop(0.0)
            parts.host.close()
            listeners.close()
            for observer in parts.observers:
                observer.close()
            faulthandler.cancel_dump_traceback_later()
            if (
                refused is not None and not idle
            ):  # else the interpreter would end under a thread that is inside an engine: SIGABRT
                log.error("%s", refused)
                os._exit(1)
    if status == 0:
        ended()  # what an engine does to the process while it is closed has been done
    if not idle:
        log.warning("a model was still being loaded; that is cut off")
        os._exit(status)  # a thread inside an engine cannot be ended in any other way
    return status


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
        pool=parts.pool,
        memory_of=lambda grant: None if grant.uid is None else ClientMemory(budget, system, grant.uid),
    )
    parts.residency.begin(loop.defer)
    loop.start()
    watchdog = selfcheck.Watchdog(
        lambda: not loop.stuck(STUCK_S) and not parts.residency.is_overdue() and selfcheck.answers(address)
    )
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
        systemd.notify("READY=1")
        watchdog.start()
        end.wait()
        return 0
    finally:
        faulthandler.dump_traceback_later(STOP_GRACE_S + END_LIMIT_S, exit=True)
        systemd.notify("STOPPING=1")
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
    """The gRPC server, bound and not yet started. Its libraries are loaded only when it is wanted.  Raises: ConfigError,
    SocketError.
    """
    if settings.grpc_socket is None:
        return None
    try:
        from agent.serving.grpc.server import build
    except ImportError as error:
        raise ConfigError(
            f"gRPC needs a package that is not installed ({error}): pip install 'edge-inference-agent[grpc]'"
        ) from error
    return build(parts, settings)


def _allow_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
