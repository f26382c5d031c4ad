"""What a trial does to its own process before it touches the model, and what it notices of attempts to get out. Best effort
each: under systemd the unit does most of it too, and with more right.

 1. No new privileges, no core file, death with the parent, and adoption of whatever is started, so that nothing outlives it
    unseen.
 2. No network: a network namespace of its own where the kernel allows that, and TCP refused by Landlock where it knows how.
 3. No file is written but in the scratch folder and in /dev (Landlock); no process outside is signalled.
 4. Bounds on memory, processor time, files, tasks and the time by the clock.

What Python code asks for is heard in addition, so that a refusal can say what was tried. Native code is not heard, only held.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import socket
import stat
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.contract.reasons import Reason
from agent.sync.trials.protocol import Limits

GRACE_S = 5.0
"""So long after the time that its parent allows a trial ends itself: the parent is gone then."""

LINGER_S = 0.5
"""How long helpers that were told to end may take."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture
_LANDLOCK_VERSION = 1
_BENEATH = 1
_WRITES = {1: sum(1 << bit for bit in (1, *range(4, 13))), 2: 1 << 13, 3: 1 << 14}
"""What the kernel can forbid of files, by the version that brought it: writing, removing, making, linking across folders,
truncating."""
_TCP = 0b11
_SCOPES = 0b11  # abstract Unix sockets and signals
_OPENS_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_FULL = ("No space left on device", "File too large", "Disk quota exceeded")


def scratch() -> Path:
    """The folder in which the trial may write."""
    return Path(os.environ.get("TMPDIR") or tempfile.gettempdir())


def sandbox_process() -> None:
    """Before the first thread exists: a process with threads may not enter a user namespace, and other threads would stay
    free.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.dont_write_bytecode = True
    if libc.unshare(_CLONE_NEWNET) != 0:
        libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    _landlock(libc, (scratch(), Path("/dev")))


def _landlock(libc: Any, writable: Sequence[Path]) -> None:
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(_LANDLOCK_VERSION))
    if version < 1:
        return
    writes = sum(mask for since, mask in _WRITES.items() if version >= since)
    fields = [writes, *([_TCP] if version >= 4 else []), *([_SCOPES] if version >= 6 else [])]
    rules = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = libc.syscall(_LANDLOCK_CREATE, rules, ctypes.c_size_t(len(rules)), ctypes.c_uint32(0))
    if ruleset < 0:
        return
    try:
        for folder in writable:
            with contextlib.suppress(OSError):
                parent = os.open(folder, os.O_PATH | os.O_CLOEXEC)
                try:
                    rule = struct.pack("=Qi", writes, parent)
                    libc.syscall(_LANDLOCK_ADD, ruleset, _BENEATH, rule, ctypes.c_uint32(0))
                finally:
                    os.close(parent)
        libc.syscall(_LANDLOCK_RESTRICT, ruleset, ctypes.c_uint32(0))
    finally:
        os.close(ruleset)


def limit_process(limits: Limits) -> None:
    """Bounds on memory, processor time, open files and tasks. Address space stays free: GPU drivers reserve hundreds of GB of
    it.
    """
    wanted = (
        (resource.RLIMIT_DATA, limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_NPROC, 512),  # counts all tasks of the user, so it must leave room for `sync` itself
        (resource.RLIMIT_FSIZE, 1 << 30),  # room for an engine cache, none for filling the disk
    )
    for which, value in wanted:
        _, hard = resource.getrlimit(which)
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(which, (bound, bound))
    if limits.wall_s is not None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, limits.wall_s + GRACE_S)


def end_with(channel: int) -> None:
    """The process ends when the other side of this socket does, whatever it is doing: systemd knows nothing of who asked for
    it.

    The request must have been read to its end, or that would be taken for it. A pipe tells nothing, and is not needed to.
    """
    with contextlib.suppress(OSError):
        if not stat.S_ISSOCK(os.fstat(channel).st_mode):
            return
        signal.signal(signal.SIGIO, signal.SIG_DFL)  # which ends the process
        fcntl.fcntl(channel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(channel, fcntl.F_SETFL, fcntl.fcntl(channel, fcntl.F_GETFL) | os.O_ASYNC)


class Witness:
    """Hears what Python code in this process asks for."""

    def __init__(self) -> None:
        self.network = ""
        self.wrote = ""
        self._scratch = str(scratch().resolve())

    def listen(self) -> None:
        """For the rest of the process's life: an audit hook cannot be taken away, which is why it is one."""
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.bind", "socket.sendto"):
            if getattr(arguments[0], "family", None) in (socket.AF_INET, socket.AF_INET6):
                self.network = self.network or f"{event.removeprefix('socket.')} {arguments[1]!r}"[:200]
        elif event == "socket.getaddrinfo":
            self.network = self.network or f"look up {arguments[0]!r}"[:200]
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _OPENS_TO_WRITE:
            self._heard_of_file(arguments[0])

    def _heard_of_file(self, path: object) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a descriptor that is open already
        where = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - of bytes and strings alike, and following nothing
        if not where.startswith((self._scratch + "/", "/dev/", "/proc/")):
            self.wrote = self.wrote or where[:200]

    def reason(self, failure: str) -> tuple[Reason, str] | None:
        """Why it failed with this message, if that was an attempt to get out."""
        if any(words in failure for words in _FULL):
            return Reason.TRIAL_SCRATCH, f"it filled the space that a trial may use: {failure}"
        if self.network:
            return Reason.TRIAL_NETWORK, f"it wanted to {self.network}: a model has no network"
        if self.wrote and ("Permission denied" in failure or "Read-only file system" in failure):
            return Reason.TRIAL_WROTE, f"it wanted to write {self.wrote}: a model writes in its scratch folder only"
        return None


def started() -> list[str]:
    """The names of processes that were started here and are still there; they are ended by this."""
    found: list[str] = []
    end = time.monotonic() + LINGER_S
    while _children() and time.monotonic() < end:
        time.sleep(0.01)
    while alive := _children():
        for pid in alive:
            name = _name(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            if name is not None:
                found.append(name)
    return found


def _children() -> list[int]:
    """Ours, and those that were adopted: whatever a child of ours started becomes ours when that child ends."""
    pids = [int(pid) for task in Path("/proc/self/task").iterdir() for pid in _read(task / "children").split()]
    for pid in list(pids):
        if _state(pid) == "Z":
            pids.remove(pid)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
    return pids


def _state(pid: int) -> str:
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split(maxsplit=1)
    return fields[0] if fields else "Z"


def _name(pid: int) -> str | None:
    return _read(Path(f"/proc/{pid}/comm")).strip() or None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
