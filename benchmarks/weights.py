"""Processes weighed against each other as systemd does it for services: control groups, where this user may make them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
FULL = 100  # systemd's CPUWeight of a service that says nothing
SHARES_OF_FULL = 1024  # the same in the first version of control groups
PREFIX = "edge-bench-"


class Weights:
    """`put` takes a process, and what it starts from then on, into a group."""

    def __init__(self) -> None:
        first, second = CGROUPS / "cpu", CGROUPS / "cgroup.subtree_control"
        self._groups: list[Path] = []
        self._root: Path | None = None
        self._file, self._scale = "cpu.weight", 1.0
        if first.is_dir():
            self._root, self._file, self._scale = first, "cpu.shares", SHARES_OF_FULL / FULL
        elif second.is_file() and "cpu" in second.read_text().split():
            self._root = CGROUPS
        if self._root is not None and not os.access(self._root, os.W_OK):
            self._root = None

    @property
    def work(self) -> bool:
        return self._root is not None

    def put(self, name: str, pid: int, weight: int = FULL, *, idle: bool = False) -> None:
        if self._root is None:
            return
        group = self._root / (PREFIX + name)
        if group not in self._groups:
            group.mkdir(exist_ok=True)
            self._groups.append(group)
            if idle:
                (group / "cpu.idle").write_text("1")
            else:
                (group / self._file).write_text(str(round(weight * self._scale)))
        (group / "cgroup.procs").write_text(str(pid))

    def close(self) -> None:
        """To be called when the processes have ended; who still lives goes where it came from."""
        for group in self._groups:
            assert self._root is not None
            for pid in (group / "cgroup.procs").read_text().split():
                with contextlib.suppress(OSError):  # it ended meanwhile
                    (self._root / "cgroup.procs").write_text(pid)
            with contextlib.suppress(OSError):
                group.rmdir()


@contextlib.contextmanager
def weights() -> Iterator[Weights]:
    made = Weights()
    try:
        yield made
    finally:
        made.close()
