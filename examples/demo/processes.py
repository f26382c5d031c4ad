"""Starting, watching and ending the demo's processes. Whatever happens, none is left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1
BIN = Path(sys.executable).parent


class StepFailed(Exception):
    """The story did not go as told; the message says what was expected and what was seen."""


def die_with_parent() -> None:
    """Runs in a child between fork and exec: when the demo is killed, so are its parts."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def command(name: str, *arguments: object) -> list[str]:
    """The command line of one of our programs, from the environment that runs the demo."""
    return [str(BIN / name), *map(str, arguments)]


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on right now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Processes:
    """The running parts, each with a log file under `logs`."""

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        self.logs = logs
        self.environment = {**os.environ, **environment}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, line: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                line,
                stdin=options.pop("stdin", subprocess.DEVNULL),  # type: ignore[arg-type]
                stdout=options.pop("stdout", log),  # type: ignore[arg-type]
                stderr=log,
                env=self.environment,
                preexec_fn=die_with_parent,
            )
        self._running[name] = process
        return process

    def call(self, *line: str) -> str:
        """Runs a command to its end and returns what it printed.  Raises: StepFailed with its error output."""
        done = subprocess.run(line, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            shown = " ".join(Path(word).name if word.startswith(str(BIN)) else word for word in line)
            raise StepFailed(f"{shown} ended with status {done.returncode}:\n{done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def pid(self, name: str) -> int:
        return self._running[name].pid

    def kill(self, name: str) -> None:
        """kill -9."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def terminate(self, *names: str) -> list[int]:
        """SIGTERM to all of them at once; how each ended."""
        ending = [self._running.pop(name) for name in names]
        for process in ending:
            process.terminate()
        return [process.wait(30) for process in ending]

    def check(self) -> None:
        """Raises: StepFailed when a part ended by itself."""
        for name, process in self._running.items():
            if process.poll() is not None:
                lines = (self.logs / f"{name}.log").read_text(errors="replace").splitlines()[-15:]
                raise StepFailed(f"{name} ended with status {process.returncode}; the end of its log:\n" + "\n".join(lines))

    def end(self) -> None:
        """SIGTERM for all, in the reverse order of starting, then SIGKILL for what is left."""
        running = list(self._running.values())[::-1]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + 8
        for process in running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()


@contextlib.contextmanager
def processes(logs: Path, environment: Mapping[str, str]) -> Iterator[Processes]:
    logs.mkdir(parents=True, exist_ok=True)
    group = Processes(logs, environment)
    try:
        yield group
    finally:
        group.end()


def wait_for(what: str, condition: Callable[[], object], *, limit_s: float, tick: Callable[[], None]) -> float:
    """Seconds until `condition` became true; `tick` runs between looks.  Raises: StepFailed after `limit_s`."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > limit_s:
            raise StepFailed(f"{what}: not within {limit_s:.0f} s")
        tick()
        time.sleep(0.05)
    return time.monotonic() - start
