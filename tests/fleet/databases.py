"""Which database the fleet server's tests use: SQLite, or PostgreSQL where EDGE_TEST_DATABASE says so (`make test-postgresql`).

A PostgreSQL of this test process's own, from Debian's package, in a temporary folder and behind a Unix socket.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ON_POSTGRESQL = os.environ.get("EDGE_TEST_DATABASE") == "postgresql"
USER = "postgres"  # the programs refuse to run as root
_numbers = itertools.count(1)


def new(template: str | None = None) -> str | None:
    """The URL of a new database, empty or a copy of the one at the URL `template`; None where SQLite is used."""
    return _cluster().new(template) if ON_POSTGRESQL else None


def drop(url: str | None) -> None:
    if url is not None:
        _cluster().drop(url)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A PostgreSQL server for whoever wants to stop it."""
    folder = Path(tempfile.mkdtemp(prefix="edge-pg-", dir="/tmp"))
    made = Cluster(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _cluster() -> Cluster:
    """This process's own, as long as it lives. It does not wait for the disk."""
    kept = cluster()
    found = kept.__enter__()
    atexit.register(kept.__exit__, None, None, None)
    return found


class Cluster:
    """A PostgreSQL server in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        self._postgres = [str(programs / "postgres"), "-D", str(folder / "data"), "-k", str(folder), "-h", ""]
        self._as = {"user": USER, "group": USER, "extra_groups": []} if os.getuid() == 0 else {}
        self.process: subprocess.Popen | None = None
        if self._as:
            shutil.chown(folder, USER, USER)
        line = [programs / "initdb", "-D", folder / "data", "-U", USER, "--auth", "trust", "--locale", "C.UTF-8", "--no-sync"]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL, cwd=folder, **self._as)

    def start(self) -> None:
        """Returns when connections are taken."""
        import psycopg

        settings = ["-c", "fsync=off", "-c", "full_page_writes=off", "-c", "max_connections=500"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([*self._postgres, *settings], stdout=log, stderr=log, cwd=self.folder, **self._as)
        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(f"host={self.folder} user={USER} dbname=postgres", connect_timeout=5).close()
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                assert self.process.poll() is None, (self.folder / "log").read_text()
                time.sleep(0.02)
            else:
                return

    def new(self, template: str | None = None) -> str:
        """The URL of a new database, empty or a copy of the one at the URL `template`."""
        name = f"fleet_{next(_numbers)}"
        self._administer(f'CREATE DATABASE {name} TEMPLATE "{_name(template) if template else "template0"}"')
        return f"postgresql://{USER}@/{name}?host={self.folder}"

    def drop(self, url: str) -> None:
        self._administer(f'DROP DATABASE IF EXISTS "{_name(url)}" WITH (FORCE)')

    def _administer(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(f"host={self.folder} user={USER} dbname=postgres", autocommit=True) as connection:
            connection.execute(statement)

    def stop(self) -> None:
        """At once: what is on the disk then is what a crash leaves."""
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(30)
            self.process = None


def _name(url: str) -> str:
    return url.partition("@/")[2].partition("?")[0]
