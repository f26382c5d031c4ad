"""`edge-agent enrol | doctor | updates | hold | rollback` as an operator meets them: what they say, and how they exit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.cli import cli
from agent.contract.reports import Answer, Outcome, Phase
from agent.store import Choice, Selection, Store
from agent.sync.updating.quarantine import Quarantine
from agent.sync.updating.states import States
from agent.sync.updating.update import UpdateState
from tests.sync.fake_serve import FakeServe
from tests.sync.test_enrol import Office
from tests.sync.test_retention import fill


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "agent.yaml"
    settings = {
        "store": str(tmp_path / "store"),
        "serve": {"socket": str(tmp_path / "s.sock")},
        "sync": {"identity": str(tmp_path / "identity"), "disk_reserve_bytes": 0},
    }
    path.write_text(json.dumps(settings))
    return path


def run(*words: object):
    return CliRunner().invoke(cli, [str(word) for word in words])


def test_enrol_says_what_happened_and_what_comes_next(config, server, authority, tmp_path):
    office = Office(server, authority)
    done = run("enrol", office.string(), "--device", "crane-9", "--config", config)

    assert done.exit_code == 0, done.output
    assert "enrolled as 'crane-9' in fleet 'harbour'" in done.output
    assert office.requests[0]["hardware"]["cpus"] >= 1
    again = run("enrol", office.string(), "--config", config)
    assert again.exit_code == 1
    assert "--force" in again.output


def test_the_command_of_before_names_the_one_of_now():
    done = run("enroll", "edge://…")

    assert done.exit_code == 2
    assert "is now called 'enrol'" in done.output


def test_doctor_without_an_identity(config, store):
    done = run("doctor", "--config", config, "--json")
    found = {finding["name"]: finding for finding in json.loads(done.output)}

    assert done.exit_code == 1
    assert found["configuration"]["level"] == "ok"
    assert found["store"]["level"] == "ok"
    assert found["serve"]["level"] == "failed"
    assert "enrolment string" in found["identity"]["advice"]
    assert found["broker"]["level"] == "skipped"


def test_doctor_on_a_device_that_is_well_but_for_its_broker(config, store, identity, tmp_path):
    serve = FakeServe(store, tmp_path / "s.sock")
    try:
        done = run("doctor", "--config", config)
    finally:
        serve.stop()

    assert done.exit_code == 1
    marks = {line.split(":")[0].split(" ", 1)[1]: line[0] for line in done.output.splitlines() if line[0] in "✓✗!-"}
    assert marks.pop("broker") == "✗"
    assert marks.pop("files over the broker") == "-"
    assert set(marks.values()) == {"✓"}, done.output


def test_doctor_with_a_wrong_setting(tmp_path):
    path = tmp_path / "agent.yaml"
    path.write_text("sync: {polling: 3}")
    done = run("doctor", "--config", path)

    assert done.exit_code == 1
    assert "polling" in done.output


@pytest.fixture
def lived(store: Store, tmp_path: Path) -> Store:
    """Release 2 serves, 1 was committed before, 3 was refused."""
    import hashlib

    for version in (1, 2):
        fill(store, tmp_path, version)
    store.select(Selection(model="crane", active=Choice(version=2, variant="cpu"), previous=Choice(version=1, variant="cpu")))
    refused = Answer(release=3, outcome=Outcome.REFUSED, reason="too_slow", message="p95 is 9 ms")
    known = tuple(hashlib.sha256(store.manifest_bytes(ref)).hexdigest() for ref in store.releases())
    state = UpdateState(model="crane", phase=Phase.QUARANTINED, wanted=3, committed=known, answers=(refused,))
    States(store.private / "updates").save(state)
    Quarantine(store.private / "quarantine").add("crane", "m3", refused)
    return store


def test_updates_shows_the_refusal_and_lifts_it(config, lived):
    shown = run("updates", "--config", config)
    assert "crane: quarantined, active 2, wanted 3" in shown.output
    assert "refused here" in shown.output
    assert "too_slow: p95 is 9 ms" in shown.output

    assert "may be tried again" in run("updates", "--forget", "crane:3", "--config", config).output
    assert json.loads(run("updates", "--json", "--config", config).output)["crane"]["quarantine"] == []
    assert run("updates", "--forget", "crane", "--config", config).exit_code == 1


def test_hold_and_rollback(config, lived):
    assert "held on release 2" in run("hold", "crane", "--config", config).output
    assert "rolls back to release 1" in run("rollback", "crane", "--config", config).output
    assert json.loads(run("updates", "--json", "--config", config).output)["crane"]["held"] == 1
    assert "edge-agent unhold" in run("hold", "crane", "--lift", "--config", config).output
    assert json.loads(run("updates", "--json", "--config", config).output)["crane"]["held"] == 1
    assert "follows the fleet again" in run("unhold", "crane", "--config", config).output
    assert run("rollback", "crane", "--to", "2", "--config", config).exit_code == 1
    assert run("rollback", "crane", "--to", "7", "--config", config).exit_code == 1
    assert run("hold", "unknown", "--config", config).exit_code == 1


def test_before_any_store(config):
    assert run("updates", "--config", config).output == "no model was updated on this device yet\n"
    assert "is not a store" in run("hold", "crane", "--config", config).output
