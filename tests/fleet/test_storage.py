"""The schema: migrations make exactly the tables of the models, and a newer database is refused."""

import subprocess
import sys

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, select, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from fleet_server.devices import group_scopes, grouping
from fleet_server.rollouts import rows
from fleet_server.rollouts.beginning import Calendar
from fleet_server.rollouts.evidence import Recorder, differences
from fleet_server.rollouts.gates import Counts, Ruling, Verdict
from fleet_server.rollouts.machine import State
from fleet_server.rollouts.views import MemberView, Views
from fleet_server.rollouts.vitals import VitalsLedgers
from fleet_server.sections import RolloutSettings
from fleet_server.storage import changes
from fleet_server.storage.database import MIGRATIONS, Database, DatabaseError, newest_revision
from fleet_server.storage.group_models import DeviceGroup
from fleet_server.storage.models import Base, Device, DeviceModel, EnrolmentToken
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
import fleet_server.running
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
    views = Views(database, hearing=None, calendar=Calendar(RolloutSettings()), clock=lambda: 5.0)
    first = views.rollout("r1-aaaa")
    assert (first.state, first.confirm, first.window) == (State.WAITING, True, "mon-fri 22:00-05:00")
    assert first.team == (MemberView("r2-bbbb", "eye", 5),)
    assert (first.scope, first.attempt, first.superseded) == ((), 0, ()), "it is for everyone, as it was"
    assert (first.verdict.verdict, first.verdict.counts.committed) == (Ruling.PASS, 1)
    assert not views.rollout("r2-bbbb").confirm
    (ended,) = views.exclusions()
    assert (ended.hardware, ended.ended, ended.ended_by, ended.devices[0].device) == ("aarch64/-/cuda", 4.0, "ann", "d1")


DEVICES_BEFORE = """
INSERT INTO devices (id, created, groups, labels, serial, record_expires, revoked, counter, last_seen, present, session, hardware, state, runs)
VALUES ('d1', 1.0, '["canary", "warsaw"]', '{}', 1, 0.0, false, 5, 2.0, true, 3, '{"arch": "aarch64", "machine": "pi"}',
  '{"problem": "metadata_rollback", "models": {}}', '[]');
INSERT INTO devices (id, created, groups, labels, serial, record_expires, revoked, counter, last_seen, present, session, hardware, state, runs)
VALUES ('d2', 1.0, '[]', '{}', 1, 0.0, false, 5, 2.0, true, 3, 'null',
  '{"models": {"m": {"serving": 1, "phase": "steady", "wanted": 2, "answers": [{"release": 2, "outcome": "refused", "at": 1.0}]}}}', '[]');
INSERT INTO devices (id, created, groups, labels, serial, record_expires, revoked, counter, last_seen, present, session, hardware, state, runs)
VALUES ('d3', 1.0, '[]', '{}', 1, 0.0, false, -1, NULL, false, -1, NULL, NULL, '[]');
INSERT INTO certificates (serial, device, pem, issued, expires, revoked) VALUES ('01', 'd1', 'x', 1.0, 50.0, NULL);
INSERT INTO certificates (serial, device, pem, issued, expires, revoked) VALUES ('02', 'd1', 'x', 1.0, 70.0, NULL);
INSERT INTO certificates (serial, device, pem, issued, expires, revoked) VALUES ('03', 'd1', 'x', 1.0, 90.0, 2.0);
INSERT INTO device_models (device, model, serving, sha256, variant, phase, answers) VALUES ('d2', 'm', 1, NULL, NULL, 'steady', '[]');
"""


def test_devices_of_before_are_searched_and_followed(database):
    """Written by the schema of revision 0005."""
    database.migrate("0005")
    with database.session() as session:
        for statement in DEVICES_BEFORE.strip().split(";\n"):
            session.execute(text(statement.rstrip(";").replace(": ", r"\: ")))
    database.migrate()
    with database.session() as session:
        found = {row.id: row for row in session.scalars(select(Device))}
        groups = session.execute(select(DeviceGroup.device, DeviceGroup.name).order_by(DeviceGroup.name)).all()
        assert [(d.hardware_class, d.problem, d.trouble, d.expires) for d in (found["d1"], found["d2"], found["d3"])] == [
            ("aarch64/pi/-", "metadata_rollback", True, 70.0), (None, None, True, None), (None, None, False, None)
        ]  # fmt: skip
        assert [tuple(row) for row in groups] == [("d1", "canary"), ("d1", "warsaw")]
        assert {d.change for d in found.values()} == {0}
        found["d3"].groups = ["canary"]
        session.delete(found["d2"])
    with database.reading() as session:
        number = changes.last(session)
        assert (session.get(Device, "d3").change, list(changes.deleted(session, 0, number))) == (number, ["d2"])
        assert session.get(DeviceGroup, ("d3", "canary")) is not None
        assert session.get(DeviceModel, ("d2", "m")) is None


