"""What one step of the product does, counted instead of timed: calls of its functions, modules entered, files opened, documents parsed.

python -m benchmarks.calls counts a prediction (in `edge-agent run`, as installed), a step of a trial and of a watch (the update machine
on the stand of its tests), the start of a rollout and a report that changes nothing (a fleet server in this process). Counts do not
depend on how busy the machine is, so versions are compared by running this in each of their trees. Generators and comprehensions count
each time they are entered.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import BuiltinFunctionType, FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = tuple(f"{ROOT / name}{os.sep}" for name in ("agent", "runtimes", "fleet_server"))
PARSERS = {
    ("msgspec", "decode"),
    ("json.decoder", "decode"),
    ("yaml", "load"),
}  # the name of a module or its beginning, and of a function
PRIMING, ROUNDS = 100, 25  # requests before counting, and counted ones
DEVICES = 300
SETTLED_S = 0.05  # after an answer, until what follows it is over
REPORTS_S = 60.0  # between two reports of a device


@dataclass(frozen=True)
class Step:
    """One step. `crossings` are calls from a function of one module to one of another; `opened` counts regular files and folders."""

    calls: int
    functions: int
    modules: int
    crossings: int
    opened: int
    parsed: int


class Trace:
    """Counts what this process does while it is on, in threads that began after `install`, too."""

    def __init__(self) -> None:
        self.on = False
        self._called: Counter[tuple[str, str]] = Counter()
        self._crossings = self._opened = self._parsed = 0

    def install(self) -> None:
        sys.addaudithook(self._hear)
        threading.setprofile(self._see)
        sys.setprofile(self._see)

    def begin(self) -> None:
        self._called.clear()
        self._crossings = self._opened = self._parsed = 0
        self.on = True

    def end(self) -> Step:
        self.on = False
        modules = {module for module, _ in self._called}
        return Step(
            sum(self._called.values()), len(self._called), len(modules), self._crossings, self._opened, self._parsed
        )  # fmt: skip

    def _see(self, frame: FrameType, event: str, argument: object) -> None:
        if not self.on:
            return
        if event == "c_call":
            self._parsed += isinstance(argument, BuiltinFunctionType) and _is_parser(_owner(argument), argument.__name__)
        elif event == "call":
            code = frame.f_code
            if code.co_filename.startswith(PACKAGES):
                self._called[code.co_filename, code.co_qualname if sys.version_info >= (3, 11) else code.co_name] += 1
                caller = frame.f_back.f_code.co_filename if frame.f_back else ""
                self._crossings += caller != code.co_filename and caller.startswith(PACKAGES)
            elif code.co_name in ("decode", "load"):
                self._parsed += _is_parser(frame.f_globals.get("__name__", ""), code.co_name)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event == "open" and isinstance(arguments[0], (str, bytes)):
            self._opened += 1


def _owner(function: BuiltinFunctionType) -> str:
    return function.__module__ or type(function.__self__).__module__


def _is_parser(module: str, name: str) -> bool:
    return any(module.startswith(parser) and name == function for parser, function in PARSERS)


# -- predictions -----------------------------------------------------------------------------------------------------------------


def serve() -> None:
    """`edge-agent` with the words that follow, under a trace that a byte on standard input begins (b) and ends (e): what was counted
    is a line on standard output.
    """
    trace = Trace()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the server itself says

    def obey() -> None:
        while command := os.read(0, 1):
            if command == b"b":
                trace.begin()
            else:
                answers.write(json.dumps(asdict(trace.end())) + "\n")
                answers.flush()

    threading.Thread(target=obey, daemon=True).start()
    trace.install()
    from agent.cli import main

    main()


class Server:
    """A traced server at `path`."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        self._process, self._path = process, path

    def step(self, request: bytes) -> Step:
        """The least that this request takes on a connection that has sent it before: a busy machine makes cheap models look dear, and
        then they are answered by another thread.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        found = []
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self._path))
            for _ in range(PRIMING):
                _asked(sock, request)
            for _ in range(ROUNDS):
                self._process.stdin.write(b"b")
                self._process.stdin.flush()
                time.sleep(SETTLED_S)
                _asked(sock, request)
                time.sleep(SETTLED_S)
                self._process.stdin.write(b"e")
                self._process.stdin.flush()
                found.append(Step(**json.loads(self._process.stdout.readline())))
        return min(found, key=lambda step: step.calls)


def _asked(sock: socket.socket, request: bytes) -> None:
    sock.sendall(request)
    answer = sock.recv(1 << 20)
    if b" 200 " not in answer.split(b"\r\n", 1)[0]:
        raise RuntimeError(f"the server answered {answer[:200]!r}")


@contextlib.contextmanager
def traced_server(folder: Path, paths: list[Path]) -> Iterator[Server]:
    from benchmarks import processes

    path = folder / "s.sock"
    command = [
        sys.executable,
        "-c",
        "from benchmarks.calls import serve; serve()",
        "run",
        *map(str, paths),
        "--socket",
        str(path),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=processes.environment()
    )
    try:
        processes.wait_for(path, process)
        yield Server(process, path)
    finally:
        process.terminate()
        process.wait()


def predictions(folder: Path) -> dict[str, Step]:
    from benchmarks import models

    models.tiny(folder / "tiny.onnx")
    models.slow(folder / "slow.onnx")
    with traced_server(folder, [folder / "tiny.onnx", folder / "slow.onnx"]) as server:
        return {
            "a prediction, binary": server.step(models.request("tiny", models.tiny_input())),
            "a prediction, JSON": server.step(_in_json("tiny", models.tiny_input())),
            "one that waits (50 ms), binary": server.step(models.request("slow", models.slow_input())),
            "one that waits (50 ms), JSON": server.step(_in_json("slow", models.slow_input())),
        }


def _in_json(model: str, array: Any) -> bytes:
    tensor = {"name": "x", "shape": array.shape, "datatype": "FP32", "data": array.ravel().tolist()}
    body = json.dumps({"inputs": [tensor]}).encode()
    return b"POST /v2/models/%b/infer HTTP/1.1\r\nhost: bench\r\ncontent-length: %d\r\n\r\n%b" % (
        model.encode(),
        len(body),
        body,
    )


# -- updates ---------------------------------------------------------------------------------------------------------------------


def updates(folder: Path, trace: Trace) -> dict[str, Step]:
    from agent.contract.acceptance import WatchRules
    from agent.contract.reports import Phase
    from tests.sync.bench import Bench

    bench = Bench(folder)
    bench.install(1)
    bench.release(2, watch=WatchRules(duration_s=50.0, max_duration_s=100.0))
    bench.want(2)
    bench.step()
    bench.until(Phase.TRIALING)
    trace.begin()
    bench.step()
    found = {"a step of a trial": trace.end()}
    bench.until(Phase.WATCHING)
    bench.step()
    trace.begin()
    bench.step()
    found["a step of a watch"] = trace.end()
    return found


# -- the fleet server ------------------------------------------------------------------------------------------------------------


def fleet(folder: Path, trace: Trace) -> dict[str, Step]:
    """With DEVICES devices, of which none is reached by the rollout that runs meanwhile."""
    from agent.contract.names import ReleaseRef
    from agent.contract.reports import ModelState, Phase
    from fleet_server.access import SERVER
    from fleet_server.app import Fleet
    from fleet_server.config import FleetConfig, Folder
    from fleet_server.setup import init
    from tests.fleet.conftest import Clock
    from tests.fleet.stand import sha256
    from tests.fleet.test_rollouts import Story

    config = FleetConfig(fleet="bench", hosts=("127.0.0.1",))
    init(Folder(folder / "fleet"), config, offline_keys=folder / "offline", profile=folder / "profile.yaml")
    clock = Clock(time.time())

    def opened() -> Fleet:
        found = Fleet(Folder(folder / "fleet"), config, clock)
        found.releases_key = folder / "offline/releases.key"  # type: ignore[attr-defined]  # where Story looks for it
        return found

    story = Story(opened(), clock)
    story.publish(1, 2)
    story.join(*(f"d{number}" for number in range(DEVICES)))
    story.fleet.close()
    server, found = opened(), {}
    for name in ("the first `rollout start` after a restart", "a later `rollout start`"):
        trace.begin()
        rollout = server.rollouts.start(SERVER, ReleaseRef("digits", 1)).id
        found[name] = trace.end()
        server.rollouts.abort(SERVER, rollout)
    server.rollouts.start(SERVER, ReleaseRef("digits", 1), groups=["nobody"], confirm=True)
    device, state = story.devices["d1"], ModelState(serving=1, sha256=sha256(b"digits 1"), variant="cpu", phase=Phase.STEADY)
    device.fleet = server
    for counter in (1, 2, 3):
        clock.now += REPORTS_S
        report = device.report(counter, models={"digits": state})
        trace.begin()
        changes = device.state(report)
        if changes.models:
            server.judge.evaluate(changes.models)
        found["a report that changes nothing"] = trace.end()  # the last one
    server.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calls", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts")
    options = parser.parse_args()
    trace = Trace()
    with tempfile.TemporaryDirectory(prefix="edge-calls-") as name:
        folder = Path(name)
        for part in ("run", "device", "fleet"):
            (folder / part).mkdir()
        found = predictions(folder / "run")
        trace.install()
        found |= updates(folder / "device", trace) | fleet(folder / "fleet", trace)
    columns = list(asdict(next(iter(found.values()))))
    print(f"{'':42}" + "".join(f"{column:>11}" for column in columns))
    for name, step in found.items():
        print(f"{name:42}" + "".join(f"{getattr(step, column):11}" for column in columns))
    if options.json:
        options.json.write_text(json.dumps({name: asdict(step) for name, step in found.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
