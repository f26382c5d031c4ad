"""Mixed load for a long time, models coming and going, hostile neighbours: does anything leak, fail, or get stuck?

Clients ask every kind of model in every way and check each answer. Meanwhile versions are swapped, models are loaded and
unloaded, statistics are read, and other clients break off in the middle, dawdle, or talk nonsense. Ends with status 1 when a request
failed, an answer was wrong, a request took longer than STUCK_S, or the server holds more at the end than at the beginning.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = os.environ["ORT_TELEMETRY_DISABLED"] = "1"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from agent.client import Client, ClientError
from agent.store import Choice, Selection, Store
from benchmarks import models, processes
from benchmarks.stores import control, release
from runtimes import registry
from runtimes.contract import LoadOptions

DIGITS = Path(__file__).parents[1] / "examples/digits"
CLIENTS = ("tiny", "tiny json", "image", "digits", "digits json", "lite")
CHURN = 100  # models that are loaded and unloaded, each a file of its own
SAMPLE_S = 5.0
STUCK_S = 10.0
MAX_GROWTH = 0.05
SLACK_BYTES = 2_000_000  # what an allocator may keep without anything leaking


@dataclass
class Report:
    """What one client process saw."""

    kind: str
    answered: int = 0
    longest_s: float = 0.0
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--pause-ms", type=float, default=0.5, help="of each client between two requests")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edge-soak-") as name:
        found = soak(Path(name), options.minutes * 60, options.seed, options.pause_ms / 1e3)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(show(found))


def soak(folder: Path, seconds: float, seed: int, pause_s: float) -> dict[str, Any]:
    config, server, expected = prepare(folder)
    context = multiprocessing.get_context("spawn")
    end = context.Event()
    queue = context.Queue()
    with processes.running(processes.agent("serve", "--config", config), server, quiet=True) as process:
        wait_until_served(server)
        workers = [context.Process(target=ask, args=(kind, server, expected, pause_s, end, queue)) for kind in CLIENTS]
        for worker in workers:
            worker.start()
        changes = Changes(server, random.Random(seed))
        pests = Pests(server, random.Random(seed + 1))
        threads = [threading.Thread(target=repeat, args=(one.once, end, one.errors)) for one in (changes, pests)]
        for thread in threads:
            thread.start()
        samples = watch(process.pid, seconds, lambda: any(not worker.is_alive() for worker in workers))
        end.set()
        reports = [queue.get(timeout=60) for _ in workers]
        for one in (*workers, *threads):
            one.join(60)
        pests.close()
        alive = process.poll() is None
    return {
        "seconds": seconds, "seed": seed, "alive": alive, "clients": [asdict(report) for report in reports], "changes": changes.count,
        "pests": pests.count, "errors": changes.errors + pests.errors, "samples": samples,
    }  # fmt: skip


# -- what is served ----------------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> tuple[Path, Path, dict[str, list[Any]]]:
    """(agent.yaml, socket, model → the right answers of its versions to the one question it is asked)."""
    store = Store.create(folder / "store")
    expected: dict[str, list[Any]] = {}
    tiny, image = folder / "tiny.onnx", folder / "image.onnx"
    models.tiny(tiny)
    models.image(image)
    for model, files in (
        ("tiny", [tiny, tiny]),
        ("image", [image, image]),
        ("digits", [DIGITS / "models/digits-v1-int8-qdq.onnx", DIGITS / "models/digits-v2-int8-qdq.onnx"]),
        ("lite", [DIGITS / "models/digits-v1-int8.tflite", DIGITS / "models/digits-v2-int8.tflite"]),
    ):
        for version, file in enumerate(files, start=1):
            release(store, model, version, file)
        expected[model] = [answer(file, question(model)) for file in files]
        store.select(Selection(model=model, active=Choice(version=1, variant="cpu")))
    for number in range(CHURN):
        release(store, f"guest-{number}", 1, tiny)
    config, server = folder / "agent.yaml", folder / "soak.sock"
    config.write_text(f"store: {store.root}\nserve: {{socket: {server}}}\n")
    return config, server, expected


def question(model: str) -> Any:
    rng = np.random.default_rng(models.SEED)
    shape = {"tiny": (1, 64), "image": (1, 3, 224, 224), "digits": (4, 1, 8, 8), "lite": (1, 8, 8, 1)}[model]
    if model == "lite":
        return rng.integers(-128, 128, shape).astype(np.int8)
    return rng.random(shape).astype(np.float32)


def answer(file: Path, array: Any) -> Any:
    """By the engine in this process."""
    opened = registry.for_file(file).load(file, LoadOptions())
    found = opened.run({opened.inputs[0].name: array})[0]
    opened.close()
    return found


def wait_until_served(server: Path) -> None:
    with Client(server) as client:
        deadline = time.monotonic() + 30
        while not all(client.ready(model) for model in ("tiny", "image", "digits", "lite")):
            if time.monotonic() > deadline:
                raise RuntimeError("the server does not get ready")
            time.sleep(0.05)


# -- who asks ----------------------------------------------------------------------------------------------------------------


def ask(kind: str, server: Path, expected: dict[str, list[Any]], pause_s: float, end: Any, queue: Any) -> None:
    """One client process, until `end`: every answer must be that of one of the versions."""
    model, _, way = kind.partition(" ")
    array, right = question(model), expected[model]
    report = Report(kind)
    with Client(server, timeout_s=STUCK_S) as client:
        while not end.is_set():
            began = time.perf_counter()
            try:
                got = by_json(client, model, array) if way else next(iter(client.infer(model, array).values()))
            except ClientError as error:
                report.errors.append(f"{kind}: {error}")
            else:
                report.answered += 1
                if not any(np.allclose(got.ravel(), one.ravel(), rtol=1e-4, atol=1e-5) for one in right):
                    report.wrong.append(f"{kind}: {got.ravel()[:4]}")
            report.longest_s = max(report.longest_s, time.perf_counter() - began)
            if len(report.errors) + len(report.wrong) > 20:
                break
            end.wait(pause_s)
    queue.put(report)


def by_json(client: Client, model: str, array: Any) -> Any:
    name = {"tiny": "x", "digits": "image"}[model]
    tensor = {"name": name, "datatype": "FP32", "shape": list(array.shape), "data": array.ravel().tolist()}
    status, _, body = client.request("POST", f"/v2/models/{model}/infer", {"inputs": [tensor]})
    document = json.loads(body)
    if status != 200:
        raise ClientError(document["error"], status)
    return np.array(document["outputs"][0]["data"])


# -- what changes meanwhile --------------------------------------------------------------------------------------------------


def repeat(once: Callable[[], None], end: Any, errors: list[str]) -> None:
    while not end.is_set():
        try:
            once()
        except (ClientError, OSError, RuntimeError) as error:
            errors.append(f"{type(error).__name__}: {error}")
            if len(errors) > 20:
                return
        end.wait(0.05)


class Changes:
    """The operator: swaps, rolls back, loads, unloads, looks."""

    def __init__(self, server: Path, rng: random.Random) -> None:
        self.client = Client(server, timeout_s=60)
        self.rng = rng
        self.count = 0
        self.errors: list[str] = []

    def once(self) -> None:
        self.rng.choice((self.swap, self.guest, self.look))()
        self.count += 1

    def swap(self) -> None:
        model = self.rng.choice(("tiny", "image", "digits", "lite"))
        active = self.client.status()["models"][model]["active"]
        control(self.client, model, "load", {"version": 3 - active, "variant": "cpu"})
        control(self.client, model, "activate", {"version": 3 - active})
        if self.rng.random() < 0.5:
            control(self.client, model, "commit", {})
        else:
            control(self.client, model, "rollback", {"version": active})

    def guest(self) -> None:
        model = f"guest-{self.rng.randrange(CHURN)}"
        control(self.client, model, "load", {"version": 1, "variant": "cpu"})
        control(self.client, model, "activate", {"version": 1})
        self.client.infer(model, question("tiny"))
        control(self.client, model, "unload", {})

    def look(self) -> None:
        for path in ("/metrics", "/v2/models/stats", "/control/v1/status"):
            status, _, _ = self.client.request("GET", path)
            if status != 200:
                raise RuntimeError(f"{path}: status {status}")


class Pests:
    """Clients that nobody wishes for: they dawdle, break off, lie about lengths, talk nonsense."""

    def __init__(self, server: Path, rng: random.Random) -> None:
        self.server = server
        self.rng = rng
        self.count = 0
        self.errors: list[str] = []
        self.open: list[socket.socket] = []
        self.request = models.request("image", question("image"))

    def once(self) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(2)
        with contextlib.suppress(OSError):  # being thrown out is what a pest must expect
            sock.connect(str(self.server))
            cut = self.rng.randrange(len(self.request))
            bad = self.rng.choice(
                (self.request[:cut], self.rng.randbytes(200), b"POST / HTTP/1.1\r\ncontent-length: 99999999999\r\n\r\n")
            )
            sock.sendall(bad)
        self.count += 1
        self.open.append(sock)
        if len(self.open) > 20:
            self.open.pop(self.rng.randrange(len(self.open))).close()

    def close(self) -> None:
        for sock in self.open:
            sock.close()


# -- watching ----------------------------------------------------------------------------------------------------------------


def watch(pid: int, seconds: float, broken: Callable[[], bool]) -> list[dict[str, float]]:
    """A sample of the server every SAMPLE_S, until the time is over or a client gave up."""
    process, samples, began = psutil.Process(pid), [], time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        row = bar.add_task("", total=seconds)
        while (passed := time.monotonic() - began) < seconds and not broken():
            sample = {
                "s": passed,
                "pss_bytes": processes.pss_mb(pid) * 2**20,
                "files": process.num_fds(),
                "threads": process.num_threads(),
            }
            samples.append(sample)
            bar.update(row, completed=passed, description=f"{sample['pss_bytes'] / 1e6:.0f} MB, {sample['files']:.0f} files")
            time.sleep(min(SAMPLE_S, seconds / 20))
    return samples


def growth(samples: Sequence[dict[str, float]]) -> tuple[float, float]:
    """Median memory in bytes of the second and of the last tenth."""
    tenth = max(1, len(samples) // 10)
    early = statistics.median(sample["pss_bytes"] for sample in samples[tenth : 2 * tenth] or samples)
    return early, statistics.median(sample["pss_bytes"] for sample in samples[-tenth:])


def show(found: dict[str, Any]) -> int:
    """Prints what was seen. The exit status."""
    console = Console(highlight=False, soft_wrap=True)
    faults = list(found["errors"])
    for client in found["clients"]:
        console.print(f"{client['kind']:>12}  {client['answered']} answers, longest {client['longest_s'] * 1e3:.0f} ms")
        faults += client["errors"] + client["wrong"]
        if client["longest_s"] > STUCK_S:
            faults.append(f"{client['kind']}: a request took {client['longest_s']:.1f} s")
    early, late = growth(found["samples"])
    files = [sample["files"] for sample in found["samples"]]
    console.print(
        f"changes {found['changes']}, pests {found['pests']}, {found['seconds'] / 60:.1f} minutes, seed {found['seed']}"
    )
    console.print(
        f"memory {early / 1e6:.1f} MB early, {late / 1e6:.1f} MB late ({late / early - 1:+.1%}); files at most {max(files):.0f}"
    )
    if late > early * (1 + MAX_GROWTH) + SLACK_BYTES:
        faults.append(f"memory grew from {early / 1e6:.1f} to {late / 1e6:.1f} MB")
    if not found["alive"]:
        faults.append("the server died")
    for fault in faults[:20]:
        console.print(f"[red]{fault}[/]", markup=True)
    console.print("nothing failed, leaked or got stuck" if not faults else f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    main()
