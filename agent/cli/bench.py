"""`edge-agent bench`: how fast a running server answers for one model."""

from __future__ import annotations

import bisect
import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.cli.common import client_at, fail, json_option, server_socket, socket_option
from agent.cli.predict import read_feeds

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Feeds = Mapping[str, NDArray[Any]]

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
HISTOGRAM_ROWS = 16
BAR_WIDTH = 40
START_S = 30.0  # until every client process is there


@dataclass(frozen=True, slots=True)
class Task:
    """What one client process does."""

    socket: Path
    model: str
    version: str | None
    feeds: Feeds
    seconds: float
    warm_up: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What one client process saw: the latency of every answer in seconds, and how many requests failed, with one reason."""

    latencies_s: NDArray[np.float64]
    failures: int
    reason: str
    elapsed_s: float


@click.command()
@click.argument("model")
@click.option("--input", "inputs", multiple=True, metavar="[NAME=]FILE", help="A .npy or .npz file  [default: random values]")
@click.option(
    "--batch", default=1, show_default=True, type=click.IntRange(1), help="Rows of random inputs, where the model is free."
)
@click.option("--version", "version", help="A version or label (stable, candidate, previous)  [default: the active one]")
@click.option("--clients", default=1, show_default=True, type=click.IntRange(1, 256), help="Clients that ask at once.")
@click.option("--seconds", default=5.0, show_default=True, type=click.FloatRange(0.1, 3600), help="How long to ask.")
@socket_option
@json_option
def bench(
    model: str,
    inputs: tuple[str, ...],
    batch: int,
    version: str | None,
    clients: int,
    seconds: float,
    socket_path: Path | None,
    *,
    as_json: bool,
) -> None:
    """Measure a model on a running server: latency, throughput, CPU time and memory.

    Each client is a process of its own that sends the next request when it has the answer to the last. Times are as a client
    sees them. CPU time and memory are the server's, known when it runs on this machine under a user whose processes you may
    see.

    \b
    Examples:
      edge-agent bench digits
      edge-agent bench mobilenet --clients 8 --seconds 10
      edge-agent bench digits --input image.npy --json
    """
    from agent.client import ClientError

    path = server_socket(socket_path)
    try:
        with client_at(path) as client:
            metadata = client.metadata(model, version)
            feeds = _named(read_feeds(inputs), metadata) if inputs else _random(metadata, batch)
            client.infer(model, feeds, version=version)
            pid = _pid(client)
    except ClientError as error:
        fail(error)
    task = Task(path, model, version, feeds, seconds, warm_up=20)
    before = _usage(pid)
    seen, elapsed_s = _run(task, clients, show=not as_json)
    found = _document(task, clients, seen, elapsed_s, before, _usage(pid))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _show(found, seen)
    if found["failed"] and not found["answered"]:
        fail(f"every request failed: {found['failure']}")


# -- asking ------------------------------------------------------------------------------------------------------------------


def _named(feeds: dict[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays by name; a single one without a name is the model's only input."""
    names = [tensor["name"] for tensor in metadata["inputs"]]
    if set(feeds) != {""}:
        return feeds
    if len(names) != 1:
        fail(f"model {metadata['name']!r} has the inputs {', '.join(names)}: give each as NAME=FILE")
    return {names[0]: feeds[""]}


