"""Counts of one model version. Plain numbers: under the interpreter's lock an increment is one step.

A request's time has four phases, which add up to it: queue (from its arrival until a thread works for it, and while it waits for its
run), compute_input (reading it into arrays, and joining a batch), compute_infer (the engine's run) and compute_output (writing the
answer). A batch is one execution of as many inferences as it has rows; each request in it counts the whole run as its own.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from typing import Any, Literal, NamedTuple

BOUNDS_MS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0)
_BOUNDS_S = tuple(bound / 1e3 for bound in BOUNDS_MS)

Failure = Literal["invalid", "run", "unavailable"]


class BatchStats(NamedTuple):
    """All executions of one batch size together."""

    size: int
    executions: int
    input_s: float
    run_s: float
    output_s: float


class Stats:
    """`succeeded` and `failed` are called once per request; readers may see a request half counted, never a wrong total later."""

    __slots__ = (
        "_batches", "_inputs", "_outputs", "_queues", "_runs", "cancelled", "counts", "executions", "failures", "inferences", "input_s",
        "last_s", "ok", "output_s", "run_s", "total_s",
    )  # fmt: skip

    def __init__(self) -> None:
        self.ok = 0
        self.failures: dict[Failure, int] = {"invalid": 0, "run": 0, "unavailable": 0}
        self.cancelled = 0  # whose callers went while they waited; neither answered nor failed
        self.counts = [0] * (len(BOUNDS_MS) + 1)
        self._queues, self._inputs, self._runs, self._outputs = ([0] * len(self.counts) for _ in range(4))
        self.total_s = 0.0
        self.input_s = 0.0
        self.run_s = 0.0
        self.output_s = 0.0
        self.executions = 0
        self.inferences = 0
        self.last_s = 0.0
        self._batches: dict[int, list[float]] = {}  # by size, of a version whose requests are gathered

    def succeeded(self, arrived_s: float, input_s: float, run_s: float, output_s: float, now_s: float) -> None:
        """A request is answered. `arrived_s` and `now_s`, when its answer was ready, are perf_counters."""
        latency_s = now_s - arrived_s
        self.ok += 1
        self.counts[bisect_left(_BOUNDS_S, latency_s)] += 1
        self._queues[bisect_left(_BOUNDS_S, latency_s - input_s - run_s - output_s)] += 1
        self._inputs[bisect_left(_BOUNDS_S, input_s)] += 1
        self._runs[bisect_left(_BOUNDS_S, run_s)] += 1
        self._outputs[bisect_left(_BOUNDS_S, output_s)] += 1
        self.total_s += latency_s
        self.input_s += input_s
        self.run_s += run_s
        self.output_s += output_s
        self.last_s = now_s

    def executed(self, rows: int = 1) -> None:
        """The engine ran, and worked."""
        self.executions += 1
        self.inferences += rows

    def batched(self, rows: int, input_s: float, run_s: float, output_s: float) -> None:
        """What an execution of a version took whose requests are gathered, in addition to `executed`."""
        batch = self._batches.setdefault(rows, [0, 0.0, 0.0, 0.0])
        batch[0] += 1
        batch[1] += input_s
        batch[2] += run_s
        batch[3] += output_s

    @property
    def phases(self) -> dict[str, tuple[float, list[int]]]:
        """Seconds in all, and counts as in `counts`, of each phase and of the whole."""
        return {
            "request": (self.total_s, self.counts),
            "queue": (self.queue_s, self._queues),
            "compute_input": (self.input_s, self._inputs),
            "compute_infer": (self.run_s, self._runs),
            "compute_output": (self.output_s, self._outputs),
        }

    @property
    def queue_s(self) -> float:
        return max(0.0, self.total_s - self.input_s - self.run_s - self.output_s)

    @property
    def batches(self) -> list[BatchStats]:
        """By size. A version whose requests are not gathered has executions of size 1 only."""
        if not self._batches:
            return [BatchStats(1, self.executions, self.input_s, self.run_s, self.output_s)] if self.executions else []
        return [BatchStats(size, int(b[0]), b[1], b[2], b[3]) for size, b in sorted(self._batches.copy().items())]

    def failed(self, why: Failure) -> None:
        self.failures[why] += 1

    @property
    def last_unix_s(self) -> float:
        """When the last request was answered; 0 when none was."""
        return time.time() - (time.perf_counter() - self.last_s) if self.ok else 0.0

    @property
    def requests(self) -> int:
        return self.ok + sum(self.failures.values())

    def document(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "ok": self.ok,
            "failed": dict(self.failures),
            "latency": {
                "bounds_ms": BOUNDS_MS,
                "counts": list(self.counts),
                "sum_ms": self.total_s * 1e3,
                "count": sum(self.counts),
            },
        }
