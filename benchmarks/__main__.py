"""The server beside what it cannot beat, all in one run: an echo on a Unix socket, and the engine in the process that asks; and beside
a server in C that has the engine and nothing else.

Every figure is the median of the repeats, with the smallest and the largest: machines are noisy, compare within one run only.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = os.environ["ORT_TELEMETRY_DISABLED"] = "1"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from rich.console import Console
from rich.table import Table

from benchmarks import measure, models, processes, sharing, under_load
from benchmarks.calm import PATIENCE_S, Calm

CLIENTS = (1, 4, 8)
WIDTH = 230
TITLE = "median (min-max) of the repeats; times in µs; bare: the threading model alone; C: the engine behind a socket, and nothing else"
PROTOTYPE = Path(__file__).parents[2] / "shared/prototypes/leader_followers.py"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two short repeats: to see that it runs, not to compare")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number of every repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument(
        "--prototype", type=Path, metavar="FILE", default=PROTOTYPE, help="the bare threading model to compare with"
    )
    parser.add_argument(
        "--only", nargs="+", choices=models.NAMES, metavar="MODEL", help="the table alone, of these: " + "; ".join(models.NAMES)
    )
    parser.add_argument("--clients", nargs="+", type=int, metavar="COUNT", default=CLIENTS, help="in the table")
    options = parser.parse_args()
    repeats, seconds = (2, 0.3) if options.quick else (options.repeats, options.seconds)
    prototype = options.prototype if options.prototype.is_file() else None
    calm = Calm(0 if options.quick else PATIENCE_S)
    with tempfile.TemporaryDirectory(prefix="edge-bench-") as name:
        folder = Path(name)
        load = processes.load_program(folder)
        subjects = models.make(folder)
        subjects.append(models.sharing(subjects[-1]))
        if options.only:
            rows = measure.latency(folder, load, subjects, options.only, options.clients, repeats, seconds, prototype, calm)
            started, more = {}, {}
            _console().print(_table(rows))
        else:
            shared = sharing.measure(folder, calm, repeats, max(20, int(seconds * sharing.ROUNDS)))  # first: it forks
            started = measure.start(folder, subjects[0], repeats, calm)
            rows = measure.latency(folder, load, subjects, models.NAMES, options.clients, repeats, seconds, prototype, calm)
            more = {
                "sharing": shared,
                "swap": under_load.swaps(folder, load, repeats, seconds, calm),
                "mixed": under_load.mixed(folder, load, 2 * repeats + 1, 2 * seconds, calm),  # it varies most
                "loads": under_load.loads(folder),
            }
            show(rows, started, more, compiled=len(load) == 1)
    print(calm)
    if options.json:
        options.json.write_text(json.dumps(measure.document(rows, started, more), indent=1) + "\n")


def show(rows: Sequence[measure.Row], started: dict[str, list[float]], more: dict[str, Any], *, compiled: bool) -> None:
    console = _console()
    console.print(_table(rows))
    console.print(
        f"start to first prediction {spread(started['first_prediction_s'], 2)} s, idle PSS {spread(started['idle_pss_mb'])} MB"
    )
    console.print(
        "image from Python, one client, p50 as a multiple of the engine's in the same process: " + _sharing(more["sharing"])
    )
    swapped = more["swap"]
    console.print(
        f"swap under {swapped['clients']} clients: p99 {spread(swapped['p99_before_us'], 0)} µs before, "
        f"{spread(swapped['p99_during_us'], 0)} µs during {swapped['swaps']} swaps, {swapped['failures']} failed"
    )
    mixed = more["mixed"]
    console.print(
        f"tiny, one client, p99: {spread(mixed['busy'], 0)} µs while another process keeps the cores busy, {spread(mixed['long'], 0)} µs while "
        f"four clients ask the server for a 50 ms model, {spread(mixed['dawdlers'], 0)} µs with {under_load.DAWDLERS} dawdling connections"
    )
    loads = ", ".join(f"{mb:.1f} MB after {count}" for count, mb in more["loads"].items())
    console.print(f"memory after loading and unloading different models: {loads}")
    if not compiled:
        console.print("there is no C compiler: echo and load generator are Python's, and slow")


def _console() -> Console:
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)  # a number that is cut off is no number
    return console


def _sharing(found: dict[str, list[float]]) -> str:
    engine = found["engine in this process"]
    ratios = {name: [one / base for one, base in zip(times, engine, strict=True)] for name, times in found.items()}
    return ", ".join(f"{name} {spread(values, 2)}" for name, values in ratios.items())


def _table(rows: Sequence[measure.Row]) -> Table:
    columns = [
        "model",
        "clients",
        "echo p50",
        "engine p50",
        "p50 µs",
        "p99 µs",
        "× (echo + engine)",
        "requests/s",
        "engine/s",
        "failed",
    ]
    others = [("bare", "bare_p50_us", "bare_per_s"), ("C", "c_p50_us", "c_per_s")]
    others = [other for other in others if getattr(rows[0], other[1])]
    for name, _, _ in others:
        columns += [f"p50 × {name}", f"requests/s × {name}"]
    table = Table(*columns, title=TITLE)
    for row in rows:
        cells = [
            row.model, str(row.clients), _us(row.echo_p50_us), _us(row.engine_p50_us), _us(row.p50_us), _us(row.p99_us),
            spread(row.ratios, 2) if row.clients == 1 else "-", spread(row.per_s, 0), spread(row.engine_per_s, 0), str(row.failures),
        ]  # fmt: skip
        for _, p50_us, per_s in others:
            cells += [_ratios(row.p50_us, getattr(row, p50_us)), _ratios(row.per_s, getattr(row, per_s))]
        table.add_row(*cells)
    return table


def _us(values: Sequence[float]) -> str:
    return spread(values, 1 if max(values) < 1000 else 0)


def _ratios(values: Sequence[float], others: Sequence[float]) -> str:
    return spread([a / b for a, b in zip(values, others, strict=True)], 2) if others else "-"


def spread(values: Sequence[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
