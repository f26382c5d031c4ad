"""The targets of the repository, as devices fetch them: manifests and assignments, under names with their hash."""

from __future__ import annotations

from collections.abc import Collection, Hashable

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]

from fleet_server.releases.metadata_files import RepositoryDamaged
from fleet_server.storage.documents import Documents

FOLDER = "targets"
MAX_PARTS, MAX_PART_CHARS = (
    8,
    200,
)  # no target has more; a longer name is an error to the filesystem, not a file that is missing


class TargetFiles:
    """The targets among the documents. Safe between threads."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self._last: tuple[str, Hashable, bytes] | None = None
        """What was read or written last: mostly the assignment, which is asked for again and again."""

    @staticmethod
    def name(info: TargetFile) -> str:
        """The name of a target's document, at which devices find it: consistent-snapshot names, `targets/dir/<sha256>.<file>`."""
        directory, _, base = info.path.rpartition("/")
        return "/".join(part for part in (FOLDER, directory, f"{info.hashes['sha256']}.{base}") if part)

    @staticmethod
    def served(name: str) -> str | None:
        """The document that a device asks for, by its consistent-snapshot name; None when no target can have that name."""
        parts = name.split("/")
        if any(not part or part.startswith(".") or len(part) > MAX_PART_CHARS for part in parts) or len(parts) > MAX_PARTS:
            return None
        return f"{FOLDER}/{name}"

    def read(self, info: TargetFile) -> bytes:
        """The verified bytes.  Raises: RepositoryDamaged."""
        name = self.name(info)
        try:
            identity, last = self._documents.identity(name), self._last
            if last is not None and identity is not None and last[:2] == (name, identity):
                return last[2]
            data = self._documents.read(name)
            if data is None:
                raise RepositoryDamaged(f"{self._documents.where(name)} is missing")
            info.verify_length_and_hashes(data)
        except (OSError, RepositoryError) as error:
            raise RepositoryDamaged(f"{self._documents.where(name)} is missing or damaged: {error}") from error
        self._last = (name, identity, data)
        return data

    def check(self, info: TargetFile) -> None:
        """Raises: RepositoryDamaged when the target is not there as it was signed."""
        name = self.name(info)
        try:
            whole = self._documents.holds(name, info.hashes["sha256"], info.length)
        except OSError as error:
            raise RepositoryDamaged(f"{self._documents.where(name)} cannot be read: {error}") from error
        if not whole:
            raise RepositoryDamaged(f"{self._documents.where(name)} is missing or damaged")

    def write(self, info: TargetFile, data: bytes) -> None:
        """Writes the target durably, unless it is there and whole."""
        name = self.name(info)
        if self._documents.holds(name, info.hashes["sha256"], len(data)):
            return
        self._documents.write(name, data)
        self._last = (name, self._documents.identity(name), data)

    def remove_others(self, directory: str, base: str, kept: Collection[str]) -> None:
        """Removes every version of a target but those that are `kept`."""
        for name in self._documents.names(f"{FOLDER}/{directory}"):
            if name not in kept and name.endswith(f".{base}"):
                self._documents.remove(name)
