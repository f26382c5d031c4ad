"""A file that is being put together in `staging/<sha256>`: bytes get into it only verified, and only whole files get out of it.

What a killed process left is hashed again, block by block, and what is right stays: no note of what is there is kept or
believed. Holes that were never written are skipped. Beside it lies `<sha256>.blocks`, which says what the file will be made of,
so that another download may take blocks from one that is not finished.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.common import files
from agent.contract.codec import ContractError, decode, encode
from agent.contract.manifest import MAX_MANIFEST_BYTES, File
from agent.host.priority import rest
from agent.sync.fetching.pieces import Piece, pieces

BLOCKS_SUFFIX = ".blocks"
READ_BYTES = 1 << 16
LAG_BYTES = 1 << 20
"""How many bytes the hash of the whole file stays behind the writer before it reads on."""

WRITE_BACK_BYTES = 8 << 20
"""After so many bytes the disk is told to begin writing. Otherwise a large file goes to it all at once in the end, and the
download waits for that."""

_SYNC_FILE_RANGE_WRITE = 2


class Staged:
    """The bytes of one file on their way into the store. Only inside `staging`; one thread uses it."""

    def __init__(self, path: Path, file: File, fd: int) -> None:
        self.path = path
        self.file = file
        self._fd = fd
        self._missing: dict[int, Piece] = {}
        self._have = 0
        self._whole = _Whole(fd)

    @property
    def missing(self) -> list[Piece]:
        """The pieces that are not there, in order."""
        return list(self._missing.values())

    @property
    def have_bytes(self) -> int:
        """How much of the file is there."""
        return self._have

    # -- a file of blocks --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Finds out which pieces are there, by hashing what is.  Raises: OSError."""
        self._missing = {piece.start: piece for piece in pieces(self.file)}
        there = _data(self._fd, os.fstat(self._fd).st_size)
        for piece in self.missing:
            while there and there[0][1] < piece.end:
                there.pop(0)
            if there and there[0][0] <= piece.start:
                self._add(piece, os.pread(self._fd, piece.size_bytes, piece.start), write=False)
                rest()

    def add(self, piece: Piece, data: bytes | bytearray | memoryview) -> bool:
        """Writes the piece if these are its bytes; whether they were.  Raises: OSError."""
        return self._add(piece, data, write=True)

    def _add(self, piece: Piece, data: bytes | bytearray | memoryview, *, write: bool) -> bool:
        if len(data) != piece.size_bytes or hashlib.sha256(data).digest() != piece.digest:
            return False
        if write:
            pwrite(self._fd, data, piece.start)
        if self._missing.pop(piece.start, None) is not None:
            self._have += piece.size_bytes
            self._whole.may_read_up_to(next(iter(self._missing), self.file.size_bytes))
        return True

    # -- a file without grows from its beginning ---------------------------------------------------------------------------

    def check_prefix(self) -> None:
        """Treats what is staged as the file's beginning. What cannot be that is removed.  Raises: OSError."""
        self._have = os.fstat(self._fd).st_size
        if self._have > self.file.size_bytes or (self._have == self.file.size_bytes and self.sha256() != self.file.sha256):
            self.clear()

    def append(self, data: bytes) -> None:
        """Raises: OSError."""
        pwrite(self._fd, data, self._have)
        self._have += len(data)
        self._whole.may_read_up_to(self._have)

    def clear(self) -> None:
        """Begins again.  Raises: OSError."""
        self._whole.close()
        os.ftruncate(self._fd, 0)
        self._have, self._whole = 0, _Whole(self._fd)

    # -- the end -----------------------------------------------------------------------------------------------------------

    def sha256(self) -> str:
        """The hash of the whole file, in hex.  Raises: OSError."""
        return self._whole.finish(os.fstat(self._fd).st_size)

    def move_to(self, blob: Path) -> None:
        """Gives the file its name in the store, durably.  Raises: OSError."""
        os.fsync(self._fd)
        self.path.replace(blob)
        files.sync_directory(blob.parent)

    def discard(self) -> None:
        """Raises: OSError."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def close(self) -> None:
        self._whole.close()
        os.close(self._fd)


class _Whole:
    """The hash of a whole file that is being written, read behind the writer while it is still in the page cache: in a thread
    of its own, so that a download does not wait for a second hash beside that of its blocks.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._digest = hashlib.sha256()
        self._at = self._end = self._written_back = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def may_read_up_to(self, end: int) -> None:
        """Says that the file has its bytes before `end`."""
        if end - self._end < LAG_BYTES:
            return
        with self._changed:
            self._end = end
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hash", daemon=True)
            self._thread.start()

    def finish(self, size: int) -> str:
        """The hash of the first `size` bytes, in hex.  Raises: OSError."""
        self.close()
        while self._at < size and self._read(size):
            pass
        return self._digest.hexdigest()

    def close(self) -> None:
        """Ends the thread; what it did stays done."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread, self._closed = None, False

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._at < self._end)
                if self._closed:
                    return
            try:
                if not self._read(self._end):
                    return
            except OSError:
                return  # `finish` meets it again, where it can be told

    def _read(self, end: int) -> bool:
        data = os.pread(self._fd, min(READ_BYTES, end - self._at), self._at)
        self._digest.update(data)
        self._at += len(data)
        rest()
        if self._at - self._written_back >= WRITE_BACK_BYTES:
            begin_write_back(self._fd, self._written_back, self._at - self._written_back)
            self._written_back = self._at
        return bool(data)


@contextlib.contextmanager
def staging(folder: Path, file: File) -> Iterator[Staged]:
    """The file as it was left in `folder`, or an empty one.  Raises: OSError."""
    path = folder / file.sha256
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if file.blocks:
            if os.fstat(fd).st_size != file.size_bytes:
                os.ftruncate(fd, file.size_bytes)
            note = path.with_name(path.name + BLOCKS_SUFFIX)
            if not note.exists():
                note.write_bytes(encode(file))  # a hint: torn by a power cut, it is as good as none
        staged = Staged(path, file, fd)
    except BaseException:
        os.close(fd)
        raise
    with contextlib.closing(staged):
        yield staged


def noted(note: Path) -> File | None:
    """What a note beside a staged file says; None when it cannot be used."""
    try:
        return decode(note.read_bytes(), File, limit_bytes=MAX_MANIFEST_BYTES)
    except (OSError, ContractError):
        return None


def allocated_bytes(path: Path) -> int:
    """What a staged file takes on the disk; 0 when there is none. It may have holes."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def pwrite(fd: int, data: bytes | bytearray | memoryview, at: int) -> None:
    """All of `data`.  Raises: OSError."""
    written = os.pwrite(fd, data, at)
    while written < len(data):
        written += os.pwrite(fd, memoryview(data)[written:], at + written)


def begin_write_back(fd: int, start: int, count: int) -> None:
    """Lets the disk begin with a stretch, without waiting for it. A hint: where the kernel has no such call, nothing is
    lost.
    """
    call = _sync_file_range()
    if call is not None:
        call(fd, ctypes.c_longlong(start), ctypes.c_longlong(count), _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range() -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), "sync_file_range", None)


def _data(fd: int, size: int) -> list[tuple[int, int]]:
    """Where the file has data, in order; all of it on a file system that does not tell."""
    found, at = [], 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                break
            return [(0, size)]
        found.append((start, at))
    return found
