"""Counts of one model version. A request leaves only its four times here; they are added up when somebody asks, or when many
have come together. Adding one number is one step under the interpreter's lock.

A request's time has four phases, which add up to it: queue (from its arrival until a thread works for it, and while it waits
for its run), compute_input (reading it into arrays, and joining a batch), compute_infer (the engine's run) and compute_output
(writing the answer). A batch is one execution of as many inferences as it has rows; each request in it counts the whole run as
its own.
"""

from __future__ import annotations

import secrets
import threading
import time
from typing import Any, Literal, NamedTuple

import numpy as np

from agent.contract.telemetry import BINS_PER_OCTAVE, LAST_BIN

BOUNDS_MS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0)
_BOUNDS_S = np.array(BOUNDS_MS) / 1e3
_BINS = len(BOUNDS_MS) + 1
_TIMES = 4  # of one request: the whole, input, run, output
_ROWS = _TIMES + 1  # and the queue, which is what is left
_OFFSETS = np.arange(_ROWS) * _BINS
FRESH_REQUESTS = 512  # adding up so many takes some 50 µs, once in 512 requests

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
        "_batches", "_counts", "_fine", "_fresh", "_lock", "_sums_s", "begun", "cancelled", "executions", "failures", "inferences", "last_s",
    )  # fmt: skip

    def __init__(self) -> None:
        self.failures: dict[Failure, int] = {"invalid": 0, "run": 0, "unavailable": 0}
        self.cancelled = 0  # whose callers went while they waited; neither answered nor failed
        self.executions = 0
        self.inferences = 0
        self.last_s = 0.0
        self._fresh: list[float] = []  # times of requests that are not added up yet
        self._lock = threading.Lock()  # for adding them up
        self._sums_s = np.zeros(_ROWS)
        self._counts = np.zeros(_ROWS * _BINS, np.int64)
        self._fine = np.zeros(LAST_BIN + 1, np.int64)  # of the whole, in the bins of telemetry
        self.begun = secrets.token_hex(4)  # of whoever reads them twice: other counts have another word
        self._batches: dict[int, list[float]] = {}  # by size, of a version whose requests are gathered

    def succeeded(self, arrived_s: float, input_s: float, run_s: float, output_s: float, now_s: float) -> None:
        """A request is answered. `arrived_s` and `now_s`, when its answer was ready, are perf_counters."""
        fresh = self._fresh
        fresh += (now_s - arrived_s, input_s, run_s, output_s)  # one step: no other thread's times come between
        self.last_s = now_s
        if len(fresh) >= FRESH_REQUESTS * _TIMES:
            self._add_up()

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

    def _add_up(self) -> None:
        with self._lock:
            taken = self._fresh[:]
            del self._fresh[: len(taken)]  # what came since stays
            if not taken:
                return
            times = np.empty((len(taken) // _TIMES, _ROWS))
            times[:, :_TIMES] = np.array(taken).reshape(-1, _TIMES)
            times[:, _TIMES] = times[:, 0] - times[:, 1:_TIMES].sum(1)
            bins = np.searchsorted(_BOUNDS_S, times) + _OFFSETS
            self._counts += np.bincount(bins.ravel(), minlength=len(self._counts))
            self._sums_s += times.sum(0)
            octaves = np.log2(np.maximum(times[:, 0] * 1e6, 1.0))
            fine = np.minimum((octaves * BINS_PER_OCTAVE).astype(np.int64), LAST_BIN)
            self._fine += np.bincount(fine, minlength=len(self._fine))

    def _row(self, row: int) -> tuple[float, list[int]]:
        self._add_up()
        counts: list[int] = self._counts[row * _BINS : (row + 1) * _BINS].tolist()
        return max(0.0, float(self._sums_s[row])), counts

    @property
    def phases(self) -> dict[str, tuple[float, list[int]]]:
        """Seconds in all, and how many requests lie between BOUNDS_MS, of each phase and of the whole."""
        return {
            "request": self._row(0),
            "queue": self._row(4),
            "compute_input": self._row(1),
            "compute_infer": self._row(2),
            "compute_output": self._row(3),
        }

    @property
    def ok(self) -> int:
        return sum(self._row(0)[1])

    @property
    def total_s(self) -> float:
        return self._row(0)[0]

    @property
    def input_s(self) -> float:
        return self._row(1)[0]

    @property
    def run_s(self) -> float:
        return self._row(2)[0]

    @property
    def output_s(self) -> float:
        return self._row(3)[0]

    @property
    def queue_s(self) -> float:
        return self._row(4)[0]

    @property
    def batches(self) -> list[BatchStats]:
        """By size. A version whose requests are not gathered has executions of size 1 only."""
        if not self._batches:
            return [BatchStats(1, self.executions, self.input_s, self.run_s, self.output_s)] if self.executions else []
        return [BatchStats(size, int(b[0]), b[1], b[2], b[3]) for size, b in sorted(self._batches.copy().items())]

    def counts(self) -> dict[str, object]:
        """As fields of telemetry's `Figures`."""
        self._add_up()
        with self._lock:
            found = np.flatnonzero(self._fine).tolist()
            latency = {at: int(self._fine[at]) for at in found}
        failures: dict[str, object] = {why: self.failures[why] for why in self.failures}
        return {"ok": sum(latency.values()), **failures, "latency": latency}

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
        total_s, counts = self._row(0)
        ok = sum(counts)
        return {
            "requests": ok + sum(self.failures.values()),
            "ok": ok,
            "failed": dict(self.failures),
            "latency": {
                "bounds_ms": BOUNDS_MS,
                "counts": counts,
                "sum_ms": total_s * 1e3,
                "count": sum(counts),
            },
        }
