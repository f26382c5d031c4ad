"""What counting for telemetry costs a prediction, and a processor at 1 000 predictions a second: on and off in turns, in one run.

python -m benchmarks.telemetry [--repeats N] [--seconds S]

Beside the two servers, the steps alone: the comparison that each prediction pays, a look at an answer, and adding up latencies. Those hardly
depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
import psutil

from agent.client import Client
from agent.serving.models.outputs import EVERY_S, OutputSketch
from agent.serving.models.stats import FRESH_REQUESTS, Stats
from agent.store import Choice, Selection, Store
from benchmarks import models, processes
from benchmarks.calm import Calm
from benchmarks.stores import release
from runtimes.contract import TensorSpec

RATE = 1000
SCORES = TensorSpec("y", "FP32", (1, 10))


class Found(msgspec.Struct, frozen=True):
    """Of each repeat, with sketches off and on."""

    p50_us: dict[str, list[float]]
    cpu: dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.telemetry", description=__doc__)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edge-telemetry-") as name:
        found = measured(Path(name), options.repeats, options.seconds, Calm())
    ratios = [on / off for on, off in zip(found.p50_us["on"], found.p50_us["off"], strict=True)]
    print(
        f"tiny model, one client: p50 {_of(found.p50_us['off'])} µs without, {_of(found.p50_us['on'])} µs with sketches; ratio {_of(ratios)}"
    )
    for state in ("off", "on"):
        print(f"at {RATE} predictions a second, {state}: {_of([100 * one for one in found.cpu[state]])} % of a core")
    print(f"the comparison that each prediction pays: {compared_ns():.0f} ns")
    look, add = look_us(), add_up_us()
    print(
        f"a look at an answer: {look:.0f} µs, {1 / EVERY_S:.0f} times a second at most: {look / EVERY_S / 1e4:.3f} % of a core"
    )
    print(
        f"adding up {FRESH_REQUESTS} latencies, all histograms: {add:.0f} µs; at {RATE} a second {add * RATE / FRESH_REQUESTS / 1e4:.3f} % of a core"
    )


def measured(folder: Path, repeats: int, seconds: float, calm: Calm) -> Found:
    found = Found({"off": [], "on": []}, {"off": [], "on": []})
    load = processes.load_program(folder)
    request = folder / "tiny.request"
    request.write_bytes(models.request("tiny", models.tiny_input()))
    with ExitStack() as stack:
        servers = {}
        for state in ("off", "on"):
            config, path = _store(folder / state, sketches=state == "on")
            process = stack.enter_context(processes.running(processes.agent("serve", "--config", config), path, quiet=True))
            servers[state] = path, psutil.Process(process.pid)
            processes.drive(load, path, request, "http", 1, 0.5)
        for number in range(repeats):
            for state in ("off", "on") if number % 2 else ("on", "off"):
                path, process = servers[state]
                found.p50_us[state].append(
                    calm(lambda path=path: processes.drive(load, path, request, "http", 1, seconds))["p50_us"]
                )  # type: ignore[misc]
                found.cpu[state].append(_at_rate(path, process, seconds))
    return found


def _at_rate(path: Path, process: psutil.Process, seconds: float) -> float:
    """The part of a core that the server takes at RATE predictions a second."""
    array = models.tiny_input()
    with Client(path) as client:
        before, begun = process.cpu_times(), time.perf_counter()
        for number in range(int(seconds * RATE)):
            client.infer("tiny", {"x": array})
            late = begun + (number + 1) / RATE - time.perf_counter()
            if late > 0:
                threading.Event().wait(late)
        took, after = time.perf_counter() - begun, process.cpu_times()
    return (after.user + after.system - before.user - before.system) / took


def _store(folder: Path, *, sketches: bool) -> tuple[Path, Path]:
    folder.mkdir()
    store, tiny = Store.create(folder / "store"), folder / "tiny.onnx"
    models.tiny(tiny)
    release(store, "tiny", 1, tiny)
    store.select(Selection(model="tiny", active=Choice(version=1, variant="cpu")))
    config, server = folder / "agent.yaml", folder / "s.sock"
    config.write_text(f"store: {store.root}\nserve: {{socket: {server}, output_sketches: {str(sketches).lower()}}}\n")
    return config, server


def compared_ns(count: int = 1_000_000) -> float:
    """What a prediction pays that is not looked at, less an empty loop."""
    sketch: OutputSketch | None = OutputSketch()
    assert sketch is not None
    sketch.next_s, done_s, looked = 1e18, 1.0, 0

    def loop() -> float:
        nonlocal looked
        begun = time.perf_counter()
        for _ in range(count):
            if sketch is not None and done_s >= sketch.next_s:
                looked += 1
        return time.perf_counter() - begun

    def empty() -> float:
        begun = time.perf_counter()
        for _ in range(count):
            pass
        return time.perf_counter() - begun

    return (min(loop() for _ in range(5)) - min(empty() for _ in range(5))) / count * 1e9


def look_us(count: int = 2000) -> float:
    sketch, answer = OutputSketch(), np.random.default_rng(1).random((1, 10), np.float32)
    times = []
    for number in range(count):
        begun = time.perf_counter()
        sketch.take((SCORES,), None, [answer], 1e9 * number)
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e6


def add_up_us(count: int = 200) -> float:
    stats, times = Stats(), []
    for _ in range(count):
        for _ in range(FRESH_REQUESTS - 1):
            stats.succeeded(0.0, 1e-5, 1e-5, 1e-5, 1e-4)
        begun = time.perf_counter()
        stats.succeeded(0.0, 1e-5, 1e-5, 1e-5, 1e-4)
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e6


def _of(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


if __name__ == "__main__":
    main()
