"""Traces in OpenTelemetry's format: a span per request, a child of its caller's. Imported only when `serve.traces` is set.

Spans go to a collector over OTLP/HTTP, at an http address or, where the server has no network, at a Unix socket.
"""

from __future__ import annotations

import socket
import time
from typing import Any

import requests
import requests.adapters
import urllib3
import urllib3.connection
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from agent.serving.api.descriptions import agent_version
from agent.serving.telemetry.observing import Seen

UNIX = "unix:"
EXPORT_EVERY_MS = 2000
TIMEOUT_S = 5


class Tracing:
    """`target` is the collector's traces address (http://127.0.0.1:4318/v1/traces) or unix:/path of its socket; `ratio` of the
    requests that come without a caller's decision are traced.
    """

    def __init__(self, target: str, ratio: float) -> None:
        session = requests.Session()
        session.trust_env = False  # no proxy, whatever the environment says
        address = target
        if target.startswith(UNIX):
            address = "http://collector/v1/traces"
            session.mount("http://collector/", _UnixAdapter(target.removeprefix(UNIX)))
        resource = Resource(
            {"service.name": "edge-agent", "service.version": agent_version(), "host.name": socket.gethostname()}
        )
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(ratio)), resource=resource, shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(endpoint=address, session=session, timeout=TIMEOUT_S, headers={})
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_EVERY_MS))
        self._tracer = self._provider.get_tracer("edge-agent")
        self._context = TraceContextTextMapPropagator()
        self._to_unix_ns = time.time_ns() - time.perf_counter_ns()

    def see(self, seen: Seen) -> None:
        request, match = seen.request, seen.request.match
        parent = self._context.extract({"traceparent": request.trace.decode("ascii", "replace")}) if request.trace else None
        span = self._tracer.start_span(
            f"{seen.route.rpartition('/')[2]} {match.model}" if match.model else seen.route or "unknown route",
            context=parent, kind=SpanKind.SERVER, start_time=self._unix_ns(request.arrived_s),
            attributes={
                "http.route": seen.route.partition(" ")[2],
                "http.response.status_code": seen.answer.status,
                "http.request.body.size": seen.bytes_in,
                "http.response.body.size": seen.bytes_out,
                "enduser.id": seen.who,
                **{f"model.{name}": value for name, value in (("name", match.model), ("version", match.version)) if value},
                **({"request.id": seen.id} if seen.id else {}),
            },
        )  # fmt: skip
        if seen.answer.status >= 500:
            span.set_status(StatusCode.ERROR)
        span.end(self._unix_ns(seen.answered_s))

    def close(self) -> None:
        self._provider.shutdown()

    def _unix_ns(self, moment_s: float) -> int:
        return self._to_unix_ns + int(moment_s * 1e9)


class _UnixConnection(urllib3.connection.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("collector", timeout=TIMEOUT_S)
        self._path = path

    def _new_conn(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(TIMEOUT_S)
        sock.connect(self._path)
        return sock


class _UnixPool(urllib3.HTTPConnectionPool):
    def __init__(self, path: str) -> None:
        super().__init__("collector")
        self._path = path

    def _new_conn(self) -> Any:
        return _UnixConnection(self._path)


class _UnixAdapter(requests.adapters.HTTPAdapter):
    """Every address it is mounted for is at one Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._pool = _UnixPool(path)

    def get_connection_with_tls_context(self, *_: Any, **__: Any) -> Any:
        return self._pool
