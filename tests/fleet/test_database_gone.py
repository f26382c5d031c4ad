"""The database's files are deleted or replaced while the server runs: it says so and stores nothing, and makes no empty one."""

import contextlib
import sqlite3

import pytest
import requests

from fleet_server.storage.database import Database, DatabaseError
from fleet_server.storage.database_file import DatabaseGone
from tests.fleet.stand import wait_until

pytestmark = pytest.mark.sqlite

NAMES = ("database.sqlite3", "database.sqlite3-wal", "database.sqlite3-shm")


@pytest.fixture
def running(own_server):
    return own_server.start()


def write(server):
    return server.request("POST", "/access-tokens", json={"name": "x", "role": "viewer"})


def metrics(server):
    return server.request("GET", "/metrics").text


@pytest.mark.parametrize("lost", [NAMES, NAMES[:1], NAMES[1:]], ids=["all", "only the database", "only its log"])
def test_what_is_deleted_is_missed_at_once_and_not_made_anew(running, lost, tmp_path, connect):
    server = running
    device = connect(server.enrol("d1"))
    assert write(server).status_code == 200
    for name in lost:
        (server.data / name).rename(tmp_path / name)  # as deleting does, but that it can be undone

    refused = write(server)

    assert (refused.status_code, refused.json()["code"]) == (503, "database_gone")
    assert int(refused.headers["Retry-After"]) > 0
    assert "restore the database" in refused.json()["error"]
    # Reading goes on, with the connections that are open; who would need another one is told what everybody is told.
    wait_until(lambda: "NOTHING IS STORED" in server.request("GET", "/status").text, "the status says it")
    wait_until(lambda: "\nedge_fleet_database_ok 0\n" in metrics(server), "so do the metrics")
    assert server.cli("device", "delete", "d1", "--yes").returncode != 0
    device.report({})
    wait_until(lambda: "cannot be stored" in server.log(), "the intake notices")
    many = [
        requests.get(
            f"{server.url}/api/v1/me", headers={"Authorization": f"Bearer {server.token}"}, verify=str(server.ca), timeout=20
        )
        for _ in range(20)
    ]
    assert {answer.status_code for answer in many} <= {200, 503}
    assert not any((server.data / name).exists() for name in lost), "none was made in its place"
    wait_until(lambda: device.get("/metadata/timestamp.json").status_code == 200, "devices are served on")

    for name in lost:
        (tmp_path / name).rename(server.data / name)

    wait_until(lambda: server.request("GET", "/status").json().get("warnings") == [], "the tick sees that they are back")
    assert write(server).status_code == 200
    wait_until(lambda: server.get("/devices/d1")["state"] is not None, "what was said meanwhile is stored")
    assert "\nedge_fleet_database_ok 1\n" in metrics(server)
    assert server.get("/status")["warnings"] == []


def test_another_file_in_its_place(running):
    server = running
    data = (server.data / NAMES[0]).read_bytes()
    (server.data / NAMES[0]).unlink()
    (server.data / NAMES[0]).write_bytes(data)
    assert write(server).json()["code"] == "database_gone"


def test_a_fleet_without_its_database_does_not_start_with_an_empty_one(own_server):
    for name in NAMES:
        (own_server.data / name).unlink(missing_ok=True)
    done = own_server.cli("serve", own_server.data)
    assert done.returncode == 1
    assert "restore it from a backup" in done.stderr
    assert not (own_server.data / NAMES[0]).exists()
    (own_server.data / NAMES[0]).touch()
    own_server.start()
    assert own_server.request("GET", "/me").status_code == 401, "it knows nobody"


def test_the_check_behind_the_commit(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/x.sqlite3")
    database.migrate()
    try:
        with pytest.raises(DatabaseGone), database.session():
            (tmp_path / "x.sqlite3").rename(tmp_path / "y.sqlite3")
        with database.reading() as session:
            assert session.get_bind() is not None
        (tmp_path / "y.sqlite3").rename(tmp_path / "x.sqlite3")
        with database.session():
            pass
        assert (database.problem, database.refused > 0) == ("", True)
    finally:
        database.close()


def test_a_log_that_is_written_anew_is_the_same_log(tmp_path):
    """SQLite empties its log and begins again; connections come and go."""
    database = Database(f"sqlite:///{tmp_path}/x.sqlite3")
    database.migrate()
    try:
        for number in range(5):
            with database.session() as session:
                session.connection().exec_driver_sql("INSERT INTO settings VALUES (?, '1')", (str(number),))
            with contextlib.closing(sqlite3.connect(tmp_path / "x.sqlite3")) as other:
                other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            database.engine.dispose()
    finally:
        database.close()


def test_no_database_where_there_must_be_one(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/x.sqlite3", must_exist=True)
    with pytest.raises(DatabaseError, match="touch"):
        database.migrate()
    assert list(tmp_path.iterdir()) == []
