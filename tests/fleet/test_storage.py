"""The schema: migrations make exactly the tables of the models, and a newer database is refused."""

import subprocess
import sys

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from fleet_server.rollouts.gates import Ruling
from fleet_server.rollouts.machine import State
from fleet_server.rollouts.views import MemberView, Views
from fleet_server.storage.database import MIGRATIONS, Database, DatabaseError, newest_revision
from fleet_server.storage.models import Base
from tests.fleet import databases


@pytest.fixture
def database(tmp_path):
    made = Database(databases.new() or f"sqlite:///{tmp_path}/x.sqlite3")
    yield made
    made.close()


def test_migrations_make_what_the_models_say(database):
    assert not database.is_current()
    database.migrate()
    database.migrate()
    assert database.is_current()
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_the_newest_revision_is_the_last_that_alembic_knows():
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [newest_revision()]


def test_a_server_whose_schema_is_current_does_not_load_alembic(database, tmp_path):
    database.migrate()
    code = f"""
import sys
import fleet_server.app
from fleet_server.storage.database import Database
Database({str(database.engine.url)!r}).migrate()
assert "alembic" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "x.sqlite3").write_bytes(b"no database" * 1000)
    made = Database(f"sqlite:///{tmp_path}/x.sqlite3")
    with pytest.raises(DatabaseError, match="cannot be"):
        made.migrate()
    made.close()


def test_a_newer_database_is_refused(database):
    database.migrate()
    with database.session() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseError, match="newer version"):
        database.migrate()


def test_the_schema_is_not_only_sqlites():
    for table in Base.metadata.sorted_tables:
        assert str(CreateTable(table).compile(dialect=postgresql.dialect()))


def test_readers_do_not_wait_for_a_writer(database):
    database.migrate()
    with database.session() as writer:
        writer.execute(text("INSERT INTO settings VALUES ('a', '1')"))
        with database.reading() as reader:
            assert reader.execute(text("SELECT count(*) FROM settings")).scalar() == 0


@pytest.mark.sqlite
def test_it_survives_a_kill(database, tmp_path):
    database.migrate()
    with create_engine(f"sqlite:///{tmp_path}/x.sqlite3").connect() as other:
        assert other.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        other.engine.dispose()


WRITTEN_BEFORE = """
INSERT INTO rollouts (id, number, model, release, previous, waves, wave, state, hold, max_failures, mode, together, "window", created,
  created_by, updated, reason)
VALUES ('r1-aaaa', 1, 'arm', 2, 1, '[{"groups": ["canary"], "permille": 0}, {"groups": [], "permille": 1000}]', 0, 'holding', 1, 2, 'install',
  'r1-aaaa', 'mon-fri 22:00-05:00', 1.0, 'ann', 2.0, '');
INSERT INTO rollouts (id, number, model, release, previous, waves, wave, state, hold, max_failures, mode, together, "window", created,
  created_by, updated, reason)
VALUES ('r2-bbbb', 2, 'eye', 5, NULL, '[{"groups": [], "permille": 1000}]', 0, 'running', 0, 0, 'install', 'r1-aaaa', NULL, 1.0, 'ann', 2.0, '');
INSERT INTO exclusions (id, model, release, hardware, instead, rollout, at, count, reason, devices, lifted, lifted_by)
VALUES (1, 'arm', 2, 'aarch64/-/cuda', 1, 'r1-aaaa', 3.0, 3, '3 devices', '[{"device": "d1", "reason": "too_slow", "message": ""}]', 4.0, 'ann');
INSERT INTO verdicts (rollout, wave, at, verdict, why, counts, evidence)
VALUES ('r1-aaaa', 0, 3.5, 'pass', '1 committed', '{"committed": 1, "shadowed": 0, "refused": 0, "failed": 0, "rolled_back": 0, "pending": 0, "offline": 0}', '[]');
"""


@pytest.mark.sqlite
def test_a_database_of_before_keeps_its_teams_confirmations_and_exclusions(database):
    """Written by the schema of revision 0003, row by row as that version wrote them."""
    database.migrate("0003")
    with database.session() as session:
        for statement in WRITTEN_BEFORE.strip().split(";\n"):
            session.execute(text(statement.rstrip(";").replace(":00", r"\:00")))
    assert not database.is_current()
    database.migrate()
    assert database.is_current()
    views = Views(database)
    first = views.rollout("r1-aaaa")
    assert (first.state, first.confirm, first.window) == (State.WAITING, True, "mon-fri 22:00-05:00")
    assert first.team == (MemberView("r2-bbbb", "eye", 5),)
    assert (first.verdict.verdict, first.verdict.counts.committed) == (Ruling.PASS, 1)
    assert not views.rollout("r2-bbbb").confirm
    (ended,) = views.exclusions()
    assert (ended.hardware, ended.ended, ended.ended_by, ended.devices[0].device) == ("aarch64/-/cuda", 4.0, "ann", "d1")
