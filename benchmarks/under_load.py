"""The tiny model's worst latencies while the server does something else: long predictions, dawdling clients, updates; and what loading leaves."""

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agent.client import Client
from agent.store import Choice, Selection, Store
from benchmarks import models, processes
from benchmarks.calm import Calm
from benchmarks.stores import control, release

LONG_CLIENTS = 4
LONG_S = 300  # unless ended before
LONG_RUNS = 2  # of these at a time, by the three threads of the server
DAWDLERS = 50
SWAP_PAUSE_S = 0.1  # far more often than any device updates
LOADS = (10, 100)


def swaps(folder: Path, load: list[str], repeats: int, seconds: float, calm: Calm, clients: int = 4) -> dict[str, Any]:
    """p99 with `clients` busy clients, before and while versions are loaded, activated and committed one after the other."""
    config, server = _store(folder)
    request = _request(folder)
    before, during, failures, count = [], [], 0, 0

    def ask() -> float:
        nonlocal failures
        found = processes.drive(load, server, request, "http", clients, seconds)
        failures += found["failures"]
        p99: float = found["p99_us"]
        return p99

    with processes.running(processes.agent("serve", "--config", config), server, quiet=True), Client(server) as client:
        for _ in range(repeats):
            before.append(calm(ask))
            swapped = [0]
            with meanwhile(lambda end, swapped=swapped: _swap(client, end, swapped)):  # type: ignore[misc]
                during.append(calm(ask))
            count += swapped[0]
    return {"clients": clients, "p99_before_us": before, "p99_during_us": during, "swaps": count, "failures": failures}


def mixed(folder: Path, load: list[str], repeats: int, seconds: float, calm: Calm) -> dict[str, list[float]]:
    """p99 of one client of the tiny model in three situations, in turns.

    `busy`: another process keeps the cores as busy with a 50 ms model as the server would. `long`: four clients ask the server for
    that model. `dawdlers`: as `long`, and many connections send a byte now and then.
    """
    tiny, slow, server = folder / "tiny.onnx", folder / "slow.onnx", folder / "mixed.sock"
    models.tiny(tiny)
    models.slow(slow)
    request, long_request = _request(folder), folder / "slow.request"
    long_request.write_bytes(models.request("slow", models.slow_input()))
    found: dict[str, list[float]] = {"busy": [], "long": [], "dawdlers": []}

    def ask() -> float:
        p99: float = calm(lambda: processes.drive(load, server, request, "http", 1, seconds))["p99_us"]
        return p99

    with processes.running(processes.agent("run", tiny, slow, "--socket", server), server):
        ask()  # the socket is there before the models are
        for _ in range(repeats):
            with _burning(slow):
                found["busy"].append(ask())
            with _process([*load, "drive", str(server), str(long_request), "http", str(LONG_CLIENTS), str(LONG_S)]):
                found["long"].append(ask())
                with _dawdlers(server):
                    found["dawdlers"].append(ask())
    return found


def loads(folder: Path) -> dict[int, float]:
    """Memory in MB after so many different models were loaded and unloaded."""
    config, server = _store(folder, guests=max(LOADS))
    found: dict[int, float] = {}
    with (
        processes.running(processes.agent("serve", "--config", config), server, quiet=True) as process,
        Client(server) as client,
    ):
        for number in range(max(LOADS)):
            control(client, f"guest-{number}", "load", {"version": 1, "variant": "cpu"})
            control(client, f"guest-{number}", "activate", {"version": 1})
            control(client, f"guest-{number}", "unload", {})
            if number + 1 in LOADS:
                found[number + 1] = processes.pss_mb(process.pid)
    return found


def _store(folder: Path, guests: int = 0) -> tuple[Path, Path]:
    """(agent.yaml, socket) of a store with two versions of the tiny model, and `guests` more models."""
    folder = folder / f"store-{guests}"
    folder.mkdir()
    store, tiny = Store.create(folder / "store"), folder / "tiny.onnx"
    models.tiny(tiny)
    for version in (1, 2):
        release(store, "tiny", version, tiny)
    for number in range(guests):
        release(store, f"guest-{number}", 1, tiny)
    store.select(Selection(model="tiny", active=Choice(version=1, variant="cpu")))
    config, server = folder / "agent.yaml", folder / "s.sock"
    config.write_text(f"store: {store.root}\nserve: {{socket: {server}}}\n")
    return config, server


def _request(folder: Path) -> Path:
    path = folder / "tiny.request"
    path.write_bytes(models.request("tiny", models.tiny_input()))
    return path


def _swap(client: Client, end: threading.Event, swapped: list[int]) -> None:
    version = client.status()["models"]["tiny"]["active"]
    while not end.wait(SWAP_PAUSE_S):
        version = 3 - version
        control(client, "tiny", "load", {"version": version, "variant": "cpu"})
        control(client, "tiny", "activate", {"version": version})
        control(client, "tiny", "commit", {})
        swapped[0] += 1


@contextlib.contextmanager
def meanwhile(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """`work` in a thread while the block runs; the event tells it to end."""
    end = threading.Event()
    thread = threading.Thread(target=work, args=(end,))
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


@contextlib.contextmanager
def _burning(model: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "benchmarks.burn", str(model), str(LONG_RUNS)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # it is at work, which takes it a second or more
        yield
    finally:
        process.terminate()
        process.communicate()


@contextlib.contextmanager
def _process(command: list[str]) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        threading.Event().wait(0.7)  # until it is at work
        yield
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def _dawdlers(server: Path) -> Iterator[None]:
    """Connections that each send one more byte of a request every 50 ms."""
    head = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: t\r\nx-slow: " + b"a" * 4000
    with contextlib.ExitStack() as stack:
        socks = []
        for _ in range(DAWDLERS):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(server))
            socks.append(sock)

        def dribble(end: threading.Event) -> None:
            for at in range(len(head)):
                for sock in socks:
                    sock.send(head[at : at + 1])
                if end.wait(0.05):
                    return

        with meanwhile(dribble):
            yield
