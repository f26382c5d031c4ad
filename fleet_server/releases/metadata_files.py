"""The metadata files of the repository, as devices fetch them, and what of them is trusted: what timestamp.json leads to.

A file is read and parsed once, and again when it is another one (another name, time, size or inode). What is parsed is shared:
nobody changes it.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp  # type: ignore[attr-defined]

from agent.common import files

METADATA_NAME = re.compile(r"(timestamp|[1-9][0-9]{0,15}\.[A-Za-z0-9][A-Za-z0-9._-]{0,63})\.json")

T = TypeVar("T", Timestamp, Snapshot, Targets, Root)


class RepositoryDamaged(Exception):
    """The repository on disk does not hold together; the message says which file."""


class _Kept(msgspec.Struct):
    """The file of a role that was read last. `identity`: its time, size and inode; `metadata` once somebody asked for it."""

    name: str
    identity: tuple[int, int, int]
    data: bytes
    metadata: Any = None


class MetadataFiles:
    """One folder of metadata. Safe between threads.

    Raises: RepositoryDamaged from every method that reads, when trusted metadata is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: dict[str, _Kept] = {}

    def path(self, name: str) -> Path | None:
        """The file that a device asks for; None when no metadata can have that name."""
        return self.folder / name if METADATA_NAME.fullmatch(name) else None

    # -- what is trusted ---------------------------------------------------------------------------------------------------

    def timestamp(self) -> Metadata[Timestamp]:
        return self._parsed("timestamp.json", Timestamp)

    def snapshot(self) -> Metadata[Snapshot]:
        version = self.timestamp().signed.snapshot_meta.version
        return self._parsed(f"{version}.snapshot.json", Snapshot)

    def versions(self) -> dict[str, MetaFile]:
        """Each role's file name (`targets.json`) and the version of it that the snapshot names."""
        return self.snapshot().signed.meta

    def version(self, role: str) -> int:
        """Of targets, assignments, or a publisher's role."""
        return self.versions()[f"{role}.json"].version

    def role(self, role: str) -> Metadata[Targets]:
        """Targets, assignments, or a publisher's role."""
        return self._parsed(f"{self.version(role)}.{role}.json", Targets)

    def role_bytes(self, role: str) -> bytes:
        return self.data(f"{self.version(role)}.{role}.json")

    def roots(self) -> list[str]:
        """The files of all root versions, the oldest first."""
        found = sorted((path.name for path in self.folder.glob("*.root.json")), key=lambda name: int(name.split(".")[0]))
        if not found:
            raise RepositoryDamaged(f"{self.folder} has no root metadata")
        return found

    def root(self) -> Metadata[Root]:
        """The newest root: what a device trusts from its enrolment on."""
        return self._parsed(self.roots()[-1], Root)

    # -- files -------------------------------------------------------------------------------------------------------------

    def data(self, name: str) -> bytes:
        return self._read(name).data

    def write(self, name: str, metadata: Metadata[Any] | bytes) -> None:
        """Writes a file durably."""
        data = metadata if isinstance(metadata, bytes) else metadata.to_bytes()
        path = self.folder / name
        files.write(path, data)
        self._kept[_role_of(name)] = _Kept(name, _identity(path.stat()), data, None if metadata is data else metadata)

    def write_role(self, role: str, metadata: Metadata[Any]) -> None:
        """Writes a version of a role. Nobody trusts it before the timestamp leads to it."""
        self.write(f"{metadata.signed.version}.{role}.json", metadata)

    def remove_before(self, role: str, version: int, moment: float | None = None) -> None:
        """Removes the versions of a role up to this one; with a moment, of those the ones written before it."""
        for path in self.folder.glob(f"*.{role}.json"):
            with contextlib.suppress(FileNotFoundError):
                if int(path.name.split(".")[0]) <= version and (moment is None or path.stat().st_mtime < moment):
                    path.unlink()

    def parse(self, data: bytes, kind: type[T], name: str) -> Metadata[T]:
        """Metadata of the type `kind` in the bytes of the file `name`."""
        try:
            metadata = Metadata[T].from_bytes(data)
        except RepositoryError as error:
            raise RepositoryDamaged(f"{self.folder / name} cannot be read: {error}") from error
        if not isinstance(metadata.signed, kind):
            raise RepositoryDamaged(f"{self.folder / name} is of type {metadata.signed.type!r}")
        return metadata

    def _parsed(self, name: str, kind: type[T]) -> Metadata[T]:
        kept = self._read(name)
        if kept.metadata is None:
            kept.metadata = self.parse(kept.data, kind, name)
        found: Metadata[T] = kept.metadata
        return found

    def _read(self, name: str) -> _Kept:
        path, role = self.folder / name, _role_of(name)
        kept = self._kept.get(role)
        try:
            if kept is not None and kept.name == name and kept.identity == _identity(path.stat()):
                return kept
            with path.open("rb") as file:
                kept = _Kept(name, _identity(os.fstat(file.fileno())), file.read())
        except OSError as error:
            raise RepositoryDamaged(f"{path} cannot be read: {error}; restore the repository from a backup") from error
        self._kept[role] = kept
        return kept


def _role_of(name: str) -> str:
    """`12.releases.json` → `releases`, `timestamp.json` → `timestamp`."""
    return name.removesuffix(".json").lstrip("0123456789").removeprefix(".")


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_mtime_ns, found.st_size, found.st_ino
