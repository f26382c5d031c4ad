"""The metadata of the repository, as devices fetch it, and what of it is trusted: what timestamp.json leads to.

A document is read and parsed once, and again when it is another one. What is parsed is shared: nobody changes it.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, TypeVar

import msgspec
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp  # type: ignore[attr-defined]

from fleet_server.storage.documents import Documents

FOLDER = "metadata"
METADATA_NAME = re.compile(r"(timestamp|[1-9][0-9]{0,15}\.[A-Za-z0-9][A-Za-z0-9._-]{0,63})\.json")

T = TypeVar("T", Timestamp, Snapshot, Targets, Root)


class RepositoryDamaged(Exception):
    """The repository does not hold together; the message says which document."""


class _Kept(msgspec.Struct):
    """The document of a role that was read last. `metadata` once somebody asked for it."""

    name: str
    identity: Hashable
    data: bytes
    metadata: Any = None


class MetadataFiles:
    """The metadata among the documents. Safe between threads.

    Raises: RepositoryDamaged from every method that reads, when trusted metadata is missing or cannot be read.
    """

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self._kept: dict[str, _Kept] = {}

    @staticmethod
    def served(name: str) -> str | None:
        """The document that a device asks for; None when no metadata can have that name."""
        return f"{FOLDER}/{name}" if METADATA_NAME.fullmatch(name) else None

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
        """The names of all root versions, the oldest first."""
        found = self.versions_of("root")
        if not found:
            raise RepositoryDamaged(f"{self._documents.where(FOLDER)} has no root metadata")
        return found

    def versions_of(self, role: str) -> list[str]:
        """The names of the versions of a role that are here, the oldest first."""
        names = (name.rpartition("/")[2] for name in self._documents.names(FOLDER))
        found = [name for name in names if METADATA_NAME.fullmatch(name) and _role_of(name) == role]
        return sorted(found, key=_number_of)

    def root(self) -> Metadata[Root]:
        """The newest root: what a device trusts from its enrolment on."""
        return self._parsed(self.roots()[-1], Root)

    # -- documents ---------------------------------------------------------------------------------------------------------

    def data(self, name: str) -> bytes:
        return self._read(name).data

    def unkept(self, name: str) -> bytes:
        """As `data`, of what is seldom read: it takes the place of nothing in memory."""
        data = self._documents.read(f"{FOLDER}/{name}")
        if data is None:
            raise RepositoryDamaged(f"{self._where(name)} is missing; restore the repository from a backup")
        return data

    def write(self, name: str, metadata: Metadata[Any] | bytes) -> None:
        """Writes a document durably."""
        data = metadata if isinstance(metadata, bytes) else metadata.to_bytes()
        where = f"{FOLDER}/{name}"
        self._documents.write(where, data)
        identity = self._documents.identity(where)
        self._kept[_role_of(name)] = _Kept(name, identity, data, None if metadata is data else metadata)

    def write_role(self, role: str, metadata: Metadata[Any]) -> None:
        """Writes a version of a role. Nobody trusts it before the timestamp leads to it."""
        self.write(f"{metadata.signed.version}.{role}.json", metadata)

    def remove_before(self, role: str, version: int, moment: float | None = None) -> None:
        """Removes the versions of a role up to this one; with a moment, of those the ones written before it."""
        for name in self.versions_of(role):
            where = f"{FOLDER}/{name}"
            if _number_of(name) <= version and (moment is None or (self._documents.written(where) or moment) < moment):
                self._documents.remove(where)

    def parse(self, data: bytes, kind: type[T], name: str) -> Metadata[T]:
        """Metadata of the type `kind` in the bytes of the document `name`."""
        try:
            metadata = Metadata[T].from_bytes(data)
        except RepositoryError as error:
            raise RepositoryDamaged(f"{self._where(name)} cannot be read: {error}") from error
        if not isinstance(metadata.signed, kind):
            raise RepositoryDamaged(f"{self._where(name)} is of type {metadata.signed.type!r}")
        return metadata

    def _parsed(self, name: str, kind: type[T]) -> Metadata[T]:
        kept = self._read(name)
        if kept.metadata is None:
            kept.metadata = self.parse(kept.data, kind, name)
        found: Metadata[T] = kept.metadata
        return found

    def _read(self, name: str) -> _Kept:
        where, role = f"{FOLDER}/{name}", _role_of(name)
        kept = self._kept.get(role)
        try:
            identity = self._documents.identity(where)
            if kept is not None and identity is not None and (kept.name, kept.identity) == (name, identity):
                return kept
            data = self._documents.read(where)
        except OSError as error:
            raise RepositoryDamaged(f"{self._where(name)} cannot be read: {error}; restore it from a backup") from error
        if data is None:
            raise RepositoryDamaged(f"{self._where(name)} is missing; restore the repository from a backup")
        self._kept[role] = kept = _Kept(name, identity, data)
        return kept

    def _where(self, name: str) -> str:
        return self._documents.where(f"{FOLDER}/{name}")


def _role_of(name: str) -> str:
    """`12.releases.json` → `releases`, `timestamp.json` → `timestamp`."""
    return name.removesuffix(".json").lstrip("0123456789").removeprefix(".")


def _number_of(name: str) -> int:
    """`12.releases.json` → 12."""
    return int(name.split(".", maxsplit=1)[0])
