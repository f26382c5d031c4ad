"""Engines that are built once: in a process of their own, within limits, and kept under what they depend on.

An engine is found again by the bytes of its model (and of the files that belong to it), the library with its version, and everything that
was asked for. It gets its name when it is whole: whoever is killed leaves nothing that could be taken for an engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from runtimes import onnx_external
from runtimes.contract import ModelInvalid, RuntimeUnavailable
from runtimes.tensorrt import header
from runtimes.tensorrt.libraries import INSTALL
from runtimes.tensorrt.order import Order

LOOK_S = 0.1
END_S = 5.0
READ_BYTES = 1 << 20
LAST_WORDS = 400
_UNFINISHED = ".building-"

Progress = Callable[[str, int, int], None]
"""Is told the phase, and how many of its steps are done of how many."""


class Refused(Exception):
    """The engine cannot be built so: the message says why, and what to change."""


class OverLimit(Refused):
    """It took longer, or more memory, than it may."""


@dataclass(frozen=True, slots=True)
class Library:
    """What builds here."""

    name: str
    version: str


@dataclass(frozen=True, slots=True)
class Engine:
    """A built engine, and the compute capabilities that it is for. `seconds`: how long that took; 0 when it was `kept` from before."""

    path: Path
    library: Library
    capabilities: tuple[str, ...]
    seconds: float
    kept: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one build. `memory_bytes` is what its process may have resident."""

    seconds: float = 3600.0
    memory_bytes: int | None = None


class Builder:
    """Builds engines and keeps them in `folder`. One build at a time; `cancel` may be called by another thread."""

    def __init__(self, folder: Path, limits: Limits | None = None) -> None:
        self._folder, self._limits = folder, limits or Limits()
        self._cancelled = threading.Event()
        self._library: Library | None = None

    def library(self) -> Library:
        """What builds here, asked in a process of its own.  Raises: RuntimeUnavailable."""
        if self._library is None:
            asked = "import json; from runtimes.tensorrt.libraries import builder; l, m = builder(); print(json.dumps([l, str(m.__version__)]))"
            done = subprocess.run(  # noqa: S603 - this package's own module
                [sys.executable, "-c", asked], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            if done.returncode != 0:
                said = (
                    done.stderr.strip().rpartition("\n")[2].partition(": ")[2]
                    or f"it ended its process (status {done.returncode}); {INSTALL}"
                )
                raise RuntimeUnavailable(said)
            self._library = Library(*json.loads(done.stdout.strip().rpartition("\n")[2]))
        return self._library

    def build(self, order: Order, on_progress: Progress = lambda *_: None) -> Engine:
        """The engine, built now or before.  Raises: Refused, RuntimeUnavailable, ModelInvalid (no such model), OSError."""
        library = self.library()
        kept = self._folder / f"{key(order, library)}.engine"
        if (found := _whole(kept)) is not None:
            return Engine(kept, library, found.capabilities, 0.0, kept=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(self._folder)
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"{_UNFINISHED}{os.getpid()}-", dir=self._folder) as name:
            new = Path(name) / "engine"
            self._run(order, new, on_progress)
            made = header.read(new)
            new.replace(kept)
        return Engine(kept, library, made.capabilities, time.monotonic() - began, kept=False)

    def cancel(self) -> None:
        """Ends the build that goes on, and every later one, as refused."""
        self._cancelled.set()

    def _run(self, order: Order, out: Path, on_progress: Progress) -> None:
        child = subprocess.Popen(
            [sys.executable, "-m", "runtimes.tensorrt.building"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        watch = _Watch(child, self._limits, self._cancelled)
        errors: list[str] = []
        reading = threading.Thread(target=lambda stderr=child.stderr: errors.append(stderr.read()), daemon=True)
        reading.start()
        last: dict[str, Any] = {}
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(order.encoded(out) + "\n")
                child.stdin.close()
            for line in child.stdout:
                last = _said(line) or last
                if "phase" in last:
                    on_progress(last["phase"], last["done"], last["of"])
            child.wait()
        finally:
            watch.end()
            reading.join(END_S)
            for pipe in (child.stdin, child.stdout, child.stderr):
                with contextlib.suppress(OSError):
                    pipe.close()
        if watch.why:
            raise OverLimit(watch.why)
        if "refused" in last:
            raise Refused(last["refused"])
        if "built" not in last:
            raise Refused(f"building it ended its process ({_ending(child.returncode)}){_last_words(errors)}")


class _Watch:
    """Ends a child that takes too long or too much, or when the build is cancelled. `why`: in words, then."""

    def __init__(self, child: subprocess.Popen[str], limits: Limits, cancelled: threading.Event) -> None:
        self._child, self._limits, self._cancelled = child, limits, cancelled
        self.why = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="building", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Afterwards the child is gone."""
        self._over.set()
        self._kill()
        self._child.wait()
        self._thread.join()

    def _look(self) -> None:
        until = time.monotonic() + self._limits.seconds
        while not self._over.wait(LOOK_S) and self._child.poll() is None:
            most = self._limits.memory_bytes
            if self._cancelled.is_set():
                self.why = "it was cancelled"
            elif time.monotonic() > until:
                self.why = f"building it took longer than {self._limits.seconds:.0f} s"
            elif most is not None and _resident(self._child.pid) > most:
                self.why = f"building it took more than {most / 1e6:.0f} MB of memory"
            else:
                continue
            self._kill()
            return

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, signal.SIGKILL)


def _whole(path: Path) -> header.EngineHeader | None:
    """What an engine says that is there and not damaged, as far as its header tells."""
    try:
        return header.read(path)
    except ModelInvalid:
        return None


def key(order: Order, library: Library) -> str:
    """What an engine is found again by.  Raises: ModelInvalid when the model, or a file that belongs to it, is not there."""
    digest = hashlib.sha256()
    said = json.dumps([order.settings(), library.name, library.version], sort_keys=True)
    digest.update(said.encode())
    files = {"": order.model, **onnx_external.all_beside(order.model)} if order.model.is_file() else {"": order.model}
    for name in sorted(files):
        digest.update(f"\0{name}\0".encode())
        try:
            with files[name].open("rb") as file:
                while block := file.read(READ_BYTES):
                    digest.update(block)
        except OSError as error:
            raise ModelInvalid(f"{files[name]} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _remove_left_overs(folder: Path) -> None:
    """What those left who were killed in the middle of a build."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        pid = path.name[len(_UNFINISHED) :].partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _said(line: str) -> dict[str, Any] | None:
    """What a line says that is ours; a library may write lines of its own."""
    try:
        said = json.loads(line)
    except ValueError:
        return None
    return said if isinstance(said, dict) else None


def _resident(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def _last_words(errors: list[str]) -> str:
    said = " ".join("".join(errors).split())[-LAST_WORDS:]
    return f": {said}" if said else ""
