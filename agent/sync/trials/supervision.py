"""A trial that is a child of ours: what it starts and what it writes is checked while it runs, and removed when it has
ended.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil

from agent.contract.reasons import Reason
from agent.sync.problems import Problem

MAX_PROCESSES = 32
"""Processes that a trial may have beside itself. An engine starts none or a few helpers."""

MAX_FILES = 50_000
"""Files and folders that a trial may make. An engine's cache has a few. Each check of a running trial counts them."""

MAX_PATH = 3000
"""Longer paths cannot be used much longer (PATH_MAX), and no engine has any."""

FLAT = 100
"""Levels of folders that are removed by recursion: Python's ends somewhere below 1000."""

MAX_PASSES = 3


class Supervisor:
    """Checks one trial, which leads a session of its own, and clears up after it."""

    def __init__(self, pid: int, scratch: Path, scratch_bytes: int) -> None:
        self._pid = pid
        self._scratch = scratch
        self._scratch_bytes = scratch_bytes
        self._seen: dict[int, psutil.Process] = {}

    def check(self) -> Problem | None:
        """Why the trial must be ended now; None when it may go on."""
        self._count()
        alive = sum(process.is_running() for process in self._seen.values())
        if alive > MAX_PROCESSES:
            message = f"it started {alive} processes; a trial may have {MAX_PROCESSES} beside itself"
            return Problem(Reason.TRIAL_FORKED, message, {"processes": alive})
        size, files = _taken(self._scratch)
        if files > MAX_FILES:
            message = f"it made more than {MAX_FILES} files and folders in its scratch folder"
            return Problem(Reason.TRIAL_SCRATCH, message, {"scratch_files": files})
        if size > self._scratch_bytes:
            message = f"it wrote {size} bytes to its scratch folder, at most {self._scratch_bytes} allowed"
            return Problem(Reason.TRIAL_SCRATCH, message, {"scratch_bytes": size})
        return None

    def gone(self) -> bool:
        """Whether it has ended; it is not reaped by this."""
        try:
            return os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def end(self, child: subprocess.Popen[bytes]) -> None:
        """Ends the child and whatever it started, also what left its session: the child adopts that, so it was seen below
        it.
        """
        self._count()
        if child.returncode is None:  # not reaped yet: its session id, which is its pid, is nobody else's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
        for process in (*self._seen.values(), *self._session()):
            with contextlib.suppress(psutil.Error):
                process.kill()
        child.wait()

    def _session(self) -> list[psutil.Process]:
        """Those that are still in it; while there are any, its number is not given to another one."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getsid(process.pid) == self._pid:
                    found.append(process)
        return found

    def _count(self) -> None:
        with contextlib.suppress(psutil.Error):
            self._seen |= {process.pid: process for process in psutil.Process(self._pid).children(recursive=True)}


def _taken(folder: Path) -> tuple[int, int]:
    """What is below it, in bytes on the disk (a hole takes nothing) and in number; of too many only that there are. However
    deep they are, and whatever comes and goes meanwhile.
    """
    size, count, left = 0, 0, [str(folder)]
    while left and count <= MAX_FILES:
        with contextlib.suppress(OSError), os.scandir(left.pop()) as entries:
            for entry in entries:
                count += 1
                with contextlib.suppress(OSError):
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
                if count > MAX_FILES or len(entry.path) > MAX_PATH:
                    return size, MAX_FILES + 1
    return size, count


def remove_tree(folder: Path) -> None:
    """Whatever is there, however deep: `shutil.rmtree` gives up at Python's recursion limit. Best effort."""
    for _ in range(MAX_PASSES):
        _flatten(folder)
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


def _flatten(folder: Path) -> None:
    """Moves folders that are deep to the top, a stretch at a time."""
    with contextlib.suppress(OSError):
        while (deep := _deep(folder)) is not None:
            deep.rename(folder / f".deep-{time.monotonic_ns()}")


def _deep(folder: Path) -> Path | None:
    """The first folder that is FLAT levels below it."""
    left = [(str(folder), 0)]
    while left:
        path, depth = left.pop()
        if depth == FLAT:
            return Path(path)
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            left += [(entry.path, depth + 1) for entry in entries if entry.is_dir(follow_symlinks=False)]
    return None