GROUPED_BEFORE = """
INSERT INTO devices (id, created, groups, labels, serial, record_expires, revoked, counter, last_seen, present, session, hardware, state, runs,
  hardware_class)
VALUES ('d1', 1.0, '["canary"]', '{"site": "berlin"}', 1, 0.0, false, 5, 2.0, true, 3, 'null', '{"agent_version": "0.4.1", "models": {}}', '[]',
  'aarch64/-/cuda');
INSERT INTO devices (id, created, groups, labels, serial, record_expires, revoked, counter, last_seen, present, session, hardware, state, runs)
VALUES ('d2', 1.0, '[]', '{}', 1, 0.0, false, -1, NULL, false, -1, NULL, NULL, '[]');
INSERT INTO devices (id, created, groups, labels, serial, record_expires, revoked, counter, last_seen, present, session, hardware, state, runs)
VALUES ('d3', 1.0, '[]', '{}', 1, 0.0, false, -1, NULL, false, -1, NULL, 'null', '[]');
INSERT INTO device_groups (device, name) VALUES ('d1', 'canary');
INSERT INTO enrolment_tokens (id, hash, device, groups, uses_left, created, created_by, expires, revoked)
VALUES ('t1', 'x', NULL, '["canary"]', 1, 1.0, 'ann', 50.0, false);
"""


def test_devices_of_before_groups_with_scopes_have_theirs_by_hand(database):
    """Written by the schema of revision 0012."""
    database.migrate("0012")
    with database.session() as session:
        for statement in GROUPED_BEFORE.strip().split(";\n"):
            session.execute(text(statement.rstrip(";").replace(": ", r"\: ")))
    database.migrate()
    scope = {"jetsons": group_scopes.read(["class:*/*/cuda", "agent:0.4.*"])}
    with database.session() as session:
        found = {row.id: row for row in session.scalars(select(Device))}
        assert {name: (d.agent_version, d.stale_groups) for name, d in found.items()} == {
            "d1": ("0.4.1", False), "d2": (None, False), "d3": (None, False)
        }  # fmt: skip
        assert not any(grouping.regroup(row, {}) for row in found.values())
        assert not session.get(DeviceGroup, ("d1", "canary")).by_scope
        assert [grouping.regroup(found[name], scope) for name in ("d1", "d2", "d3")] == [True, False, False]
        assert session.get(EnrolmentToken, "t1").labels is None
    with database.reading() as session:
        rows = session.execute(select(DeviceGroup.name, DeviceGroup.by_scope).order_by(DeviceGroup.name)).all()
        assert [tuple(row) for row in rows] == [("canary", False), ("jetsons", True)]


def test_changes_are_numbered_in_the_order_in_which_they_can_be_seen(database):
    """One number for each transaction, none for what is not watched, and none is lost by one that was undone."""
    database.migrate()
    with database.session() as session:
        session.add_all(Device(id=name, created=1.0, groups=[]) for name in "ab")
    with database.reading() as session:
        first = changes.last(session)
        assert {d.change for d in session.scalars(select(Device))} == {first}
    with database.session() as session:
        session.get(Device, "a").record = "signed anew"
    with pytest.raises(ZeroDivisionError), database.session() as session:  # noqa: PT012 - the whole block is what fails
        session.get(Device, "a").present = True
        session.flush()
        assert session.get(Device, "a").change == first + 1
        raise ZeroDivisionError
    with database.reading() as session:
        assert changes.last(session) == first
    with database.session() as session:
        session.get(Device, "b").revoked = True
    with database.reading() as session:
        assert (session.get(Device, "a").change, session.get(Device, "b").change) == (first, first + 1)


JUDGED_BEFORE = """
INSERT INTO rollouts (id, number, model, release, previous, waves, wave, state, confirm, max_failures, mode, team, "window", created,
  created_by, updated, reason, rules)
VALUES ('r1-aaaa', 1, 'arm', 2, 1, '[{"groups": ["canary"], "permille": 0}, {"groups": [], "permille": 1000}]', 0, 'running', false, 2, 'install',
  NULL, NULL, 1.0, 'ann', 2.0, '', '{"max_failures": 2, "min_share": 0.25}');
INSERT INTO verdicts (rollout, wave, at, verdict, why, counts, evidence)
VALUES ('r1-aaaa', 0, 3.5, 'pass', '3 committed; 1 offline', '{"committed": 3, "offline": 1}', '[]');
"""


def test_a_rollout_of_before_health_goes_on_without_it_and_its_evidence_is_judged_again(database):
    """Written by the schema of revision 0009."""
    database.migrate("0009")
    with database.session() as session:
        for statement in JUDGED_BEFORE.strip().split(";\n"):
            session.execute(text(statement.rstrip(";").replace(": ", r"\: ")))
    database.migrate()
    views = Views(database, hearing=None, calendar=Calendar(RolloutSettings()), clock=lambda: 5.0)
    assert views.rollout("r1-aaaa").verdict.health is None
    evidence = Recorder(database).evidence("r1-aaaa")
    assert (evidence.health, evidence.samples, evidence.rules.min_share) == (None, (), 0.25)
    assert differences(evidence) == []
    with database.reading() as session:
        row = rows.find(session, "r1-aaaa")
        passed = Verdict(Ruling.PASS, "", Counts(committed=3))
        assert VitalsLedgers().judge(session, [row], passed) == (passed, None)
