"""The database: one engine, short transactions, migrations brought along.

SQLite, or PostgreSQL. On both, whoever writes is alone: the code reads, decides and writes as if nobody else were there. SQLite has one
writer at a time anyway; on PostgreSQL each writing transaction begins by taking the same advisory lock. Reading ones see one moment.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection, column, create_engine, event, inspect, make_url, select, table
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from fleet_server.storage import changes
from fleet_server.storage.database_file import DatabaseFile, DatabaseGone

_log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"
VERSIONS = "alembic_version"
"""The table in which Alembic keeps the revision of the schema."""


def newest_revision() -> str:
    """The revision that this version works with: the number that the last migration's file name begins with."""
    return max(path.name.partition("_")[0] for path in (MIGRATIONS / "versions").glob("[0-9]*_*.py"))


WRITING = 0x65646765  # of the advisory lock that a transaction holds on PostgreSQL while it may write
LOCK_WITHIN_S = 30
READ_ONLY = "25006"  # PostgreSQL's state of whoever would write where nobody may
POSTGRESQL: dict[str, Any] = {
    "application_name": "edge-fleet", "connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3,
    "tcp_user_timeout": 30_000, "options": f"-c lock_timeout={LOCK_WITHIN_S}s -c idle_in_transaction_session_timeout=60s -c timezone=UTC",
}  # fmt: skip
"""How connections are made: a server that went away is missed within a minute, and nobody waits for a lock without end."""


class DatabaseError(Exception):
    """The database cannot be used as it is; the message says what to do."""


class WritingSession(Session):
    """Numbers what it changes of devices."""


changes.follow(WritingSession)


class Database:
    """Sessions on one engine. A session is one transaction: committed when its block ends well, else undone."""

    def __init__(self, url: str, *, must_exist: bool = False, name: str = "edge-fleet") -> None:
        """`must_exist`: an SQLite database that is not there is not made. `name`: how PostgreSQL shows the connections."""
        self._must_exist = must_exist
        self._arguments = {**POSTGRESQL, "application_name": name}
        self.at_beginning: list[Callable[[Session], None]] = []
        """Called at the beginning of each writing transaction, in it. What one of them raises undoes it."""
        # Who may read or write is bounded by the threads there are; none of them waits for another's connection to be free.
        arguments: dict[str, Any] = {"max_overflow": -1}
        address = _address(url)
        if address.get_backend_name() == "sqlite":
            arguments["connect_args"] = {"timeout": LOCK_WITHIN_S}
        else:
            arguments |= {
                "connect_args": self._arguments,
                "pool_pre_ping": True,
            }  # the server may have been started anew meanwhile
        self.engine: Engine = create_engine(
            address, json_serializer=_to_json, json_deserializer=msgspec.json.decode, **arguments
        )
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "do_connect", self._before_connect)
            event.listen(self.engine, "connect", _sqlite_settings)
            event.listen(self.engine, "begin", _begin_sqlite)
        else:
            event.listen(self.engine, "begin", _begin_postgresql)
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
            with WritingSession(self.engine, expire_on_commit=False) as session, session.begin():
                for check in self.at_beginning:
                    check(session)
                yield session
        except DBAPIError as error:
            if isinstance(error, OperationalError) or getattr(error.orig, "sqlstate", None) == READ_ONLY:
                self.problem, self.refused = str(error.orig), self.refused + 1
            if (
                getattr(error.orig, "sqlstate", None) == READ_ONLY
            ):  # a stand-by that was not promoted yet: nothing wrong with what was said
                raise OperationalError(error.statement, error.params, error.orig) from error  # type: ignore[arg-type]
            raise
        self.check()
        self.problem = ""

    @contextlib.contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that changes nothing, and so waits for nobody who does."""
        with Session(self._readers, expire_on_commit=False) as session:
            yield session

    @property
    def is_shared(self) -> bool:
        """Whether several processes can work on it, on several machines."""
        return self.engine.dialect.name == "postgresql"

    def connection(self, *, within_s: int = 3) -> Any:
        """A connection of PostgreSQL's own library, outside of every pool, on which each statement is a transaction, and which waits
        for no answer longer than that. It is no writing transaction in the sense of this class.  Raises: psycopg.Error.
        """
        places, named = self.engine.dialect.create_connect_args(self.engine.url)
        bounds = {
            "connect_timeout": within_s,
            "tcp_user_timeout": 1000 * within_s,
            "options": f"-c statement_timeout={within_s}s -c timezone=UTC",
        }
        return self.engine.dialect.connect(*places, **{**named, **self._arguments, **bounds, "autocommit": True})

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
        return self.revision() == newest_revision()

    def revision(self) -> str | None:
        """The revision of the schema; None where there is none yet."""
        with self._readers.connect() as connection:
            if not inspect(connection).has_table(VERSIONS):
                return None
            found: str | None = connection.execute(select(column("version_num")).select_from(table(VERSIONS))).scalar()
            return found

    def tables(self) -> list[str]:
        """The tables that there are.  Raises: DatabaseError when the database cannot be reached."""
        try:
            with self._readers.connect() as connection:
                return sorted(inspect(connection).get_table_names())
        except SQLAlchemyError as error:
            raise DatabaseError(f"the database cannot be read: {error}") from error

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


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later would fail with "database is locked" when another one wrote in between.
    connection.exec_driver_sql("BEGIN" if _is_reading(connection) else "BEGIN IMMEDIATE")


def _begin_postgresql(connection: Connection) -> None:
    if _is_reading(connection):
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
    else:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITING})")


def _is_reading(connection: Connection) -> bool:
    return bool(connection.get_execution_options().get("reading", False))


def _address(url: str) -> URL:
    """Raises: DatabaseError when it is no URL, or one of a database that this server does not work with."""
    try:
        address = make_url(url)
    except ArgumentError as error:
        raise DatabaseError(f"database_url is no URL of a database, such as postgresql://HOST/NAME: {error}") from error
    if address.drivername == "postgresql":
        address = address.set(drivername="postgresql+psycopg")
    if address.drivername not in {"sqlite", "postgresql+psycopg"}:
        raise DatabaseError(
            f"database_url names {address.drivername!r}; this server works with SQLite and postgresql://HOST/NAME"
        )
    if address.get_backend_name() == "postgresql" and find_spec("psycopg") is None:
        raise DatabaseError("the library for PostgreSQL is not installed: pip install 'edge-inference-agent[postgresql]'")
    return address
