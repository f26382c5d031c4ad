"""Prometheus text. The names are Triton's where it has one, so that existing dashboards and alerts work."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from agent.serving.access import Access
from agent.serving.answers import TEXT, Answer
from agent.serving.api.descriptions import agent_version
from agent.serving.candidates.shadowing import Shadow, Shadows
from agent.serving.models.host import ModelHost, Served
from agent.serving.models.room import Room
from agent.serving.models.stats import BOUNDS_MS
from agent.serving.models.version import Version
from agent.serving.routes import Request, Route

Row = tuple[str, str, Callable[[Version], float]]

COUNTERS: tuple[Row, ...] = (
    ("nv_inference_request_success", "Predictions answered", lambda v: v.stats.ok),
    ("nv_inference_count", "Rows that the engine worked on", lambda v: v.stats.inferences),
    ("nv_inference_exec_count", "Runs of the engine", lambda v: v.stats.executions),
    ("nv_inference_request_duration_us", "Time from arrival to answer, all answered requests", lambda v: v.stats.total_s * 1e6),
    ("nv_inference_queue_duration_us", "Of it, waiting", lambda v: v.stats.queue_s * 1e6),
    (
        "nv_inference_compute_input_duration_us",
        "Of it, reading the request and gathering a batch",
        lambda v: v.stats.input_s * 1e6,
    ),
    ("nv_inference_compute_infer_duration_us", "Of it, in the engine", lambda v: v.stats.run_s * 1e6),
    ("nv_inference_compute_output_duration_us", "Of it, writing the answer", lambda v: v.stats.output_s * 1e6),
    ("edge_model_evictions_total", "Times that it was unloaded to make room for others", lambda v: v.history.evictions),
    (
        "edge_model_restarts_total",
        "Times that the process of an isolated model was started again",
        lambda v: v.history.restarts,
    ),
    ("edge_model_reloads_total", "Times that it was loaded again because it was asked for", lambda v: v.history.reloads),
)
GAUGES: tuple[Row, ...] = (
    ("nv_inference_pending_request_count", "Predictions that wait for their run", lambda v: v.lane.waiting),
    ("nv_model_load_duration_secs", "Time to load and warm up the model", lambda v: v.loaded.load_s),
    (
        "edge_model_memory_bytes",
        "Resident memory that loading the model took",
        lambda v: v.loaded.now_bytes,
    ),
    ("edge_model_ready", "1 for a version that can answer", lambda v: int(v.state == "READY")),
)
FAILURES = (("REJECTED", "unavailable"), ("BACKEND", "run"), ("OTHER", "invalid"))
CHANGES: tuple[tuple[str, str, Callable[[Served], int]], ...] = (
    ("edge_model_activations_total", "Switches to another version", lambda served: served.activations),
    (
        "edge_model_rollbacks_total",
        "Of these, back to an earlier one because of what was seen",
        lambda served: served.rollbacks,
    ),
)
SHADOWS: tuple[tuple[str, str, str, Callable[[Shadow], float]], ...] = (
    ("edge_shadow_running", "gauge", "1 while copies of requests are taken for this version", lambda s: int(s.ended is None)),
    ("edge_shadow_samples_total", "counter", "Copied requests that it answered", lambda s: s.comparison.samples),
    ("edge_shadow_agreed_total", "counter", "Of these, as the active version did", lambda s: s.comparison.agreed),
    ("edge_shadow_errors_total", "counter", "Copied requests that it failed", lambda s: sum(s.errors.values())),
    ("edge_shadow_dropped_total", "counter", "Requests that could not be copied", lambda s: s.dropped),
    ("edge_shadow_rows_total", "counter", "Rows of outputs that look like scores of classes", lambda s: s.comparison.rows),
    ("edge_shadow_top1_flips_total", "counter", "Of these, with another best class", lambda s: s.comparison.flips),
    ("edge_shadow_latency_ratio", "gauge", "Median of its run's time over the live one's", lambda s: s.comparison.median_ratio),
)
STARTED_S = time.time()


class Metrics:
    def __init__(self, host: ModelHost, room: Room, shadows: Shadows) -> None:
        self._host = host
        self._room = room
        self._shadows = shadows

    def routes(self) -> list[Route]:
        return [Route("GET", "/metrics", Access.OBSERVE, self.metrics)]

    def metrics(self, _request: Request) -> Answer:
        return Answer(("\n".join(self._lines()).encode() + b"\n",), content_type=TEXT)

    def _lines(self) -> Iterator[str]:
        host = list(self._host)
        versions = [v for served in host for _, v in sorted(served.versions.items())]
        for kind, rows in (("counter", COUNTERS), ("gauge", GAUGES)):
            for name, text, value in rows:
                yield from _head(name, text, kind)
                yield from (f"{name}{{{_labels(v)}}} {_number(value(v))}" for v in versions)
        yield from _failures(versions)
        yield from _batches(versions)
        yield from _models(host, versions)
        yield from _beside(host, list(self._shadows))
        for phase in versions[0].stats.phases if versions else ():
            yield from _histogram(phase, versions)
        yield from _budget(self._room)
        yield from _process()


def _failures(versions: Iterable[Version]) -> Iterator[str]:
    name = "nv_inference_request_failure"
    yield from _head(name, "Requests answered with an error, and those whose caller left", "counter")
    for version in versions:
        for reason, key in FAILURES:
            yield f'{name}{{{_labels(version)},reason="{reason}"}} {version.stats.failures[key]}'  # type: ignore[index]
        yield f'{name}{{{_labels(version)},reason="CANCELED"}} {version.stats.cancelled}'


def _batches(versions: Iterable[Version]) -> Iterator[str]:
    name = "edge_inference_batches_total"
    yield from _head(name, "Runs of the engine by the number of rows in them", "counter")
    for version in versions:
        for batch in version.stats.batches:
            yield f'{name}{{{_labels(version)},batch_size="{batch.size}"}} {batch.executions}'


def _models(host: Iterable[Served], versions: Iterable[Version]) -> Iterator[str]:
    yield from _head("edge_model_active", "1 for the version that answers requests without a version", "gauge")
    yield from (f"edge_model_active{{{_labels(v)}}} {int(v is s.active)}" for s in host for v in s.versions.values())
    yield from _head("edge_model_info", "What a version is and what it really runs on", "gauge")
    for version in versions:
        placement = version.placement
        said = {
            "variant": version.variant,
            "runtime": version.runtime,
            "requested": placement.requested,
            "provider": placement.actual,
            "fallback": placement.fallback or "",
        }
        labels = ",".join(f'{key}="{_escaped(value)}"' for key, value in said.items())
        yield f"edge_model_info{{{_labels(version)},{labels}}} 1"
    for name, text, value in CHANGES:
        yield from _head(name, f"{text}, since the model came into memory", "counter")
        yield from (f'{name}{{model="{_escaped(served.name)}"}} {value(served)}' for served in host)


def _beside(host: Iterable[Served], shadows: Iterable[Shadow]) -> Iterator[str]:
    """Candidates: their share of the requests, and what came of copies of them."""
    yield from _head(
        "edge_canary_share", "Share of a model's requests that this version answers beside the active one", "gauge"
    )
    for canary in [c for s in host if (c := s.canary) is not None]:
        yield f"edge_canary_share{{{_labels(canary.candidate)}}} {_number(canary.share)}"
    for name, kind, text, value in SHADOWS:
        yield from _head(name, f"{text}, since its shadow began", kind)
        yield from (f"{name}{{{_labels(shadow.candidate)}}} {_number(value(shadow))}" for shadow in shadows)


def _histogram(phase: str, versions: Iterable[Version]) -> Iterator[str]:
    name = f"edge_inference_{phase}_duration_seconds"
    what = "Time from arrival to answer" if phase == "request" else f"Time in the phase {phase}"
    yield from _head(name, f"{what} of answered requests", "histogram")
    for version in versions:
        labels, total = _labels(version), 0
        seconds, counts = version.stats.phases[phase]
        counts = list(counts)
        for bound, count in zip(BOUNDS_MS, counts, strict=False):
            total += count
            yield f'{name}_bucket{{{labels},le="{bound / 1e3:g}"}} {total}'
        total += counts[-1]
        yield f'{name}_bucket{{{labels},le="+Inf"}} {total}'
        yield f"{name}_sum{{{labels}}} {_number(seconds)}"
        yield f"{name}_count{{{labels}}} {total}"


def _budget(room: Room) -> Iterator[str]:
    for name, text, value in (
        ("edge_memory_budget_bytes", "What models may take together; 0 is no bound", room.budget_bytes),
        ("edge_memory_used_bytes", "What those in memory count with", room.used_bytes),
    ):
        yield from _head(name, text, "gauge")
        yield f"{name} {value}"


def _process() -> Iterator[str]:
    """What the process and its machine use; the process's names are those of Prometheus's own libraries."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    statm = Path("/proc/self/statm").read_text().split()
    memory = _machine_memory()
    gauges = (
        ("process_resident_memory_bytes", "Memory of the process", int(statm[1]) * resource.getpagesize()),
        ("process_virtual_memory_bytes", "Address space of the process", int(statm[0]) * resource.getpagesize()),
        ("process_start_time_seconds", "When the process began, as Unix time: it changes with a restart", STARTED_S),
        ("process_open_fds", "Open files and connections", len(os.listdir("/proc/self/fd"))),  # noqa: PTH208 - names are enough
        ("nv_cpu_memory_total_bytes", "Memory of the machine", memory["MemTotal"]),
        ("nv_cpu_memory_used_bytes", "Of it, in use", memory["MemTotal"] - memory["MemAvailable"]),
    )
    yield from _head("process_cpu_seconds_total", "CPU time of the process", "counter")
    yield f"process_cpu_seconds_total {_number(used.ru_utime + used.ru_stime)}"
    for name, text, value in gauges:
        yield from _head(name, text, "gauge")
        yield f"{name} {_number(value)}"
    yield from _head("edge_agent_info", "The version of the agent", "gauge")
    yield f'edge_agent_info{{version="{_escaped(agent_version())}"}} 1'


def _machine_memory() -> dict[str, int]:
    found = {"MemTotal": 0, "MemAvailable": 0}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in found:
            found[name] = int(rest.split()[0]) * 1024
    return found


def _head(name: str, text: str, kind: str) -> tuple[str, str]:
    return f"# HELP {name} {text}", f"# TYPE {name} {kind}"


def _labels(version: Version) -> str:
    return f'model="{_escaped(version.name)}",version="{version.number}"'


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return repr(value)
