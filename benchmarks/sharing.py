"""What the way to the server costs a picture (1x3x224x224 float32) from Python: through the socket, through memory, and in place.

python -m benchmarks.sharing prints the medians of five repeats, in one run, beside the engine called in this process, and beside the
least that another process can do: the same engine behind a blocking socket, on memory that both map, without any protocol.
"""

import contextlib
import mmap
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime

from agent.client import Client
from benchmarks import models, processes
from benchmarks.calm import Calm

REPEATS = 5
ROUNDS = 200  # of each way in one repeat


def p50_us(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def session_of(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def bare_process(path: Path, picture: np.ndarray) -> Iterator[Callable[[], object]]:
    """A call that has another process run the engine on shared memory. To be entered before this process has threads."""
    here, there = socket.socketpair()
    shared = np.frombuffer(mmap.mmap(-1, picture.nbytes), picture.dtype).reshape(picture.shape)
    shared[...] = picture
    child = os.fork()
    if child == 0:
        here.close()
        session = session_of(path)
        while there.recv(1024):
            session.run(["y"], {"x": shared})
            there.send(bytes(300))
        os._exit(0)
    there.close()

    def call() -> bytes:
        here.send(bytes(300))
        return here.recv(1024)

    try:
        yield call
    finally:
        here.close()
        os.waitpid(child, 0)


def measure(folder: Path, calm: Calm, repeats: int = REPEATS, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """For each way the p50 in microseconds of every repeat; the ways take turns."""
    path, picture, address = folder / "image.onnx", models.image_input(), folder / "sharing.sock"
    models.image(path)
    found: dict[str, list[float]] = {}
    with (
        bare_process(path, picture) as bare,
        processes.running(processes.agent("run", path, "--socket", address), address),
        Client(address) as client,
        Client(address, share_from_bytes=None) as plain,
    ):
        session = session_of(path)
        shared = client.array(picture.shape, picture.dtype)
        shared[...] = picture
        ways: dict[str, Callable[[], object]] = {
            "engine in this process": lambda: session.run(["y"], {"x": picture}),
            "engine in another": bare,
            "through the socket": lambda: plain.infer("image", {"x": picture}),
            "through memory": lambda: client.infer("image", {"x": picture}),
            "in place": lambda: client.infer("image", {"x": shared}),
        }
        for call in ways.values():
            p50_us(call, 50)
        for _ in range(repeats):
            for name, call in ways.items():
                found.setdefault(name, []).append(calm(lambda call=call: p50_us(call, rounds)))  # type: ignore[misc]
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), calm := Calm())
    engine = found["engine in this process"]
    print(f"{'':24}{'p50 µs':>10}{'× engine':>10}   median of {REPEATS}, range")
    for name, times in found.items():
        ratios = [one / base for one, base in zip(times, engine, strict=True)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{name:24}{statistics.median(times):10.0f}{statistics.median(ratios):10.3f}   {spread}")
    print(calm)


if __name__ == "__main__":
    main()
