"""The processes that are measured: the load generator, the echo, and the server as a user starts it."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime

from agent.client import Client, ClientError
from benchmarks.models import Subject

HERE = Path(__file__).parent
START_TIMEOUT_S = 20.0
MAX_NAMING_BYTES = 4096  # a request that names memory is shorter


def load_program(folder: Path) -> list[str]:
    """The command of the load generator: compiled where there is a C compiler, else Python's."""
    program = _compiled(folder, "load")
    return [sys.executable, str(HERE / "load.py")] if program is None else [str(program)]


def c_server(folder: Path, subject: Subject, path: Path) -> list[str] | None:
    """The command of the least server in C for this subject, at the socket `path`. None without a compiler or the engine's library."""
    program = _compiled(folder, "server")
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"), None)
    if program is None or library is None:
        return None
    size = MAX_NAMING_BYTES if subject.shared else len(subject.request)
    return [str(word) for word in (program, library, subject.path, path, size, *subject.array.shape)]


def _compiled(folder: Path, name: str) -> Path | None:
    compiler, program = shutil.which("cc"), folder / name
    if compiler is None:
        return None
    if not program.exists():
        subprocess.run([compiler, "-O2", "-Wall", "-pthread", "-o", str(program), str(HERE / f"{name}.c")], check=True)
    return program


def drive(
    load: list[str], path: Path, request: Path, kind: str, clients: int, seconds: float, shared: Path | None = None
) -> dict[str, Any]:
    """`shared`: a file whose bytes every client shares as memory first."""
    command = [*load, "drive", str(path), str(request), kind, str(clients), str(seconds)]
    command += [] if shared is None else [str(shared)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=seconds + 60).stdout)
    found["per_s"] = found["answers"] / found["seconds"]
    return found


@contextlib.contextmanager
def running(
    command: list[str], path: Path, *, folder: Path | None = None, quiet: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """`command`, in `folder`, while the block runs, from the moment that something listens at `path`."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL if quiet else None, cwd=folder,
        env=environment(),
    )  # fmt: skip
    try:
        wait_for(path, process)
        yield process
    finally:
        process.terminate()
        process.wait()


def environment() -> dict[str, str]:
    """Whose servers keep their bytecode as an installed package does, whatever this shell says: else each start would compile the source."""
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
        "OPENBLAS_NUM_THREADS": "1",
    }


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{process.args!r} does not listen at {path}") from None
                time.sleep(0.001)
            else:
                return


def agent(*words: str | Path) -> list[str]:
    """The command line as it was installed, without what `python -m` would add."""
    return [str(Path(sys.executable).parent / "edge-agent"), *map(str, words)]


def first_prediction_s(model: Path, path: Path, array: Any) -> tuple[float, float]:
    """(seconds from starting the process to its first answer, PSS in MB when idle after it)."""
    began = time.perf_counter()
    with running(agent("run", model, "--socket", path), path) as process, Client(path) as client:
        while True:
            try:
                client.infer(model.stem, {"x": array})
                break
            except ClientError:
                time.sleep(0.001)
        seconds = time.perf_counter() - began
        return seconds, pss_mb(process.pid)


def pss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the kernel does not tell the proportional set size")
