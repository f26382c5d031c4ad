"""The file that a backup is: a tar whose first member says what it is and whose last one lists the hash of every other.

It is written and read in one pass, so it may come from a pipe. What is read is believed only when the list of hashes has come and
fits; names outside of a fleet's folder, links and devices are refused before anything is written.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

from agent.common import files
from agent.contract.codec import ContractError, decode
from fleet_server.errors import Invalid

FORMAT = 1
DESCRIPTION, HASHES = "backup.json", "hashes.json"
CHUNK = 1024 * 1024
MAX_DOCUMENT_BYTES = 256 * 1024 * 1024  # of the list of hashes: a million files
_NAME = re.compile(
    r"fleet\.yaml|database\.sqlite3|blobs/[0-9a-f]{64}|(?:pki|keys|keys/next|repository/metadata)/[A-Za-z0-9][A-Za-z0-9._-]*"
    r"|repository/targets(?:/[A-Za-z0-9][A-Za-z0-9._-]*)+"
)
_PRIVATE = ("pki/", "keys/", "database.sqlite3")

Progress = Callable[[int], None]
"""Told how many bytes were handled since it was told last."""


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup is of."""

    format: int
    fleet: str
    taken: float
    """When, in seconds since the epoch."""
    software: str
    """The version of edge-fleet that took it."""
    ca_sha256: str
    metadata: dict[str, int]
    """The version of each signed role."""
    devices: int
    releases: int
    blobs: int | None
    """How many files of releases are in it; None when they were left out."""


class Writer:
    """Writes a backup to a file that need not be seekable. `progress` is told of what the archive holds."""

    def __init__(self, out: IO[bytes], description: Description, progress: Progress = lambda _: None) -> None:
        self._tar = tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - closed by `close`
        self._hashes: dict[str, str] = {}
        self._progress = progress
        self.add_bytes(DESCRIPTION, msgspec.json.encode(description))

    def add_bytes(self, name: str, data: bytes) -> None:
        self._tar.addfile(_member(name, len(data)), io.BytesIO(data))
        self._hashes[name] = hashlib.sha256(data).hexdigest()
        self._progress(len(data))

    def add_file(self, name: str, path: Path) -> None:
        """A file that does not change meanwhile.  Raises: OSError, also when it got shorter."""
        with path.open("rb") as file:
            reader = _Hashing(file, self._progress)
            self._tar.addfile(_member(name, os.fstat(file.fileno()).st_size), reader)
        self._hashes[name] = reader.digest.hexdigest()

    def close(self) -> None:
        """Without it the archive counts as cut off."""
        data = msgspec.json.encode(self._hashes)
        self._tar.addfile(_member(HASHES, len(data)), io.BytesIO(data))
        self._tar.close()


def describe(source: IO[bytes]) -> Description:
    """What the backup is of, by its beginning.  Raises: Invalid."""
    try:
        with tarfile.open(fileobj=source, mode="r|") as tar:
            return _description(tar, tar.next())
    except (tarfile.TarError, EOFError) as error:
        raise _not_one(error) from error


def unpack(source: IO[bytes], folder: Path, progress: Progress = lambda _: None) -> Description:
    """Writes what a backup holds into an empty folder.

    Raises: Invalid when it is no backup, one of a newer version, cut off, or damaged; OSError. What was written by then must not be
    used.
    """
    hashes: dict[str, str] = {}
    expected: dict[str, str] | None = None
    try:
        with tarfile.open(fileobj=source, mode="r|") as tar:
            description = _description(tar, tar.next(), hashes)
            while (member := tar.next()) is not None:
                if member.name == HASHES:
                    expected = decode(_bytes(tar, member), dict[str, str], limit_bytes=MAX_DOCUMENT_BYTES)
                    break
                hashes[member.name] = _write(tar, member, folder, progress)
    except (tarfile.TarError, EOFError, ContractError) as error:
        raise _not_one(error) from error
    if expected is None:
        raise Invalid("the backup is cut off: its end is missing; take another copy of it", code="bad_backup")
    wrong = sorted(name for name in {*hashes, *expected} if hashes.get(name) != expected.get(name))
    if wrong:
        raise Invalid(
            f"the backup is damaged: {wrong[0]} is not what was written (and {len(wrong) - 1} more)", code="bad_backup"
        )
    return description


def _description(tar: tarfile.TarFile, member: tarfile.TarInfo | None, hashes: dict[str, str] | None = None) -> Description:
    if member is None or member.name != DESCRIPTION:
        raise Invalid("this is no backup of a fleet server (edge-fleet backup writes one)", code="bad_backup")
    data = _bytes(tar, member)
    if hashes is not None:
        hashes[DESCRIPTION] = hashlib.sha256(data).hexdigest()
    try:
        number = decode(data, dict[str, object], limit_bytes=MAX_DOCUMENT_BYTES).get("format")
        if isinstance(number, int) and number > FORMAT:
            raise Invalid(
                f"a newer version of edge-fleet took this backup (format {number}): install that one", code="bad_backup"
            )
        return decode(data, Description, limit_bytes=MAX_DOCUMENT_BYTES)
    except ContractError as error:
        raise _not_one(error) from error


def _not_one(error: Exception) -> Invalid:
    return Invalid(f"this is no backup of a fleet server, or it is cut off or damaged: {error}", code="bad_backup")


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    return member


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member) if member.isfile() and member.size <= MAX_DOCUMENT_BYTES else None
    if file is None:
        raise Invalid(f"the backup holds {member.name!r}, which is no file or too large", code="bad_backup")
    return file.read()


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, progress: Progress) -> str:
    """Writes one member; the sha256 of what was written."""
    file = tar.extractfile(member) if member.isreg() and _NAME.fullmatch(member.name) else None
    if file is None:
        raise Invalid(
            f"the backup holds {member.name!r}, which is nothing of a fleet server; it was not unpacked", code="bad_backup"
        )
    path = folder / member.name
    files.make_directory(path.parent, mode=0o700)
    mode = 0o600 if member.name.startswith(_PRIVATE) else 0o644
    reader = _Hashing(file, progress)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "wb") as out:
        while chunk := reader.read(CHUNK):
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    return reader.digest.hexdigest()


class _Hashing(io.RawIOBase):
    """Reads on, hashes what is read, and tells of it."""

    def __init__(self, file: IO[bytes], progress: Progress) -> None:
        self._file, self._progress = file, progress
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        self._progress(len(data))
        return data
