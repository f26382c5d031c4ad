"""A file that is being put together in `staging/<sha256>`: bytes get into it only verified, and only whole files get out of it.

What a killed process left is hashed again, block by block, and what is right stays: no note of what is there is kept or believed.
Holes that were never written are skipped. Beside it lies `<sha256>.blocks`, which says what the file will be made of, so that
another download may take blocks from one that is not finished.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from agent.contract.codec import ContractError, decode, encode
from agent.contract.manifest import MAX_MANIFEST_BYTES, File
from agent.host import files
from agent.sync.fetching.layout import Piece, pieces, size_bytes

BLOCKS_SUFFIX = ".blocks"
READ_BYTES = 1 << 20


class Staged:
    """The bytes of one file on their way into the store. Only inside `staging`."""

    def __init__(self, path: Path, file: File, fd: int) -> None:
        self.path = path
        self.file = file
        self._fd = fd
        self._digest = hashlib.sha256()
        self._digested = 0
        self._missing: dict[int, Piece] = {}

    def look(self) -> None:
        """Finds out which pieces are there, by hashing what is.  Raises: OSError."""
        self._missing = {piece.start: piece for piece in pieces(self.file)}
        there = _data(self._fd, os.fstat(self._fd).st_size)
        for piece in list(self._missing.values()):
            self._find(piece, there)

    @property
    def missing(self) -> list[Piece]:
        """The pieces that are not there, in order."""
        return list(self._missing.values())

    @property
    def have_bytes(self) -> int:
        """How much of the file is there."""
        if self.file.blocks:
            return self.file.size_bytes - size_bytes(self._missing.values())
        return self._digested

    def _find(self, piece: Piece, there: list[tuple[int, int]]) -> None:
        while there and there[0][1] < piece.end:  # pieces are looked for in order
            there.pop(0)
        if there and there[0][0] <= piece.start:
            self._add(piece, os.pread(self._fd, piece.size_bytes, piece.start), write=False)

    def add(self, piece: Piece, data: bytes | bytearray | memoryview) -> bool:
        """Writes the piece if these are its bytes; whether they were.  Raises: OSError."""
        return self._add(piece, data, write=True)

    def _add(self, piece: Piece, data: bytes | bytearray | memoryview, *, write: bool) -> bool:
        if len(data) != piece.size_bytes or hashlib.sha256(data).digest() != piece.digest:
            return False
        if write:
            pwrite(self._fd, data, piece.start)
        self._missing.pop(piece.start, None)
        if (
            piece.start == self._digested
        ):  # in order, as in a first download: the bytes need not be read again for the whole file's hash
            self._digest.update(data)
            self._digested = piece.end
        return True

    # -- a file without blocks grows from its beginning --------------------------------------------------------------------

    def look_at_prefix(self) -> None:
        """Hashes what is staged. What cannot be the beginning of the file, or is as long and not the file, goes.  Raises: OSError."""
        size = os.fstat(self._fd).st_size
        if size > self.file.size_bytes or (size == self.file.size_bytes and self.sha256() != self.file.sha256):
            self.clear()
        self._read_up_to(os.fstat(self._fd).st_size)

    def append(self, data: bytes) -> None:
        """Raises: OSError."""
        pwrite(self._fd, data, self._digested)
        self._digest.update(data)
        self._digested += len(data)

    def clear(self) -> None:
        """Begins again.  Raises: OSError."""
        os.ftruncate(self._fd, 0)
        self._digest, self._digested = hashlib.sha256(), 0

    # -- the end -----------------------------------------------------------------------------------------------------------

    def sha256(self) -> str:
        """The hash of the whole file, in hex.  Raises: OSError."""
        self._read_up_to(os.fstat(self._fd).st_size)
        return self._digest.hexdigest()

    def move_to(self, blob: Path) -> None:
        """Gives the file its name in the store, durably.  Raises: OSError."""
        os.fsync(self._fd)
        self.path.replace(blob)
        files.sync_directory(blob.parent)

    def discard(self) -> None:
        """Raises: OSError."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def _read_up_to(self, end: int) -> None:
        while self._digested < end:
            data = os.pread(self._fd, min(READ_BYTES, end - self._digested), self._digested)
            if not data:
                return
            self._digest.update(data)
            self._digested += len(data)


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
        yield Staged(path, file, fd)
    finally:
        os.close(fd)


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
