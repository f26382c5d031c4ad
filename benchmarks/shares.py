"""What part of the processors' time the engine has, with everything else around it, and alone.

On a shared machine a rate tells first how fast the machine was in that second. Samples of what each processor does tell what is left for
everything but the engine, and hardly depend on that. Needs Linux' `perf` (Debian: linux-perf) and the right to sample the whole machine.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import measure, models, processes
from benchmarks.__main__ import spread
from benchmarks.models import Subject

SAMPLES_PER_S = 4000  # of each processor
LEAD_S, TAIL_S = 0.4, 2.0  # the load begins before the samples and ends after them; on a busy machine perf is slow to begin


@dataclass(frozen=True)
class Shares:
    """In percent of all samples."""

    engine: float
    interpreter: float
    kernel: float
    idle: float
    per_s: float  # requests, or runs


Load = Callable[[float], float]  # works for so many seconds, and gives what it did per second


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shares", description=__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edge-shares-") as name:
        folder = Path(name)
        image = models.make(folder)[-1]
        found: dict[str, list[Shares]] = {}
        with _loads(folder, image, options.clients) as loads:
            for _ in range(options.repeats):
                for what, load in loads.items():
                    found.setdefault(what, []).append(_sampled(folder / "perf.data", load, options.seconds))
    _show(found, options.clients)


@contextlib.contextmanager
def _loads(folder: Path, image: Subject, clients: int) -> Iterator[dict[str, Load]]:
    """The engine alone first: the others are compared with it."""
    program = processes.load_program(folder)
    found: dict[str, Load] = {"the engine alone": lambda seconds: measure.engine(image, clients, seconds)[1]}
    with contextlib.ExitStack() as stack:
        server = folder / "server.sock"
        stack.enter_context(processes.running(processes.agent("run", image.path, "--socket", server), server))
        for way, subject in (("memory", models.sharing(image)), ("the socket", image)):
            request, memory = folder / f"{subject.name}.request", folder / "memory" if subject.shared else None
            request.write_bytes(subject.request)
            if memory is not None:
                memory.write_bytes(subject.array.tobytes())
            found[f"through {way}"] = _driven(program, server, request, clients, memory)
            path = folder / f"{subject.name}.sock"
            if (command := processes.c_server(folder, subject, path)) is not None:
                stack.enter_context(processes.running(command, path))
                found[f"a server in C, through {way}"] = _driven(program, path, request, clients, memory)
        yield found


def _driven(program: list[str], server: Path, request: Path, clients: int, memory: Path | None) -> Load:
    def load(seconds: float) -> float:
        found = processes.drive(program, server, request, "http", clients, seconds, memory)
        if found["failures"]:
            raise RuntimeError(f"{found['failures']} requests failed at {server}")
        return float(found["per_s"])

    return load


def _sampled(data: Path, load: Load, seconds: float) -> Shares:
    rates: list[float] = []
    worker = threading.Thread(target=lambda: rates.append(load(LEAD_S + seconds + TAIL_S)))
    worker.start()
    time.sleep(LEAD_S)
    command = ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(SAMPLES_PER_S), "-a", "-o", str(data)]
    done = subprocess.run(
        [*command, "--", "sleep", str(seconds)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
    )
    worker.join()
    if done.returncode:
        sys.exit(f"perf cannot sample this machine (as root it can): {done.stderr.strip()}")
    report = ["perf", "report", "-i", str(data), "--stdio", "--sort", "comm,dso", "-t", "\t"]
    lines = subprocess.run(report, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [line.split("\t") for line in lines if line.strip() and not line.startswith("#")]
    return _shares([(float(share.strip().rstrip("%")), who.strip(), where.strip()) for share, who, where in rows], *rates)


def _shares(rows: Sequence[tuple[float, str, str]], per_s: float) -> Shares:
    """`rows`: percent, the process, and the library or `[kernel…`."""
    idle = sum(share for share, who, _ in rows if who == "swapper")
    return Shares(
        engine=sum(share for share, _, where in rows if "onnxruntime" in where),
        interpreter=sum(share for share, _, where in rows if "python" in where and "onnxruntime" not in where),
        kernel=sum(share for share, _, where in rows if where.startswith("[kernel")) - idle,
        idle=idle,
        per_s=per_s,
    )


def _show(found: dict[str, list[Shares]], clients: int) -> None:
    alone = statistics.median(shares.engine for shares in next(iter(found.values())))
    table = Table(
        "", "engine %", "× alone", "interpreter %", "kernel %", "idle %", "per second",
        title=f"{clients} clients, 1x3x224x224: of all processors' time, median (min-max) of the repeats",
    )  # fmt: skip
    for what, repeats in found.items():
        table.add_row(
            what,
            spread([one.engine for one in repeats]),
            f"{statistics.median(one.engine for one in repeats) / alone:.3f}",
            *(spread([getattr(one, column) for one in repeats]) for column in ("interpreter", "kernel", "idle")),
            spread([one.per_s for one in repeats], 0),
        )
    console = Console(highlight=False)
    console.width = max(console.width, 150)
    console.print(table)


if __name__ == "__main__":
    main()