def _random(metadata: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """Values with a fixed seed; free dimensions are 1, the first one `batch`."""
    import numpy as np

    from runtimes.contract import DTYPES

    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    for tensor in metadata["inputs"]:
        datatype, declared = tensor["datatype"], tensor["shape"]
        shape = [(batch if at == 0 else 1) if size == -1 else size for at, size in enumerate(declared)]
        if datatype in ("BYTES", "BF16"):
            fail(f"input {tensor['name']!r} is {datatype}: random values mean nothing there, give it with --input")
        dtype = DTYPES[datatype]
        if dtype.kind == "f":
            feeds[tensor["name"]] = rng.random(shape).astype(dtype)
        else:
            feeds[tensor["name"]] = rng.integers(0, 2, shape).astype(dtype)
    return feeds


def _run(task: Task, clients: int, *, show: bool) -> tuple[list[Seen], float]:
    """Every client's view, and the seconds from the first request to the last answer."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")  # a fork would share the parent's threads and locks
    start = context.Barrier(clients)
    with ProcessPoolExecutor(clients, context, _meet_at, (start,)) as pool:
        futures = [pool.submit(_client, task) for _ in range(clients)]
        if show:
            _wait_with_bar(futures, task.seconds)
        seen = [future.result() for future in futures]
    return seen, max(one.elapsed_s for one in seen)


_start: Any = None  # in a client process: where it waits for the others


def _meet_at(barrier: Any) -> None:
    global _start  # noqa: PLW0603 - how a process pool hands something to its processes
    _start = barrier


def _client(task: Task) -> Seen:
    """One client process: asks until the time is over. The clock starts when every client has been answered a few times."""
    import numpy as np

    from agent.client import Client, ClientError

    latencies: list[float] = []
    failures, reason = 0, ""
    with Client(task.socket) as client:
        with contextlib.suppress(ClientError):
            for _ in range(task.warm_up):
                client.infer(task.model, task.feeds, version=task.version)
        _start.wait(START_S)
        began = now = time.perf_counter()
        while now - began < task.seconds:
            started = now
            try:
                client.infer(task.model, task.feeds, version=task.version)
            except ClientError as error:
                failures, reason = failures + 1, str(error)
                now = time.perf_counter()
                continue
            now = time.perf_counter()
            latencies.append(now - started)
    return Seen(np.array(latencies), failures, reason, now - began)


def _wait_with_bar(futures: Sequence[Any], seconds: float) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(TextColumn("asking"), BarColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        row = progress.add_task("", total=seconds)
        began = time.monotonic()
        pause = threading.Event()
        while not all(future.done() for future in futures):
            progress.update(row, completed=min(seconds, time.monotonic() - began))
            pause.wait(0.1)


# -- the server's side -------------------------------------------------------------------------------------------------------


def _pid(client: Any) -> int | None:
    """The server's process; None when we may not ask for it."""
    from agent.client import ClientError

    try:
        pid = client.status()["pid"]
    except ClientError:
        return None
    return int(pid)


def _usage(pid: int | None) -> tuple[float, int] | None:
    """(CPU seconds so far, proportional set size in bytes) of the server with its children; None when that cannot be seen."""
    import psutil

    if pid is None:
        return None
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        times = [one.cpu_times() for one in family]
        return sum(t.user + t.system for t in times), sum(one.memory_full_info().pss for one in family)
    except psutil.Error:
        return None


# -- what was seen -----------------------------------------------------------------------------------------------------------


def _document(
    task: Task,
    clients: int,
    seen: Sequence[Seen],
    elapsed_s: float,
    before: tuple[float, int] | None,
    after: tuple[float, int] | None,
) -> dict[str, Any]:
    import numpy as np

    latencies = np.concatenate([one.latencies_s for one in seen]) * 1e3
    answered = len(latencies)
    document: dict[str, Any] = {
        "model": task.model,
        "clients": clients,
        "seconds": round(elapsed_s, 3),
        "answered": answered,
        "failed": sum(one.failures for one in seen),
        "failure": next((one.reason for one in seen if one.reason), ""),
        "per_second": round(answered / elapsed_s, 1),
        "latency_ms": {},
        "cpu_us_per_request": None,
        "memory_bytes": None,
        "machine": {"cpus": os.cpu_count(), "load": os.getloadavg()[0]},
    }
    if answered:
        values = np.percentile(latencies, PERCENTILES)
        document["latency_ms"] = {f"p{p:g}": round(float(v), 4) for p, v in zip(PERCENTILES, values, strict=True)}
        document["latency_ms"] |= {"mean": round(float(latencies.mean()), 4), "max": round(float(latencies.max()), 4)}
    if before and after and answered:
        document["cpu_us_per_request"] = round((after[0] - before[0]) / answered * 1e6, 1)
        document["memory_bytes"] = after[1]
    return document


def _show(found: Mapping[str, Any], seen: Sequence[Seen]) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    clients = found["clients"]
    console.print(
        f"[bold]{found['model']}[/]  {found['answered']} answers to {clients} client{'s' * (clients != 1)} in {found['seconds']:.1f} s: "
        f"[bold]{found['per_second']:.0f} per second[/], {found['failed']} failed"
    )
    if found["failed"]:
        console.print(f"  one of the failures: {found['failure']}", markup=False)
    if not found["answered"]:
        return
    console.print("  latency    " + ", ".join(f"{name} {_time(value)}" for name, value in found["latency_ms"].items()))
    if found["cpu_us_per_request"] is not None:
        console.print(
            f"  server     {found['cpu_us_per_request']:.0f} µs of CPU per request, {found['memory_bytes'] / 1e6:.0f} MB (PSS)"
        )
    console.print()
    for line in _histogram([float(value) * 1e3 for one in seen for value in one.latencies_s]):
        console.print(line, markup=False)


def _histogram(latencies_ms: list[float]) -> list[str]:
    """A bar per bucket; the buckets grow by a constant factor from the smallest latency to the 99.9th percentile."""
    latencies_ms.sort()
    low, high = latencies_ms[0], latencies_ms[int((len(latencies_ms) - 1) * 0.999)]
    factor = max(1.0 + 1e-9, (high / low) ** (1 / HISTOGRAM_ROWS))
    bounds = [low * factor**step for step in range(1, HISTOGRAM_ROWS)] + [math.inf]
    counts, at = [], 0
    for bound in bounds:
        to = bisect.bisect_right(latencies_ms, bound)
        counts.append(to - at)
        at = to
    most = max(counts)
    lines = []
    for bound, count in zip(bounds, counts, strict=True):
        bar = "█" * round(BAR_WIDTH * count / most) or ("▏" if count else "")
        label = f"≤ {_time(bound)}" if bound < math.inf else f"> {_time(bounds[-2])}"
        lines.append(f"  {label:>12} {bar:<{BAR_WIDTH}} {count}")
    return lines


def _time(ms: float) -> str:
    return f"{ms * 1e3:.0f} µs" if ms < 1 else f"{ms:.2f} ms" if ms < 100 else f"{ms:.0f} ms"
