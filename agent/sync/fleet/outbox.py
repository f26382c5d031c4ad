"""What is still to be told to the fleet, on disk until the broker has it.

Bounded: when it is full the oldest telemetry goes first, then the oldest events, and how many went is counted. State reports
replace each other: only the newest says anything. A damaged database is put aside and a new one begun; telling is less than
serving.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

Kind = Literal["state", "events", "telemetry"]
_T = TypeVar("_T")

MAX_ITEMS = 2000
MAX_BYTES = 16 * 1024 * 1024
FORMAT = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS items (id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, payload BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS dropped (kind TEXT PRIMARY KEY, count INTEGER NOT NULL);
"""
_DROP_FIRST = ("telemetry", "events", "state")


class Item(msgspec.Struct, frozen=True):
    """One message to deliver."""

    id: int
    kind: Kind
    payload: bytes


class Outbox:
    """A queue in an SQLite file. Thread-safe. Every method may raise OSError when the disk fails for good."""

    def __init__(self, path: Path, *, max_items: int = MAX_ITEMS, max_bytes: int = MAX_BYTES) -> None:
        self._path = path
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        try:
            self._db = _open(path)
        except sqlite3.DatabaseError:
            self._db = self._begin_again()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def put(self, kind: Kind, payload: bytes) -> int:
        """Keeps a message until it is delivered; gives its id."""
        return self._safely(lambda db: self._put(db, kind, payload))

    def first(self, count: int, after: int = 0) -> list[Item]:
        """The oldest messages, in order, whose id is above `after`."""
        query = "SELECT id, kind, payload FROM items WHERE id > ? ORDER BY id LIMIT ?"
        return self._safely(lambda db: [Item(*row) for row in db.execute(query, (after, count))])

    def delivered(self, item: int) -> None:
        """The broker has it."""
        self._safely(lambda db: db.execute("DELETE FROM items WHERE id = ?", (item,)))

    def waiting(self) -> int:
        """How many messages are still to be delivered."""
        return self._safely(lambda db: int(db.execute("SELECT count(*) FROM items").fetchone()[0]))

    def dropped(self) -> dict[str, int]:
        """How many messages of each kind were given up for want of room, ever."""
        return self._safely(lambda db: dict(db.execute("SELECT kind, count FROM dropped").fetchall()))

    def _put(self, db: sqlite3.Connection, kind: Kind, payload: bytes) -> int:
        if kind == "state":
            db.execute("DELETE FROM items WHERE kind = 'state'")
        item = db.execute("INSERT INTO items (kind, payload) VALUES (?, ?)", (kind, payload)).lastrowid or 0
        while self._too_much(db):
            if not any(self._drop(db, victim) for victim in _DROP_FIRST):
                break
        return item

    def _too_much(self, db: sqlite3.Connection) -> bool:
        count, size = db.execute("SELECT count(*), coalesce(sum(length(payload)), 0) FROM items").fetchone()
        return bool(count > 1 and (count > self._max_items or size > self._max_bytes))

    @staticmethod
    def _drop(db: sqlite3.Connection, kind: str) -> bool:
        """Gives up the oldest message of the kind; False when there is none."""
        found = db.execute("SELECT id FROM items WHERE kind = ? ORDER BY id LIMIT 1", (kind,)).fetchone()
        if found is None:
            return False
        db.execute("DELETE FROM items WHERE id = ?", found)
        db.execute("INSERT INTO dropped VALUES (?, 1) ON CONFLICT (kind) DO UPDATE SET count = count + 1", (kind,))
        return True

    def _safely(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """`work` in one transaction; on a damaged database, once more on a new one."""
        with self._lock:
            try:
                with _transaction(self._db) as db:
                    return work(db)
            except sqlite3.OperationalError as error:  # full or read-only disk, not damage
                raise OSError(f"{self._path}: {error}") from error
            except sqlite3.DatabaseError:
                self._db.close()
                self._db = self._begin_again()
                with _transaction(self._db) as db:
                    return work(db)

    def _begin_again(self) -> sqlite3.Connection:
        """Puts the damaged database aside, replacing one that was put aside before."""
        for suffix in ("", "-wal", "-shm", "-journal"):
            part = self._path.with_name(self._path.name + suffix)
            with contextlib.suppress(FileNotFoundError):
                if suffix:
                    part.unlink()
                else:
                    part.replace(self._path.with_name(f"{self._path.name}.damaged"))
        return _open(self._path)


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    with db:
        yield db


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False, timeout=10.0)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        number = db.execute("PRAGMA user_version").fetchone()[0]
        if number > FORMAT:  # a newer version's; what it holds cannot be told by this one
            raise sqlite3.DatabaseError(f"format {number}")  # noqa: TRY301 - handled with the damage that SQLite itself reports
        db.executescript(_SCHEMA)
        db.execute(f"PRAGMA user_version = {FORMAT}")
        db.commit()
        db.execute("SELECT count(*) FROM items").fetchone()
    except BaseException:
        db.close()
        raise
    return db
