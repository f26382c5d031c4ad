"""The measurements. Everything that is compared is measured in turns, several times, in one run."""

import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime

from agent.client import Client
from agent.contract.codec import encode
from agent.store import Choice, Selection, Store, hash_file
from benchmarks import models, processes
from benchmarks.models import Subject

REPLY_BYTES = 280  # about what the answer of either model takes


@dataclass
class Row:
    """One model at one number of clients: what was seen in each repeat."""

    model: str
    clients: int
    echo_p50_us: list[float] = field(default_factory=list)
    engine_p50_us: list[float] = field(default_factory=list)
    p50_us: list[float] = field(default_factory=list)
    p99_us: list[float] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)
    engine_per_s: list[float] = field(default_factory=list)
    failures: int = 0

    @property
    def floor_us(self) -> float:
        return statistics.median(self.echo_p50_us) + statistics.median(self.engine_p50_us)

    @property
    def ratios(self) -> list[float]:
        """Of each repeat's p50 to the echo and the engine of the same repeat."""
        return [p / (e + i) for p, e, i in zip(self.p50_us, self.echo_p50_us, self.engine_p50_us, strict=True)]


def engine(subject: Subject, threads: int, seconds: float) -> tuple[float, float]:
    """(p50 in µs, runs per second) of the engine called in this process by `threads` threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(subject.path, options, providers=["CPUExecutionProvider"])
    times: list[float] = []
    end = time.perf_counter() + seconds

    def work() -> None:
        own = []
        while (began := time.perf_counter()) < end:
            session.run(["y"], {"x": subject.array})
            own.append(time.perf_counter() - began)
        times.extend(own)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return statistics.median(times) * 1e6, len(times) / seconds


def latency(
    folder: Path, load: list[str], subjects: Sequence[Subject], clients: Sequence[int], repeats: int, seconds: float
) -> list[Row]:
    rows = {(s.name, c): Row(s.name, c) for s in subjects for c in clients}
    server = folder / "bench.sock"
    with processes.running(processes.agent("run", *[s.path for s in subjects], "--socket", server), server):
        for _ in range(repeats):
            for subject in subjects:
                _measure(rows, folder, load, subject, clients, seconds, server)
    return list(rows.values())


def _measure(
    rows: dict[tuple[str, int], Row],
    folder: Path,
    load: list[str],
    subject: Subject,
    clients: Sequence[int],
    seconds: float,
    server: Path,
) -> None:
    request = folder / f"{subject.name}.request"
    request.write_bytes(subject.request)
    echo = folder / "echo.sock"
    echo.unlink(missing_ok=True)
    with processes.running([*load, "echo", str(echo), str(len(subject.request)), str(REPLY_BYTES)], echo):
        for count in clients:
            row = rows[subject.name, count]
            row.echo_p50_us.append(processes.drive(load, echo, request, str(REPLY_BYTES), count, seconds)["p50_us"])
            p50, per_s = engine(subject, count, seconds)
            row.engine_p50_us.append(p50)
            row.engine_per_s.append(per_s)
            found = processes.drive(load, server, request, "http", count, seconds)
            row.p50_us.append(found["p50_us"])
            row.p99_us.append(found["p99_us"])
            row.per_s.append(found["per_s"])
            row.failures += found["failures"]


def start(folder: Path, subject: Subject, repeats: int) -> dict[str, list[float]]:
    found = [processes.first_prediction_s(subject.path, folder / "start.sock", subject.array) for _ in range(repeats)]
    return {"first_prediction_s": [s for s, _ in found], "idle_pss_mb": [mb for _, mb in found]}


def swaps(folder: Path, load: list[str], repeats: int, seconds: float, clients: int = 4) -> dict[str, Any]:
    """p99 with `clients` busy clients, before and while versions are loaded, activated and committed one after the other."""
    config, server = _store(folder)
    request = folder / "swap.request"
    request.write_bytes(models.request("tiny", models.make(folder)[0].array))
    before, during, failures, count = [], [], 0, 0
    with processes.running(processes.agent("serve", "--config", config), server), Client(server) as client:
        for _ in range(repeats):
            quiet = processes.drive(load, server, request, "http", clients, seconds)
            end, swapped = threading.Event(), [0]
            swapper = threading.Thread(target=_swap, args=(client, end, swapped))
            swapper.start()
            busy = processes.drive(load, server, request, "http", clients, seconds)
            end.set()
            swapper.join()
            before.append(quiet["p99_us"])
            during.append(busy["p99_us"])
            failures += quiet["failures"] + busy["failures"]
            count += swapped[0]
    return {"clients": clients, "p99_before_us": before, "p99_during_us": during, "swaps": count, "failures": failures}


def _store(folder: Path) -> tuple[Path, Path]:
    store = Store.create(folder / "store")
    for version in (1, 2):
        path = folder / "tiny.onnx"
        models.tiny(path)
        path.write_bytes(path.read_bytes() + b"\x2a" + bytes([1, version]))  # an unknown field: other bytes, the same model
        sha256 = hash_file(path)
        store.blob(sha256).write_bytes(path.read_bytes())
        file = {"sha256": sha256, "size_bytes": path.stat().st_size}
        variant = {"name": "cpu", "runtime": "onnx", "file": "tiny.onnx"}
        store.write_manifest(encode({"model": "tiny", "version": version, "files": {"tiny.onnx": file}, "variants": [variant]}))
    store.select(Selection(model="tiny", active=Choice(version=1, variant="cpu")))
    config, server = folder / "agent.yaml", folder / "swap.sock"
    config.write_text(f"store: {store.root}\nserve: {{socket: {server}}}\n")
    return config, server


def _swap(client: Client, end: threading.Event, swapped: list[int]) -> None:
    """An update every 100 ms, far more often than any device makes one."""
    version = client.status()["models"]["tiny"]["active"]
    while not end.wait(0.1):
        version = 3 - version
        for action, body in (
            ("load", {"version": version, "variant": "cpu"}),
            ("activate", {"version": version}),
            ("commit", {}),
        ):
            status, _, answer = client.request("POST", f"/control/v1/models/tiny/{action}", body)
            if status != 200:
                raise RuntimeError(f"{action}: {answer!r}")
        swapped[0] += 1


def document(rows: Sequence[Row], started: dict[str, list[float]], swapped: dict[str, Any]) -> dict[str, Any]:
    return {"latency": [{**asdict(row), "ratios": row.ratios} for row in rows], "start": started, "swap": swapped}
