"""The database: one engine, short transactions, migrations brought along."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import column, create_engine, event, inspect, select, table
from sqlalchemy.engine import Engine
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from fleet_server.storage.database_file import DatabaseFile, DatabaseGone

_log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"
VERSIONS = "alembic_version"
"""The table in which Alembic keeps the revision of the schema."""


def newest_revision() -> str:
    """The revision that this version works with: the number that the last migration's file name begins with."""
    return max(path.name.partition("_")[0] for path in (MIGRATIONS / "versions").glob("[0-9]*_*.py"))


class DatabaseError(Exception):
    """The database cannot be used as it is; the message says what to do."""


class Database:
    """Sessions on one engine. A session is one transaction: committed when its block ends well, else undone."""

    def __init__(self, url: str, *, must_exist: bool = False) -> None:
        """`must_exist`: an SQLite database that is not there is not made."""
        self._must_exist = must_exist
        # Who may read or write is bounded by the threads there are; none of them waits for another's connection to be free.
        arguments: dict[str, Any] = {"max_overflow": -1}
        if url.startswith("sqlite"):
            arguments["connect_args"] = {"timeout": 30}
        self.engine: Engine = create_engine(url, json_serializer=_to_json, json_deserializer=msgspec.json.decode, **arguments)
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "do_connect", self._before_connect)
            event.listen(self.engine, "connect", _sqlite_settings)
            event.listen(self.engine, "begin", _begin)
        self._readers = self.engine.execution_options(reading=True)
        self._file: DatabaseFile | None = None
        self._gone = False
        self.refused = 0
        """How many transactions failed because of the database, not of what was in them."""
        self.problem = ""
        """Why the last one did; empty when it did not."""

    def check(self) -> None:
        """Raises: DatabaseGone when what is open stands on the disk no more."""
        try:
            if self._file is not None:
                self._file.check()
        except DatabaseGone as error:
            if not self._gone:
                _log.critical("%s", error)
            self._gone, self.problem, self.refused = True, str(error), self.refused + 1
            raise
        if self._gone:
            self._gone, self.problem = False, ""
            _log.warning("the database's files are back")

    def _before_connect(self, *_: Any) -> None:
        """SQLite makes a database that is not there."""
        self.check()
        path = self._path()
        if self._must_exist and path is not None and not path.exists():
            raise DatabaseError(
                f"{path} does not exist, though the fleet does: restore it from a backup. To begin with an empty one, which knows no device, "
                f"group, token or rollout, make an empty file: touch {path}"
            )

    def _path(self) -> Path | None:
        """The file of an SQLite database."""
        name = self.engine.url.database
        return Path(name) if self.engine.dialect.name == "sqlite" and name and name != ":memory:" else None

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """Raises: DatabaseGone also behind the block, when it was for nothing."""
        self.check()
        try:
            with Session(self.engine, expire_on_commit=False) as session, session.begin():
                yield session
        except OperationalError as error:
            self.problem, self.refused = str(error.orig), self.refused + 1
            raise
        self.check()
        self.problem = ""

    @contextlib.contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that changes nothing, and so waits for nobody who does."""
        with Session(self._readers, expire_on_commit=False) as session:
            yield session

    def migrate(self, revision: str = "head") -> None:
        """Brings the schema to `revision`, which is this version's, and watches the files from then on.

        Raises: DatabaseError when a newer version wrote it, it cannot be changed, or it must exist and does not.
        """
        self._migrate(revision)
        path = self._path()
        if path is not None and self._file is None:
            self._file = DatabaseFile(path)

    def _migrate(self, revision: str) -> None:
        try:
            if revision == "head" and self.is_current():
                return
        except SQLAlchemyError as error:
            raise DatabaseError(f"the database cannot be read: {error}") from error
        from alembic import command  # a quarter of the time that a server takes to start; most starts change nothing
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        try:
            with self.engine.begin() as connection:
                config.attributes["connection"] = connection
                command.upgrade(config, revision)
        except CommandError as error:
            raise DatabaseError(f"the database was written by a newer version ({error}): install that version") from error
        except SQLAlchemyError as error:
            raise DatabaseError(f"the database cannot be migrated: {error}") from error

    def is_current(self) -> bool:
        """Whether the schema is the one this version works with."""
        with self.engine.connect() as connection:
            if not inspect(connection).has_table(VERSIONS):
                return False
            return connection.execute(select(column("version_num")).select_from(table(VERSIONS))).scalar() == newest_revision()

    def close(self) -> None:
        self.engine.dispose()
        if self._file is not None:
            self._file.close()


def _to_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _sqlite_settings(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy begins transactions itself, see _begin
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Any) -> None:
    # A transaction that reads first and writes later would fail with "database is locked" when another one wrote in between.
    reading = connection.get_execution_options().get("reading", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
