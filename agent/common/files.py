"""The one way this program writes files that must survive a power cut."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_UNFINISHED = ".tmp"

ABANDONED_AFTER_S = 60.0
"""A file that is being written is not older than this; what kill -9 or a power cut left becomes so."""


def sync_directory(directory: Path) -> None:
    """Makes names created, renamed or removed in `directory` durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def replacing(path: Path, *, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """A file to write; when the block ends well, `path` is replaced by it at once and durably. Otherwise `path` is untouched.

    Raises: OSError (no space, read-only), with nothing left behind.
    """
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_UNFINISHED, dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise
    sync_directory(path.parent)


def write(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replaces the contents of `path` by `data`, durably and all at once.  Raises: OSError."""
    with replacing(path, mode=mode) as file:
        file.write(data)


def sweep(root: Path, *, older_than_s: float = ABANDONED_AFTER_S) -> None:
    """Removes what writes that were cut off left below `root`. Nothing ever reads it; it only takes room.  Raises: OSError."""
    for path in root.rglob(f".*{_UNFINISHED}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= older_than_s:
                path.unlink()


def make_directory(path: Path, *, mode: int = 0o755) -> None:
    """Makes `path` and its missing parents, durably."""
    if path.is_dir():
        return
    make_directory(path.parent, mode=mode)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=mode)
    sync_directory(path.parent)


def remove(path: Path) -> None:
    """Removes `path` durably; nothing to do when it is not there."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        sync_directory(path.parent)


def read_regular(path: Path, limit_bytes: int) -> bytes:
    """The contents of a plain file, up to the limit and a byte more; neither a link nor a pipe can make the reader wait or stray.

    Raises: OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(f"{path} is not a file")
        return file.read(limit_bytes + 1)
