"""The measurements. Everything that is compared is measured in turns, several times, in one run."""

import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime

from benchmarks import models, processes
from benchmarks.calm import Calm
from benchmarks.models import Subject

BARE_NAMES = {"tiny": "T", "image": "I"}
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
    bare_p50_us: list[float] = field(default_factory=list)
    bare_per_s: list[float] = field(default_factory=list)
    c_p50_us: list[float] = field(default_factory=list)
    c_per_s: list[float] = field(default_factory=list)
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
    folder: Path,
    load: list[str],
    subjects: Sequence[Subject],
    only: Sequence[str],
    clients: Sequence[int],
    repeats: int,
    seconds: float,
    prototype: Path | None,
    calm: Calm,
) -> list[Row]:
    """A row for each number of clients of each subject in `only`; the servers have all subjects. `prototype` is the bare threading
    model without anything a product needs: leader_followers.py, when it is at hand.
    """
    measured = [subject for subject in subjects if subject.name in only]
    rows = {(s.name, c): Row(s.name, c) for s in measured for c in clients}
    server = folder / "bench.sock"
    with (
        processes.running(processes.agent("run", *{s.path for s in subjects}, "--socket", server), server),
        _bare(folder, subjects, prototype) as bare,
        _c_servers(folder, subjects) as in_c,
    ):
        for _ in range(repeats):
            for subject in measured:
                _measure(rows, folder, load, subject, clients, seconds, server, bare, in_c.get(subject.name), calm)
    return list(rows.values())


@contextlib.contextmanager
def _bare(folder: Path, subjects: Sequence[Subject], prototype: Path | None) -> Iterator[Path | None]:
    """The prototype's socket. It knows its two models as T and I."""
    if prototype is None:
        yield None
        return
    home, server = folder / "bare", folder / "bare.sock"
    home.mkdir()
    for subject in [s for s in subjects if not s.shared]:
        (home / f"{BARE_NAMES[subject.name]}.onnx").symlink_to(subject.path)
    with processes.running([sys.executable, str(prototype), str(server), "3"], server, folder=home):
        yield server


@contextlib.contextmanager
def _c_servers(folder: Path, subjects: Sequence[Subject]) -> Iterator[dict[str, Path]]:
    """The socket of each subject's server in C; none where it cannot be built."""
    with contextlib.ExitStack() as stack:
        sockets = {}
        for number, subject in enumerate(subjects):
            path = folder / f"c{number}.sock"
            if (command := processes.c_server(folder, subject, path)) is not None:
                stack.enter_context(processes.running(command, path))
                sockets[subject.name] = path
        yield sockets


def _measure(
    rows: dict[tuple[str, int], Row],
    folder: Path,
    load: list[str],
    subject: Subject,
    clients: Sequence[int],
    seconds: float,
    server: Path,
    bare: Path | None,
    in_c: Path | None,
    calm: Calm,
) -> None:
    bare_request, request, shared = folder / "bare.request", folder / "request", None
    request.write_bytes(subject.request)
    if subject.shared:
        shared = folder / "shared"
        shared.write_bytes(subject.array.tobytes())
    else:
        bare_request.write_bytes(models.request(BARE_NAMES[subject.name], subject.array))

    def drive(at: Path, request: Path, kind: str, count: int, shared: Path | None = None) -> dict[str, Any]:
        def once() -> dict[str, Any]:
            found = processes.drive(load, at, request, kind, count, seconds, shared)
            rows[subject.name, count].failures += found["failures"]
            return found

        return calm(once)

    echo = folder / "echo.sock"
    echo.unlink(missing_ok=True)
    with processes.running([*load, "echo", str(echo), str(len(subject.request)), str(REPLY_BYTES)], echo):
        for count in clients:
            row = rows[subject.name, count]
            row.echo_p50_us.append(drive(echo, request, str(REPLY_BYTES), count)["p50_us"])
            p50, per_s = calm(lambda count=count: engine(subject, count, seconds))  # type: ignore[misc]
            row.engine_p50_us.append(p50)
            row.engine_per_s.append(per_s)
            found = drive(server, request, "http", count, shared)
            row.p50_us.append(found["p50_us"])
            row.p99_us.append(found["p99_us"])
            row.per_s.append(found["per_s"])
            if bare is not None and not subject.shared:
                found = drive(bare, bare_request, "http", count)
                row.bare_p50_us.append(found["p50_us"])
                row.bare_per_s.append(found["per_s"])
            if in_c is not None:
                found = drive(in_c, request, "http", count, shared)
                row.c_p50_us.append(found["p50_us"])
                row.c_per_s.append(found["per_s"])


def start(folder: Path, subject: Subject, repeats: int, calm: Calm) -> dict[str, list[float]]:
    def once() -> tuple[float, float]:
        return processes.first_prediction_s(subject.path, folder / "start.sock", subject.array)

    once()  # an installed package has its bytecode
    found = [calm(once) for _ in range(repeats)]
    return {"first_prediction_s": [s for s, _ in found], "idle_pss_mb": [mb for _, mb in found]}


def document(rows: Sequence[Row], started: dict[str, list[float]], more: dict[str, Any]) -> dict[str, Any]:
    return {"latency": [{**asdict(row), "ratios": row.ratios} for row in rows], "start": started, **more}
