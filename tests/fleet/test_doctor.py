"""`edge-fleet doctor`: each thing that is missing is named, with what to do, and the exit status says whether it matters."""

import json

import pytest

pytestmark = pytest.mark.mosquitto


def lose_the_database(server):
    (server.data / "database.sqlite3").unlink()


def come_from_a_newer_version(server):
    server.execute("UPDATE alembic_version SET version_num = '9999'")


def findings(server):
    done = server.cli("doctor", server.data, "--json")
    return done.returncode, {one["name"]: one for one in json.loads(done.stdout)}


TOLD = ("enrolment", "devices", "broker address")
"""What devices are told, and whether it answers: tests/fleet/test_addresses.py."""


def test_all_is_well(own_server):
    before = sorted(path.name for path in own_server.data.iterdir())
    code, found = findings(own_server)
    assert code == 0
    assert list(found) == ["configuration", "descriptors", "broker", "plug-in", "disk", "database", "CA", *TOLD]
    assert {one["level"] for one in found.values()} == {"ok"}
    assert "mosquitto version" in found["broker"]["message"]
    assert sorted(path.name for path in own_server.data.iterdir()) == before, "it changes nothing"
    said = own_server.cli("doctor", own_server.data)
    assert (said.returncode, said.stdout.count("✓ ")) == (0, 10)


def test_a_server_that_runs_is_asked_itself(server):
    code, found = findings(server)
    assert code == 0
    assert f"process {server.process.pid}" in found["descriptors"]["message"]
    assert found["database"]["level"] == "ok"


WRONG = [
    # what is wrong, which finding says so, how bad it is, in which words
    (lambda s: s.set(broker={"mosquitto": "not-there"}), "broker", "failed", "apt install mosquitto"),
    (lambda s: s.set(broker={"dynamic_security": "/not/there.so"}), "plug-in", "failed", "/not/there.so"),
    (lambda s: s.set(broker={"dynamic_security": ""}), "plug-in", "warning", "restarts the broker"),
    pytest.param(lose_the_database, "database", "failed", "does not exist", marks=pytest.mark.sqlite),
    (come_from_a_newer_version, "database", "failed", "newer version"),
    (lambda s: (s.data / "fleet.yaml").write_text("fleet: ["), "configuration", "failed", "fleet.yaml"),
]


@pytest.mark.parametrize(("breaks", "name", "level", "words"), WRONG)
def test_what_is_wrong_is_named(breaks, name, level, words, own_server):
    breaks(own_server)
    code, found = findings(own_server)
    assert (found[name]["level"], words in found[name]["message"]) == (level, True)
    assert found[name]["advice"]
    assert code == (1 if level == "failed" else 0)
