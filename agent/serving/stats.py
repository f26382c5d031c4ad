"""Counts of one model version. Plain integers: under the interpreter's lock an increment is one step."""

from __future__ import annotations

import time
from bisect import bisect_left
from typing import Any, Literal

BOUNDS_MS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0)
_BOUNDS_S = tuple(bound / 1e3 for bound in BOUNDS_MS)

Failure = Literal["invalid", "run", "unavailable"]


class Stats:
    """`succeeded` and `failed` are called once per request; readers may see a request half counted, never a wrong total later."""

    __slots__ = ("counts", "failures", "last_s", "ok", "run_s", "total_s")

    def __init__(self) -> None:
        self.ok = 0
        self.failures: dict[Failure, int] = {"invalid": 0, "run": 0, "unavailable": 0}
        self.counts = [0] * (len(BOUNDS_MS) + 1)
        self.total_s = 0.0
        self.run_s = 0.0
        self.last_s = 0.0

    def succeeded(self, latency_s: float, run_s: float, now_s: float) -> None:
        """`latency_s` from the arrival of the request to the answer being ready, `run_s` of it in the engine; `now_s` a perf_counter."""
        self.ok += 1
        self.counts[bisect_left(_BOUNDS_S, latency_s)] += 1
        self.total_s += latency_s
        self.run_s += run_s
        self.last_s = now_s

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
