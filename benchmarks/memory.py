"""The image through memory that client and server share, by the Python SDK, beside the engine called in the same process."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime

from agent.client import Client
from benchmarks import processes
from benchmarks.models import Subject

ROUNDS = 8  # the two take turns this often in a repeat: a slow moment of the machine meets both


def latency(folder: Path, subject: Subject, repeats: int, seconds: float) -> dict[str, list[float]]:
    """p50 in µs of both, and their ratio, for each repeat."""
    server = folder / "memory.sock"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(subject.path, options, providers=["CPUExecutionProvider"])
    found: dict[str, list[float]] = {"shared_p50_us": [], "engine_p50_us": [], "ratios": []}
    with processes.running(processes.agent("run", subject.path, "--socket", server), server), Client(server) as client:
        feeds = {"x": subject.array}
        for _ in range(repeats):
            shared: list[float] = []
            engine: list[float] = []
            for _ in range(ROUNDS):
                shared += _times(lambda: client.infer(subject.name, feeds), seconds / ROUNDS)
                engine += _times(lambda: session.run(["y"], feeds), seconds / ROUNDS)
            found["shared_p50_us"].append(statistics.median(shared) * 1e6)
            found["engine_p50_us"].append(statistics.median(engine) * 1e6)
            found["ratios"].append(found["shared_p50_us"][-1] / found["engine_p50_us"][-1])
    return found


def _times(call: Callable[[], object], seconds: float) -> list[float]:
    call()
    times = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        call()
        times.append(time.perf_counter() - began)
    return times
