"""Blobs in folders of this machine: a stick, a network share, a place where bundles are dropped."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from agent.contract import bundle
from agent.contract.reasons import Reason
from agent.sync.fetching.sources import NotHere, Reader
from agent.sync.problems import Problem

FOLDER_PLACE = 10
READ_BYTES = 256 * 1024
MAX_BUNDLES = 64
"""Bundles read per folder, the newest first: a stick full of films must not cost an hour."""

MAX_BLOBS = 100_000
"""Blobs whose place is remembered per folder. A bundle may name as many as it likes."""

_Place = tuple[Path, int, int]
"""A file, and where in it the blob begins and how long it is."""


class FolderBlobs:
    """A folder that has bundles (`*.bundle`, `*.tar`), or blobs as `blobs/<sha256>`. It may be missing, and may hold
    anything.
    """

    metered = False
    final = False

    def __init__(self, folder: Path, *, name: str = "", place: int = FOLDER_PLACE) -> None:
        self._folder = folder
        self.name = name or f"the folder {folder}"
        self.place = place
        self._lock = threading.Lock()
        self._known: dict[tuple[Path, int, int], dict[str, tuple[int, int]]] = {}

    @property
    def known(self) -> int:
        """How many blobs of bundles it knows the place of."""
        return sum(map(len, self._known.values()))

    @contextlib.contextmanager
    def open(self, sha256: str) -> Iterator[Reader]:
        path, offset, size = self._find(sha256)
        try:
            file = open_regular(path)
        except OSError as error:
            raise Problem(Reason.DOWNLOAD_FAILED, f"{path} cannot be read: {error.strerror}") from error

        @contextlib.contextmanager
        def read(start: int, end: int) -> Iterator[tuple[int, Iterator[bytes]]]:
            yield start, _bytes(file, path, offset + start, offset + min(end, size))

        with file:
            yield read

    def _find(self, sha256: str) -> _Place:
        alone = self._folder / "blobs" / sha256
        try:
            if stat.S_ISREG((status := alone.lstat()).st_mode):
                return alone, 0, status.st_size
        except OSError:
            pass  # then in a bundle, if the folder is there at all
        for path, found in self._bundles():
            if sha256 in found:
                return path, *found[sha256]
        raise NotHere(f"{self._folder} does not have it")

    def _bundles(self) -> Iterator[tuple[Path, dict[str, tuple[int, int]]]]:
        try:
            paths = [path for path in self._folder.iterdir() if path.suffix in {bundle.SUFFIX, ".tar"}]
            status = sorted(((path.lstat(), path) for path in paths), key=lambda one: -one[0].st_mtime_ns)
        except OSError:
            return
        with self._lock:
            known, self._known, left = self._known, {}, MAX_BLOBS
            for one, path in [pair for pair in status if stat.S_ISREG(pair[0].st_mode)][:MAX_BUNDLES]:
                key = (path, one.st_size, one.st_mtime_ns)
                found = self._known[key] = known[key] if key in known else _index(path, left)
                left -= len(found)
            listed = list(self._known.items())
        for key, found in listed:
            yield key[0], found


def _index(path: Path, most: int) -> dict[str, tuple[int, int]]:
    """sha256 → where the blob lies in the bundle, for at most `most` blobs. Empty for a file that is no bundle."""
    found: dict[str, tuple[int, int]] = {}
    with contextlib.suppress(OSError, bundle.BundleError), open_regular(path) as file:
        for member in bundle.members(file):
            if len(found) >= most:
                break
            if member.is_blob:
                found[member.name.removeprefix("blobs/")] = (member.offset, member.size_bytes)
    return found


def open_regular(path: Path) -> IO[bytes]:
    """A regular file for reading: neither a link nor a pipe, which could wait for ever.  Raises: OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(22, "it is not a regular file", str(path))
    return os.fdopen(fd, "rb", buffering=0)


def _bytes(file: IO[bytes], path: Path, start: int, end: int) -> Iterator[bytes]:
    while start < end:
        try:
            data = os.pread(file.fileno(), min(READ_BYTES, end - start), start)
        except OSError as error:
            raise Problem(Reason.DOWNLOAD_FAILED, f"{path} cannot be read: {error.strerror}") from error
        if not data:
            return
        start += len(data)
        yield data
