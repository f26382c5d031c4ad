"""Where whole files of releases stand, by their hash: in a folder of this machine. An object store is in `object_store`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from agent.common import files


class Opened(Protocol):
    """A file to read pieces of."""

    size: int

    def read(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset` on; fewer only at the end.  Raises: Unavailable, OSError."""
        ...

    def close(self) -> None: ...


class Shelf(Protocol):
    """Whole files by their sha256. What is on it is never changed.

    Raises: Unavailable from every method when it does not answer; OSError.
    """

    def size(self, sha256: str) -> int | None:
        """In bytes; None when it is not here."""
        ...

    def open(self, sha256: str) -> Opened | None:
        """None when it is not here."""
        ...

    def local(self, sha256: str) -> Path | None:
        """The file itself, where it stands on this machine's disk."""
        ...

    def link(self, sha256: str) -> str | None:
        """A URL from which whoever has it may fetch the file; None where there are none."""
        ...

    def put(self, sha256: str, path: Path) -> None:
        """Takes over a file that was verified, which is gone from `path` then. Done twice, it is done once."""
        ...

    def remove(self, sha256: str) -> None: ...

    def all(self) -> Iterable[tuple[str, float]]:
        """Every file's sha256, and when it was put here, in seconds since the epoch."""
        ...


class FolderShelf:
    """A folder, on the file system on which uploads arrive."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def size(self, sha256: str) -> int | None:
        try:
            return (self.root / sha256).stat().st_size
        except FileNotFoundError:
            return None

    def open(self, sha256: str) -> Opened | None:
        try:
            return open_file(self.root / sha256)
        except FileNotFoundError:
            return None

    def local(self, sha256: str) -> Path | None:
        path = self.root / sha256
        return path if path.is_file() else None

    def link(self, sha256: str) -> str | None:
        del sha256
        return None

    def put(self, sha256: str, path: Path) -> None:
        path.chmod(0o644)
        path.rename(self.root / sha256)
        files.sync_directory(self.root)

    def remove(self, sha256: str) -> None:
        (self.root / sha256).unlink(missing_ok=True)

    def all(self) -> Iterable[tuple[str, float]]:
        for path in self.root.iterdir():
            with contextlib.suppress(FileNotFoundError):
                yield path.name, path.stat().st_mtime


def open_file(path: Path) -> Opened:
    """A file of this machine.  Raises: OSError."""
    return _OpenedFile(path)


class _OpenedFile:
    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._fd).st_size

    def read(self, offset: int, count: int) -> bytes:
        return os.pread(self._fd, count, offset)

    def close(self) -> None:
        os.close(self._fd)
