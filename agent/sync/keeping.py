"""A trial that is a child of ours: what it starts and what it writes is looked at while it runs, and gone when it has ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import psutil

from agent.contract.reasons import Reason
from agent.sync.problems import Problem

MAX_PROCESSES = 32
"""Beside the trial itself. An engine starts none or a few helpers."""


class Keeper:
    """Of one trial, which leads a session of its own."""

    def __init__(self, pid: int, scratch: Path, scratch_bytes: int) -> None:
        self._pid = pid
        self._scratch = scratch
        self._scratch_bytes = scratch_bytes
        self._seen: dict[int, psutil.Process] = {}

    def look(self) -> Problem | None:
        """Why it must be ended now."""
        self._count()
        alive = sum(process.is_running() for process in self._seen.values())
        if alive > MAX_PROCESSES:
            message = f"it started {alive} processes; a trial may have {MAX_PROCESSES} beside itself"
            return Problem(Reason.TRIAL_FORKED, message, {"processes": alive})
        size = sum(_bytes(path) for path in self._scratch.rglob("*"))
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
        """Ends the child and whatever it started, also what left its session: the child adopts that, so it was seen below it."""
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


def _bytes(path: Path) -> int:
    """On the disk: a hole in a file takes nothing."""
    try:
        return path.lstat().st_blocks * 512
    except OSError:
        return 0
