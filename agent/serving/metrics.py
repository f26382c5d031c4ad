"""Prometheus text. The names are Triton's where it has one, so that existing dashboards and alerts work."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from agent.serving.access import Access
from agent.serving.answers import TEXT, Answer
from agent.serving.host import ModelHost, Version
from agent.serving.routes import Request, Route
from agent.serving.stats import BOUNDS_MS

COUNTERS: tuple[tuple[str, str, Callable[[Version], float]], ...] = (
    ("nv_inference_request_success", "Predictions answered", lambda v: v.stats.ok),
    ("nv_inference_count", "Inferences performed", lambda v: v.stats.ok),
    ("nv_inference_exec_count", "Runs of the engine", lambda v: v.stats.ok),
    ("nv_inference_request_duration_us", "Time from arrival to answer, all answered requests", lambda v: v.stats.total_s * 1e6),
    ("nv_inference_compute_infer_duration_us", "Time in the engine, all answered requests", lambda v: v.stats.run_s * 1e6),
)
FAILURES = (("REJECTED", "unavailable"), ("BACKEND", "run"), ("OTHER", "invalid"))


class Metrics:
    def __init__(self, host: ModelHost) -> None:
        self._host = host

    def routes(self) -> list[Route]:
        return [Route("GET", "/metrics", Access.OBSERVE, self.metrics)]

    def metrics(self, _request: Request) -> Answer:
        return Answer(("\n".join(self._lines()).encode() + b"\n",), content_type=TEXT)

    def _lines(self) -> Iterator[str]:
        versions = [v for served in self._host for _, v in sorted(served.versions.items())]
        for name, text, value in COUNTERS:
            yield from _head(name, text, "counter")
            yield from (f"{name}{{{_labels(v)}}} {_number(value(v))}" for v in versions)
        yield from _head("nv_inference_request_failure", "Requests answered with an error", "counter")
        for v in versions:
            for reason, key in FAILURES:
                yield f'nv_inference_request_failure{{{_labels(v)},reason="{reason}"}} {v.stats.failures[key]}'  # type: ignore[index]
        yield from _head("nv_model_load_duration_secs", "Time to load and warm up the model", "gauge")
        yield from (f"nv_model_load_duration_secs{{{_labels(v)}}} {_number(v.load_s)}" for v in versions)
        yield from _gauges(self._host)
        yield from _histograms(versions)


def _gauges(host: ModelHost) -> Iterator[str]:
    yield from _head("edge_model_memory_bytes", "Resident memory that loading the model took", "gauge")
    yield from (f"edge_model_memory_bytes{{{_labels(v)}}} {v.memory_bytes}" for s in host for v in s.versions.values())
    yield from _head("edge_model_active", "1 for the version that answers requests without a version", "gauge")
    yield from (f"edge_model_active{{{_labels(v)}}} {int(v is s.active)}" for s in host for v in s.versions.values())


def _histograms(versions: list[Version]) -> Iterator[str]:
    name = "edge_inference_request_duration_seconds"
    yield from _head(name, "Time from arrival to answer of answered requests", "histogram")
    for version in versions:
        labels, total = _labels(version), 0
        counts = list(version.stats.counts)
        for bound, count in zip(BOUNDS_MS, counts, strict=False):
            total += count
            yield f'{name}_bucket{{{labels},le="{bound / 1e3:g}"}} {total}'
        total += counts[-1]
        yield f'{name}_bucket{{{labels},le="+Inf"}} {total}'
        yield f"{name}_sum{{{labels}}} {_number(version.stats.total_s)}"
        yield f"{name}_count{{{labels}}} {total}"


def _head(name: str, text: str, kind: str) -> tuple[str, str]:
    return f"# HELP {name} {text}", f"# TYPE {name} {kind}"


def _labels(version: Version) -> str:
    name = version.name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'model="{name}",version="{version.number}"'


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.9g}"
