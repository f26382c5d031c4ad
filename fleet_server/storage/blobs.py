"""File contents by hash. A blob is complete and verified or not there at all; uploads can be resumed."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
from collections.abc import AsyncIterable
from pathlib import Path
from typing import IO, TYPE_CHECKING

from agent.contract import names
from fleet_server.errors import Conflict, Invalid, TooLarge
from fleet_server.storage.pending import Pending
from fleet_server.storage.shelves import Opened, Shelf

if TYPE_CHECKING:
    from hashlib import _Hash

MAX_BLOB_BYTES = 64 * 1024**3
CHUNK = 1024 * 1024
PIECE = 8 * CHUNK  # of what may have to come from elsewhere
LOOK_AGAIN_BYTES = 16 * CHUNK


class Blobs:
    """`shelf` holds complete blobs, `uploads` what is still coming."""

    def __init__(self, shelf: Shelf, uploads: Path) -> None:
        self._shelf = shelf
        self.uploads = uploads
        self.pending = Pending(shelf, uploads)

    def size(self, sha256: str) -> int | None:
        """The blob's size in bytes; None when it is not here."""
        return self._shelf.size(_checked(sha256))

    def open(self, sha256: str) -> Opened | None:
        """The blob, to be read; None when it is not here."""
        return self._shelf.open(_checked(sha256))

    def local(self, sha256: str) -> Path | None:
        """The blob's file, where it is one on this machine."""
        return self._shelf.local(_checked(sha256))

    def link(self, sha256: str) -> str | None:
        """Where a device may fetch the blob without this server; None where it may not."""
        return self._shelf.link(_checked(sha256))

    def partial_size(self, sha256: str) -> int:
        """How many bytes of an interrupted upload are here."""
        _checked(sha256)
        try:
            return (self.uploads / sha256).stat().st_size
        except FileNotFoundError:
            return 0

    def arrives(self, sha256: str) -> bool:
        """Whether an upload of it is under way."""
        _checked(sha256)
        try:
            with (self.uploads / sha256).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def matches(self, sha256: str) -> bool:
        """Whether the blob's bytes, where they are kept, still have its hash."""
        digest, opened = hashlib.sha256(), self.open(sha256)
        if opened is None:
            return False
        with contextlib.closing(opened) as file:
            for start in range(0, file.size, PIECE):
                digest.update(file.read(start, PIECE))
        return digest.hexdigest() == sha256

    async def receive(
        self, sha256: str, offset: int, body: AsyncIterable[bytes], account: str = "", limit: int = MAX_BLOB_BYTES
    ) -> int:
        """Stores the bytes of a blob from `offset` on; its size once all are here and verified.

        A connection that breaks leaves what arrived, and the sender goes on from `partial_size`. `limit`: how many bytes the
        account may have here that no release names.
        Raises: Conflict (another upload of it is under way, or `offset` is not where it stopped), Invalid (wrong hash),
        TooLarge.
        """
        partial = self.uploads / _checked(sha256)
        if (size := await asyncio.to_thread(self.size, sha256)) is not None:
            self.pending.seen(sha256)
            return size
        room = await asyncio.to_thread(self.pending.room, account, sha256, limit)
        self.pending.begin(sha256, account)
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "r+b") as file:
            locked = _lock(file)
            # Perhaps since a moment ago, and then `file` is the blob itself.
            if (size := await asyncio.to_thread(self.size, sha256)) is not None:
                partial.unlink(missing_ok=True)
                return size
            if not locked or not _is_at(file, partial):
                raise Conflict(f"blob {sha256} is being uploaded by somebody else; try again when that ended")
            digest, have = await asyncio.to_thread(_hash_start, file, offset)
            if have != offset:
                raise Conflict(
                    f"upload of blob {sha256} stopped at byte {have}, not {offset}; continue there", code="wrong_offset"
                )
            file.truncate()
            seen = have
            async for chunk in body:
                have += len(chunk)
                if have - seen > LOOK_AGAIN_BYTES:  # the account may upload others meanwhile
                    room, seen = await asyncio.to_thread(self.pending.room, account, sha256, limit), have
                if have > min(room, MAX_BLOB_BYTES):
                    raise TooLarge(f"this blob may have at most {min(room, MAX_BLOB_BYTES)} bytes", code="too_many_uploads")
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
            if digest.hexdigest() != sha256:
                partial.unlink()
                self.pending.forget([sha256])
                raise Invalid(
                    f"the bytes received have sha256 {digest.hexdigest()}, not {sha256}: the file changed or the upload was damaged",
                    code="hash_mismatch",
                )
            await asyncio.to_thread(self._shelf.put, sha256, partial)
        return have

    def remove(self, sha256: str) -> bool:
        """Removes a blob, or the part of one; whether it did. Not one that is being uploaded."""
        if not self.remove_part(sha256):
            return False
        self._shelf.remove(_checked(sha256))
        return True

    def remove_part(self, sha256: str) -> bool:
        """Removes what arrived of a blob, and that it waits for a release; whether it did. Not one that is being uploaded."""
        partial = self.uploads / _checked(sha256)
        with contextlib.suppress(FileNotFoundError), partial.open("rb") as file:
            if not _lock(file):
                return False
            partial.unlink()
        self.pending.forget([sha256])
        return True


def _checked(sha256: str) -> str:
    """`sha256` itself.  Raises: Invalid when it is no hash."""
    if not names.SHA256.fullmatch(sha256):
        raise Invalid(f"{sha256!r} is not a sha256: 64 lower-case hex digits expected")
    return sha256


def _lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _hash_start(file: IO[bytes], size: int) -> tuple[_Hash, int]:
    """The running hash of the first `size` bytes, and how many there were; leaves the file behind them."""
    digest, have = hashlib.sha256(), 0
    while have < size and (chunk := file.read(min(CHUNK, size - have))):
        digest.update(chunk)
        have += len(chunk)
    return digest, have
