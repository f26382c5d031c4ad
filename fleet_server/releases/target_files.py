"""The target files of the repository, as devices fetch them: manifests and assignments, under names with their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]

from agent.common import files
from fleet_server.releases.metadata_files import RepositoryDamaged

MAX_PARTS, MAX_PART_CHARS = (
    8,
    200,
)  # no target has more; a longer name is an error to the filesystem, not a file that is missing


class TargetFiles:
    """One folder of targets. Safe between threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last: tuple[Path, tuple[int, int, int], bytes] | None = None
        """What was read or written last: mostly the assignment, which is asked for again and again."""

    def path(self, info: TargetFile) -> Path:
        """Where a target stands: consistent-snapshot names, `dir/<sha256>.<file>`."""
        directory, _, base = info.path.rpartition("/")
        return self.folder / directory / f"{info.hashes['sha256']}.{base}"

    def served(self, name: str) -> Path | None:
        """The file that a device asks for, by its consistent-snapshot name; None when there is none of that name."""
        parts = name.split("/")
        if any(not part or part.startswith(".") or len(part) > MAX_PART_CHARS for part in parts) or len(parts) > MAX_PARTS:
            return None
        path = self.folder.joinpath(*parts)
        return path if path.is_file() else None

    def read(self, info: TargetFile) -> bytes:
        """The verified bytes.  Raises: RepositoryDamaged."""
        path = self.path(info)
        try:
            found = path.stat()
            identity = (found.st_mtime_ns, found.st_size, found.st_ino)
            if self._last is not None and self._last[:2] == (path, identity):
                return self._last[2]
            data = path.read_bytes()
            info.verify_length_and_hashes(data)
        except (OSError, RepositoryError) as error:
            raise RepositoryDamaged(f"{path} is missing or damaged: {error}") from error
        self._last = (path, identity, data)
        return data

    def write(self, info: TargetFile, data: bytes) -> None:
        """Writes the target durably, unless it is there and whole."""
        path = self.path(info)
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == info.hashes["sha256"]:
            return
        files.make_directory(path.parent)
        files.write(path, data)
        found = path.stat()
        self._last = (path, (found.st_mtime_ns, found.st_size, found.st_ino), data)

    def remove_others(self, directory: str, base: str, kept: Collection[Path]) -> None:
        """Removes every version of a target but those that are `kept`."""
        for path in (self.folder / directory).glob(f"*.{base}"):
            if path not in kept and not path.name.startswith("."):
                path.unlink(missing_ok=True)
