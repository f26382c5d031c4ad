"""Whether the SQLite database that is open is the one that stands on the disk: a process that has it open writes on into files
that were deleted or replaced, and every answer would be right until it ends.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from fleet_server.errors import Unavailable

LOG_SUFFIX = "-wal"


class DatabaseGone(Unavailable):
    """The files of the database were deleted or replaced while the server had them open."""

    code = "database_gone"


class DatabaseFile:
    """Remembers which files are open, and says when others stand in their place."""

    def __init__(self, path: Path) -> None:
        """Raises: OSError when there is no database."""
        self._path = path
        # SQLite makes its log anew when the last connection closes; this one stays, so the log stays the same file.
        self._anchor = sqlite3.connect(f"file:{path}?mode=rw", uri=True, check_same_thread=False)
        self._anchor.execute("SELECT count(*) FROM sqlite_master").fetchone()
        paths = (path, path.with_name(path.name + LOG_SUFFIX))
        self._identities = {one: _identity(one) for one in paths if one.exists()}

    def check(self) -> None:
        """Costs some microseconds.  Raises: DatabaseGone."""
        for path, identity in self._identities.items():
            with contextlib.suppress(OSError):
                if _identity(path) == identity:
                    continue
            raise DatabaseGone(
                f"{path} was deleted or replaced while the server had it open, so nothing is stored any more: move the same file back, "
                "or stop the server, restore the database (without -wal and -shm of another one) from a backup, and start it"
            )

    def close(self) -> None:
        self._anchor.close()


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
