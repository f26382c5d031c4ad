"""Takes a backup of a fleet server, whether it runs or not.

The order makes it one moment, as a crash would have left it: first the database, then what is signed. So a decision that falls
between the two is signed and not in the database, which is what a server makes good when it starts (`Fleet.recover`). Files of
releases come last; they never change.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from fleet_server.backups.archive import Description, Progress, Writer
from fleet_server.config import FILE_NAME, FleetConfig, Folder, load
from fleet_server.devices.pki import Authority
from fleet_server.errors import Unavailable
from fleet_server.releases.metadata_files import RepositoryDamaged
from fleet_server.releases.online_keys import OnlineKeys
from fleet_server.releases.repository import Repository
from fleet_server.status import software_version
from fleet_server.storage.documents import FolderDocuments

TRIES = 5  # a running server may change what is copied


class Backup:
    """What is copied of a folder, at one moment; the files of releases are read from where they are."""

    def __init__(self, folder: Folder, scratch: Path, clock: Callable[[], float], *, blobs: bool) -> None:
        """`scratch` is an empty folder that nobody else can read.  Raises: ConfigError, Unavailable, OSError."""
        self._folder, self._copy = folder, Folder(scratch)
        config = load(folder)
        self._take(config, clock)
        self.blobs = (
            sorted(path for path in folder.blobs.iterdir() if path.is_file()) if blobs and config.blobs.store is None else []
        )
        with contextlib.closing(sqlite3.connect(self._copy.database)) as database:
            devices = database.execute("SELECT count(*) FROM devices").fetchone()[0]
            releases = database.execute("SELECT count(*) FROM releases").fetchone()[0]
        self.description = Description(
            format=1, fleet=config.fleet, taken=self._taken, software=software_version(), ca_sha256=Authority(self._copy.pki).fingerprint,
            metadata=self._repository.versions(), devices=devices, releases=releases, blobs=len(self.blobs) if blobs and config.blobs.store is None else None,
        )  # fmt: skip

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for _, path in self._copied()) + sum(path.stat().st_size for path in self.blobs)

    def write(self, out: IO[bytes], progress: Progress = lambda _: None) -> None:
        writer = Writer(out, self.description, progress)
        for name, path in self._copied():
            writer.add_file(name, path)
        for path in self.blobs:
            writer.add_file(f"blobs/{path.name}", path)
        writer.close()

    def _copied(self) -> Iterator[tuple[str, Path]]:
        root = self._copy.root
        return ((path.relative_to(root).as_posix(), path) for path in sorted(root.rglob("*")) if path.is_file())

    def _take(self, config: FleetConfig, clock: Callable[[], float]) -> None:
        for left in reversed(range(TRIES)):
            self._taken = clock()
            try:
                self._copy_database(config)
                shutil.copy(self._folder.config, self._copy.root / FILE_NAME)
                for source, target in ((self._folder.keys, self._copy.keys), (self._folder.pki, self._copy.pki)):
                    shutil.copytree(source, target)
                shutil.copytree(self._folder.metadata.parent, self._copy.metadata.parent, ignore=shutil.ignore_patterns(".*"))
                self._repository = self._checked(config, clock)
            except (RepositoryDamaged, Unavailable, shutil.Error, FileNotFoundError) as error:
                if not left:
                    raise Unavailable(f"{self._folder.root} cannot be copied, it does not hold together: {error}") from error
                for path in self._copy.root.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                time.sleep(0.1)
            else:
                return

    def _copy_database(self, config: FleetConfig) -> None:
        url = self._folder.database_url(config)
        if not url.startswith("sqlite:///"):
            raise Unavailable(
                f"the database is not in a file of this machine ({url.partition(':')[0]}): back it up with its own tools"
            )
        path = Path(url.removeprefix("sqlite:///"))
        source = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=30)
        target = sqlite3.connect(self._copy.database)
        try:
            source.backup(target)
            target.execute("PRAGMA journal_mode=DELETE")
        except sqlite3.Error as error:
            raise Unavailable(f"the database {path} cannot be copied: {error}") from error
        finally:
            target.close()
            source.close()

    def _checked(self, config: FleetConfig, clock: Callable[[], float]) -> Repository:
        """The copied repository.  Raises: RepositoryDamaged, Unavailable when it was copied in the middle of a change."""
        keys = OnlineKeys.read(self._copy.keys)
        repository = Repository(FolderDocuments(self._copy.repository), keys, config.expiry, clock)
        repository.check()
        root = repository.root_role().signed
        if not all(keys.holds(role, root.roles[role].keyids) for role in ("snapshot", "timestamp")):
            raise Unavailable("the keys are not those that the metadata names")
        return repository


def scratch_beside(path: Path) -> tempfile.TemporaryDirectory[str]:
    """A private folder on the disk that the backup goes to."""
    return tempfile.TemporaryDirectory(prefix=".edge-fleet-backup-", dir=path.parent)
