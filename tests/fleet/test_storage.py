"""The schema: migrations make exactly the tables of the models, and a newer database is refused."""

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from fleet_server.storage.database import Database, DatabaseError
from fleet_server.storage.models import Base


@pytest.fixture
def database(tmp_path):
    made = Database(f"sqlite:///{tmp_path}/x.sqlite3")
    yield made
    made.close()


def test_migrations_make_what_the_models_say(database):
    assert not database.is_current()
    database.migrate()
    database.migrate()
    assert database.is_current()
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


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


def test_it_survives_a_kill(database, tmp_path):
    database.migrate()
    with create_engine(f"sqlite:///{tmp_path}/x.sqlite3").connect() as other:
        assert other.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        other.engine.dispose()
