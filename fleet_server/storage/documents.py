"""What devices are answered with, by name: signed metadata, targets, the list of revoked certificates.

In a folder of this machine. Or in the database, where the server is several processes: there what is signed is stored in the
transaction that checks who may sign (`storage.leadership`), and every process answers from it.

Names are paths (`metadata/timestamp.json`, `targets/releases/digits/….json`); whoever takes one from a stranger has checked it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import msgspec
from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from agent.common import files
from fleet_server.storage.database import Database
from fleet_server.storage.models import Counter, DocumentRow

_log = logging.getLogger(__name__)

COUNTER = "documents"
FRESH_S = 1.0
"""For how long this process believes what it read of which documents there are, when nobody tells it of new ones before."""
KEPT_BYTES = 64 * 1024 * 1024


class Documents(Protocol):
    """Named bytes. Safe between threads; one changes them at a time.  Raises: OSError, SQLAlchemyError."""

    def read(self, name: str) -> bytes | None:
        """None when there is none of that name."""
        ...

    def identity(self, name: str) -> Hashable | None:
        """Another one when the bytes are others; None when there is none of that name."""
        ...

    def size(self, name: str) -> int | None:
        """In bytes; None when there is none of that name."""
        ...

    def holds(self, name: str, sha256: str, size: int) -> bool:
        """Whether the document is here and these are its bytes."""
        ...

    def local(self, name: str) -> Path | None:
        """The document as a file, where it is one."""
        ...

    def at_hand(self, name: str) -> bool:
        """Whether the answer to `read` and `identity` need not be waited for."""
        ...

    def names(self, folder: str) -> list[str]:
        """What stands directly in the folder, as whole names."""
        ...

    def all(self) -> list[str]:
        """Every name."""
        ...

    def written(self, name: str) -> float | None:
        """When it was written, in seconds since the epoch."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Durably, at the latest when `together` ends."""
        ...

    def remove(self, name: str, *, durably: bool = False) -> None:
        """`durably`: it is gone for good when this returns, outside of `together`; else a power cut may bring it back."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """What is written in the block is there as a whole at its end, where there are transactions; else in its order."""
        ...

    def where(self, name: str) -> str:
        """For people."""
        ...


class FolderDocuments:
    """Files below a folder. They are read each time; the system keeps them in memory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def identity(self, name: str) -> Hashable | None:
        try:
            found = (self.root / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def size(self, name: str) -> int | None:
        path = self.root / name
        return path.stat().st_size if path.is_file() else None

    def holds(self, name: str, sha256: str, size: int) -> bool:
        if self.size(name) != size:  # most often there is none yet
            return False
        data = self.read(name)
        return data is not None and hashlib.sha256(data).hexdigest() == sha256

    def local(self, name: str) -> Path | None:
        path = self.root / name
        return path if path.is_file() else None

    def at_hand(self, name: str) -> bool:
        del name
        return True

    def names(self, folder: str) -> list[str]:
        try:
            with os.scandir(self.root / folder) as found:
                return [f"{folder}/{one.name}" for one in found if not one.name.startswith(".") and one.is_file()]
        except FileNotFoundError:
            return []

    def all(self) -> list[str]:
        paths = (path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file())
        return sorted(path.as_posix() for path in paths if not path.name.startswith("."))

    def written(self, name: str) -> float | None:
        with contextlib.suppress(FileNotFoundError):
            return (self.root / name).stat().st_mtime
        return None

    def write(self, name: str, data: bytes) -> None:
        path = self.root / name
        files.make_directory(path.parent)
        files.write(path, data)

    def remove(self, name: str, *, durably: bool = False) -> None:
        path = self.root / name
        path.unlink(missing_ok=True)
        if durably:
            files.sync_directory(path.parent)

    def together(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def where(self, name: str) -> str:
        return str(self.root / name)


class _Entry(msgspec.Struct, frozen=True):
    """What is known of a document without its bytes."""

    digest: str
    size: int
    written: float


class _Batch:
    """A transaction under way, and what it made of documents: None for one that is gone."""

    def __init__(self, session: Session, number: int) -> None:
        self.session, self.number = session, number
        self.changed: dict[str, tuple[_Entry, bytes] | None] = {}


class StoredDocuments:
    """Rows of the database. Which there are is read anew when somebody says so (`refresh`) or after `FRESH_S`; their bytes, which are
    another row's when they change, are kept as far as there is room.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database, self._clock = database, clock
        self._known: dict[str, _Entry] = {}
        self._data: OrderedDict[str, bytes] = OrderedDict()
        self._held_bytes = 0
        self._last = -1
        self._fresh_until = 0.0
        self._lock = threading.Lock()
        self._mine = threading.local()
        self.on_written: Callable[[], None] = lambda: None
        """Told when something was stored."""

    @staticmethod
    def are_in(database: Database) -> bool:
        """Whether a server of several processes keeps its documents there."""
        with database.reading() as session:
            return session.scalar(select(func.count()).select_from(DocumentRow)) != 0

    # -- reading -----------------------------------------------------------------------------------------------------------

    def read(self, name: str) -> bytes | None:
        batch = self._batch()
        if batch is not None and name in batch.changed:
            changed = batch.changed[name]
            return changed[1] if changed is not None else None
        entry = self._entry(name)
        if entry is None:
            return None
        with self._lock:
            data = self._data.get(entry.digest)
            if data is not None:
                self._data.move_to_end(entry.digest)
                return data
        with self._database.reading() as session:
            row = session.get(DocumentRow, name)
            if row is None:
                with self._lock:
                    self._known.pop(name, None)
                return None
            self._keep(name, _Entry(row.digest, len(row.data), row.written), row.data)
            return row.data

    def identity(self, name: str) -> Hashable | None:
        entry = self._entry(name)
        return entry.digest if entry is not None else None

    def size(self, name: str) -> int | None:
        entry = self._entry(name)
        return entry.size if entry is not None else None

    def holds(self, name: str, sha256: str, size: int) -> bool:
        """By what was noted when they were stored: the database looks after its bytes, and reading all would keep who takes over."""
        entry = self._entry(name)
        return entry is not None and (entry.digest, entry.size) == (sha256, size)

    def local(self, name: str) -> Path | None:
        del name
        return None

    def at_hand(self, name: str) -> bool:
        if time.monotonic() >= self._fresh_until:
            return False
        entry = self._known.get(name)
        return entry is None or entry.digest in self._data

    def names(self, folder: str) -> list[str]:
        start = f"{folder}/"
        return [name for name in self._names() if name.startswith(start) and "/" not in name[len(start) :]]

    def all(self) -> list[str]:
        return sorted(self._names())

    def _names(self) -> set[str]:
        self._be_fresh()
        batch = self._batch()
        with self._lock:
            found = set(self._known)
        for name, changed in batch.changed.items() if batch is not None else ():
            (found.add if changed is not None else found.discard)(name)
        return found

    def written(self, name: str) -> float | None:
        entry = self._entry(name)
        return entry.written if entry is not None else None

    def where(self, name: str) -> str:
        return f"{name} in the database"

    def refresh(self) -> None:
        """Reads which documents are new. While the database does not answer, what is known counts on."""
        try:
            with self._database.reading() as session:
                columns = (DocumentRow.name, DocumentRow.digest, DocumentRow.size, DocumentRow.written, DocumentRow.change)
                rows = session.execute(select(*columns).where(DocumentRow.change > self._last)).all()
        except SQLAlchemyError as error:
            if self._last < 0:
                raise
            _log.debug("which documents there are cannot be read now: %s", error)
            rows = []
        with self._lock:
            for name, digest, size, written, change in rows:
                self._known[name] = _Entry(digest, size, written)
                self._last = max(self._last, change)
            self._fresh_until = time.monotonic() + FRESH_S

    def stale(self) -> None:
        """Somebody stored something: the next who asks reads which."""
        self._fresh_until = 0.0

    def _entry(self, name: str) -> _Entry | None:
        batch = self._batch()
        if batch is not None and name in batch.changed:
            changed = batch.changed[name]
            return changed[0] if changed is not None else None
        self._be_fresh()
        return self._known.get(name)

    def _be_fresh(self) -> None:
        if time.monotonic() >= self._fresh_until:
            self.refresh()

    def _keep(self, name: str, entry: _Entry, data: bytes) -> None:
        with self._lock:
            self._known[name] = entry
            if entry.digest not in self._data:
                self._data[entry.digest] = data
                self._held_bytes += len(data)
            while self._held_bytes > KEPT_BYTES and len(self._data) > 1:
                _, dropped = self._data.popitem(last=False)
                self._held_bytes -= len(dropped)

    # -- writing -----------------------------------------------------------------------------------------------------------

    def write(self, name: str, data: bytes) -> None:
        with self.together():
            batch = self._batch()
            assert batch is not None
            entry = _Entry(hashlib.sha256(data).hexdigest(), len(data), self._clock())
            row = DocumentRow(
                name=name, data=data, digest=entry.digest, size=entry.size, written=entry.written, change=batch.number
            )
            batch.session.merge(row)
            batch.changed[name] = (entry, data)

    def remove(self, name: str, *, durably: bool = True) -> None:
        del durably  # it always is
        with self.together():
            batch = self._batch()
            assert batch is not None
            batch.session.execute(delete(DocumentRow).where(DocumentRow.name == name))
            batch.changed[name] = None

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        if self._batch() is not None:
            yield
            return
        with self._database.session() as session:
            add = update(Counter).where(Counter.name == COUNTER).values(value=Counter.value + 1).returning(Counter.value)
            batch = self._mine.batch = _Batch(session, int(session.execute(add).scalar_one()))
            try:
                yield
            finally:
                self._mine.batch = None
        for name, changed in batch.changed.items():
            if changed is not None:
                self._keep(name, *changed)
            else:
                with self._lock:
                    self._known.pop(name, None)
        if batch.changed:
            self.on_written()

    def _batch(self) -> _Batch | None:
        batch: _Batch | None = getattr(self._mine, "batch", None)
        return batch


def copy(source: Documents, target: Documents) -> int:
    """Copies everything, in one step where there are transactions; how many documents."""
    names = source.all()
    with target.together():
        for name in names:
            if (data := source.read(name)) is not None:
                target.write(name, data)
    return len(names)
