"""Our server beside those that people would pick instead: the same two models, the same engine, the same load, one run.

Each peer gets the fastest protocol that it speaks over plain HTTP. Servers are measured in turns, so that a slow minute of the
machine meets them all; every number is the median of the repeats, with the smallest and the largest.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import models, processes
from benchmarks.__main__ import spread
from benchmarks.calm import Calm
from benchmarks.models import Subject
from benchmarks.peers.catalogue import PEERS, Peer, Place

CLIENTS = (1, 8)
READY_S = 60.0
WIDTH = 168


@dataclass
class Result:
    """What was seen of one server, a number per repeat. `p50_us` and `per_s` are keyed by model and number of clients."""

    name: str
    speaks: str
    start_s: list[float] = field(default_factory=list)
    pss_mb: list[float] = field(default_factory=list)
    p50_us: dict[str, list[float]] = field(default_factory=dict)
    p99_us: dict[str, list[float]] = field(default_factory=dict)
    per_s: dict[str, list[float]] = field(default_factory=dict)
    failures: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="of " + ", ".join(peer.name for peer in PEERS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number of every repeat")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the table, as .svg or .png (needs matplotlib)")
    options = parser.parse_args()
    chosen = [peer for peer in PEERS if not options.only or peer.name in options.only]
    for peer in chosen:
        peer.install()
    calm = Calm()
    results = measure(chosen, options.repeats, options.seconds, calm)
    show(results)
    print(calm)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    if options.plot:
        from benchmarks.peers.plot import draw

        draw(results, options.plot)


def measure(peers: Sequence[Peer], repeats: int, seconds: float, calm: Calm) -> list[Result]:
    results = [Result(peer.name, peer.speaks) for peer in peers]
    with (
        tempfile.TemporaryDirectory(prefix="edge-peers-") as name,
        Progress(console=Console(stderr=True), transient=True) as bar,
    ):
        folder = Path(name)
        (folder / "models").mkdir()
        load = processes.load_program(folder)
        subjects = models.make(folder / "models")
        row = bar.add_task("", total=repeats * len(peers))
        for repeat in range(repeats):
            for peer, result in zip(peers, results, strict=True):
                bar.update(row, description=peer.name)
                once(peer, result, folder / f"{peer.name.replace(' ', '-')}-{repeat}", load, subjects, seconds, calm)
                bar.advance(row)
    return results


def once(
    peer: Peer, result: Result, folder: Path, load: list[str], subjects: Sequence[Subject], seconds: float, calm: Calm
) -> None:
    """Starts the server, measures, ends it."""
    place = peer.place(folder, subjects[0].path.parent)
    requests = {}
    for subject in subjects:
        requests[subject.name] = folder / f"{subject.name}.request"
        requests[subject.name].write_bytes(peer.request(subject))

    def drive(request: Path, clients: int) -> dict[str, Any]:
        found = processes.drive(load, Path(place.address), request, "http", clients, seconds)
        result.failures += found["failures"]
        return found

    with running(peer, place) as (process, began):
        first_answer(place, requests["tiny"].read_bytes(), process)
        result.start_s.append(time.perf_counter() - began)
        result.pss_mb.append(pss_mb(process.pid))
        for subject in subjects:
            for clients in CLIENTS:
                found = calm(lambda name=subject.name, clients=clients: drive(requests[name], clients))  # type: ignore[misc]
                key = f"{subject.name} {clients}"
                for numbers, name in ((result.p50_us, "p50_us"), (result.p99_us, "p99_us"), (result.per_s, "per_s")):
                    numbers.setdefault(key, []).append(found[name])


@contextlib.contextmanager
def running(peer: Peer, place: Place) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    log = (place.folder / "log.txt").open("wb")
    began = time.perf_counter()
    process = subprocess.Popen(
        peer.command(place), stdout=log, stderr=subprocess.STDOUT, cwd=place.folder, env=peer.environ(place),
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process, began
    except Exception:
        sys.stderr.write((place.folder / "log.txt").read_text(errors="replace")[-3000:])
        raise
    finally:
        log.close()
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        psutil.wait_procs(family, timeout=5)


def first_answer(place: Place, request: bytes, process: subprocess.Popen[bytes]) -> None:
    """Asks until an answer with status 200 comes.  Raises: RuntimeError when none does."""
    deadline = time.monotonic() + READY_S
    status = b""
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with _connected(place.address) as sock:
                sock.sendall(request)
                status = sock.recv(4096)
        except OSError:
            status = b""
        if status.startswith(b"HTTP/1.1 200"):
            return
        time.sleep(0.005)
    raise RuntimeError(f"{process.args!r} gives no prediction: {status[:300]!r}")


def _connected(address: str) -> socket.socket:
    if "/" in address:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(5)
        sock.connect(address)
        return sock
    return socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=5)


def pss_mb(pid: int) -> float:
    """Of the process and everything it started."""
    process = psutil.Process(pid)
    return sum(processes.pss_mb(one.pid) for one in (process, *process.children(recursive=True)))


def show(results: Sequence[Result]) -> None:
    console = Console()
    console.width = max(console.width, WIDTH)
    columns = (
        "server",
        "speaks",
        "tiny µs",
        "tiny/s, 8 clients",
        "image µs",
        "image/s, 8 clients",
        "start s",
        "PSS MB",
        "failed",
    )
    table = Table(*columns, title="median (min-max) of the repeats; µs: p50 with one client")
    for result in results:
        table.add_row(
            result.name, result.speaks, spread(result.p50_us["tiny 1"], 0), spread(result.per_s["tiny 8"], 0),
            spread(result.p50_us["image 1"], 0), spread(result.per_s["image 8"], 0), spread(result.start_s, 2),
            spread(result.pss_mb, 0), str(result.failures),
        )  # fmt: skip
    console.print(table)
    if len(results) > 1:
        console.print(_verdict(results))


def _verdict(results: Sequence[Result]) -> str:
    """Ours beside the best of the others, number by number."""
    ours, others = results[0], results[1:]
    lines = []
    for label, less_is_better, pick in (
        ("p50, tiny", True, lambda r: r.p50_us["tiny 1"]),
        ("requests/s, tiny", False, lambda r: r.per_s["tiny 8"]),
        ("p50, image", True, lambda r: r.p50_us["image 1"]),
        ("requests/s, image", False, lambda r: r.per_s["image 8"]),
        ("start", True, lambda r: r.start_s),
        ("memory", True, lambda r: r.pss_mb),
    ):
        choose = min if less_is_better else max
        best = choose(others, key=lambda r: statistics.median(pick(r)))
        ratio = statistics.median(pick(ours)) / statistics.median(pick(best))
        lines.append(f"{label}: {ratio:.2f} × the best of the others ({best.name})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
