"""The server on PostgreSQL, beyond what every test of it shows when it runs on one (`make test-postgresql`): taking turns, outages, refusals."""

from __future__ import annotations

import threading
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from agent.contract.reports import Presence
from fleet_server.storage.database import Database, DatabaseError
from tests import warm
from tests.fleet import databases
from tests.fleet.stand import Server, environment, model_state, wait_until

pytestmark = [pytest.mark.long, pytest.mark.mosquitto]


@pytest.fixture(scope="module")
def cluster():
    with databases.cluster() as made:
        yield made


@pytest.fixture
def database(cluster):
    made = Database(cluster.new())
    made.migrate()
    yield made
    made.close()


def test_whoever_writes_is_alone(database):
    """Two servers on one database read, decide and write, and nothing is lost."""
    other = Database(database.engine.url.render_as_string(hide_password=False))
    with database.session() as session:
        session.execute(text("INSERT INTO settings VALUES ('n', '0')"))

    def count(one: Database) -> None:
        for _ in range(50):
            with one.session() as session:
                value = int(session.execute(text("SELECT value FROM settings WHERE name = 'n'")).scalar_one())
                session.execute(text("UPDATE settings SET value = :value WHERE name = 'n'"), {"value": str(value + 1)})

    workers = [threading.Thread(target=count, args=(one,)) for one in (database, other, database, other)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    with database.reading() as session:
        assert session.execute(text("SELECT value FROM settings WHERE name = 'n'")).scalar() == "200"
    other.close()


def test_a_reader_sees_one_moment_and_waits_for_nobody(database):
    with database.session() as writer:
        writer.execute(text("INSERT INTO settings VALUES ('a', '1')"))
        with database.reading() as reader:
            assert reader.execute(text("SELECT count(*) FROM settings")).scalar() == 0
            writer.commit()
            assert reader.execute(text("SELECT count(*) FROM settings")).scalar() == 0
    with database.reading() as reader:
        assert reader.execute(text("SELECT count(*) FROM settings")).scalar() == 1


def test_a_reader_cannot_write(database):
    with database.reading() as reader, pytest.raises(Exception, match="read-only"):
        reader.execute(text("INSERT INTO settings VALUES ('a', '1')"))


def test_where_nobody_may_write_now_nothing_is_wrong_with_what_was_said(database):
    name = database.engine.url.database
    with database.session() as session:
        session.execute(text(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'))
    database.engine.dispose()
    with pytest.raises(OperationalError, match="read-only"), database.session() as session:
        session.execute(text("INSERT INTO settings VALUES ('a', '1')"))
    assert "read-only" in database.problem


def test_a_server_whose_database_goes_away_and_comes_back(cluster, tmp_path):
    """Requests are refused with when to come again, devices are served on, and what they say meanwhile is stored afterwards."""
    server = Server(tmp_path, database_url=cluster.new()).start()
    try:
        manifest = server.publish_simple("m", 1)
        device = server.enrol("d1")
        device.connect()
        device.report({"m": model_state(manifest)})
        wait_until(lambda: server.get("/devices/d1")["models"], "it is heard")
        cluster.stop()
        refused = server.request("POST", "/access-tokens", json={"name": "x", "role": "viewer"})
        assert (refused.status_code, int(refused.headers["Retry-After"]) > 0) == (503, True)
        device.send("presence", Presence(device="d1", session=device.session, online=True))
        device.report({"m": model_state(manifest)})
        cluster.start()
        wait_until(
            lambda: server.request("POST", "/access-tokens", json={"name": "x", "role": "viewer"}).status_code == 200,
            "it stores again",
        )
        wait_until(lambda: server.get("/devices/d1")["state"]["counter"] == device.counter, "what was said meanwhile was kept")
        wait_until(lambda: server.get("/status")["warnings"] == [], "all is well")
        device.disconnect()
    finally:
        server.stop()


def test_init_refuses_a_database_that_is_somebodys_or_not_there(cluster, tmp_path):
    url = cluster.new()

    def init(where: str) -> str:
        line = [
            "--profile",
            str(tmp_path / "p"),
            "init",
            str(tmp_path / "new"),
            "--keys",
            str(tmp_path / "keys"),
            "--database-url",
            where,
        ]
        done = warm.run("fleet_server.cli", line, env=environment())
        return str(done.stderr) if done.returncode else ""

    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE theirs (x int)")
    assert "is not empty (it has a table 'theirs')" in init(url)
    for wrong, words in {
        url.replace("fleet_", "nowhere_"): "does not exist", "mysql://h/n": "names 'mysql'", "what": "is no URL",
        f"postgresql:///x?host={tmp_path}": "cannot be read",
    }.items():  # fmt: skip
        assert words in init(wrong)
    assert not Path(tmp_path / "new").exists()


def test_a_newer_schema_is_refused(database):
    with database.session() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseError, match="newer version"):
        database.migrate()
