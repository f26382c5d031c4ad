"""No signed file and no manifest is read twice for one thing, and a report that changes nothing costs no more than storing it."""

from __future__ import annotations

import collections
import contextlib
import json
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from sqlalchemy import event

from agent.contract import topics
from agent.contract.names import ReleaseRef
from agent.contract.reports import ModelState, Outcome, Phase, Presence
from fleet_server.access import SERVER
from fleet_server.app import Fleet
from fleet_server.ingest.intake import Message
from fleet_server.ingest.mqtt_link import MqttLink, Received
from fleet_server.releases import catalogue
from tests import audit
from tests.fleet.stand import answer, sha256, signed_report, simple_manifest
from tests.fleet.test_rollouts import Story

pytestmark = pytest.mark.alone  # it listens to the interpreter: see tests/audit.py


@contextlib.contextmanager
def files_read(folder: Path):
    """Path → how often it was opened for reading meanwhile, below `folder`."""
    found: collections.Counter[str] = collections.Counter()

    def hear(event: str, arguments: tuple[object, ...]) -> None:
        is_read = event == "open" and isinstance(arguments[1], str) and arguments[1].startswith("r")
        if is_read and str(arguments[0]).startswith(str(folder)):
            found[str(arguments[0])] += 1

    with audit.listening(hear):
        yield found


@contextlib.contextmanager
def manifests_parsed(monkeypatch):
    parsed, works = [], catalogue.parse_manifest
    with monkeypatch.context() as patched:
        patched.setattr(catalogue, "parse_manifest", lambda data: parsed.append(len(data)) or works(data))
        yield parsed


@pytest.fixture
def story(fleet, clock):
    made = Story(fleet, clock)
    made.publish(1, 2)
    made.join("d1", "d2", "d3")
    return made


def restarted(story, clock) -> Fleet:
    """The server as it is after a restart: nothing of the repository is in memory."""
    return Fleet(story.fleet.folder, story.fleet.config, clock)


def test_a_rollout_is_started_with_each_file_read_once(story, clock, monkeypatch):
    fleet = restarted(story, clock)
    with files_read(fleet.folder.root / "repository") as read, manifests_parsed(monkeypatch) as parsed:
        fleet.rollouts.start(SERVER, ReleaseRef("digits", 1))
    assert read, "after a restart there is something to read"
    assert set(read.values()) == {1}, read
    assert len(parsed) <= 1

    fleet.rollouts.abort(SERVER, fleet.views.rollouts()[0].id)
    with files_read(fleet.folder.root / "repository") as read, manifests_parsed(monkeypatch) as parsed:
        fleet.rollouts.start(SERVER, ReleaseRef("digits", 1))
    assert (dict(read), parsed) == ({}, []), "what was read and written before is known"
    fleet.close()


def test_what_somebody_else_changed_is_read_again(story):
    repository = story.fleet.repository
    path = story.fleet.folder.metadata / "timestamp.json"
    before = repository.versions()["timestamp"]
    stamp = json.loads(path.read_bytes())
    stamp["signed"]["version"] += 1
    path.write_text(json.dumps(stamp))
    assert repository.versions()["timestamp"] == before + 1


@pytest.fixture
def link(story, monkeypatch):
    """Stores messages as they come from the broker, and judges what they change."""
    monkeypatch.setattr(mqtt.Client, "ack", lambda *_: None)
    return MqttLink(story.fleet.authority, "127.0.0.1", 1, story.fleet.intake, story.fleet.judge.evaluate)


def test_a_report_that_changes_nothing(story, link, clock, monkeypatch):
    manifest = simple_manifest("digits", 1, b"digits 1")
    story.join("idle", groups=["nobody"], online=False)
    rollout = story.start(1, groups=["nobody"], confirm=True)
    state = ModelState(
        serving=1, sha256=sha256(b"digits 1"), variant="cpu", phase=Phase.STEADY, answers=(answer(manifest, Outcome.COMMITTED),)
    )  # fmt: skip

    def report(counter: int) -> list[Received]:
        device = story.devices["d1"]
        said = signed_report(device.report(counter, models={"digits": state}), device.key)
        return [Received(Message(topics.up("d1", "state"), said), counter, 1, 0)]

    link.store(report(1))
    clock.now += 60
    statements: list[str] = []
    event.listen(story.fleet.database.engine, "before_cursor_execute", lambda *found: statements.append(found[2]))
    with files_read(story.fleet.folder.root) as read, manifests_parsed(monkeypatch) as parsed:
        link.store(report(2))
    assert (dict(read), parsed) == ({}, [])
    scans = [text for text in statements if "FROM devices" in text and "devices.id IN" not in text]
    assert scans == [], "no other device's row is read"
    assert not [text for text in statements if "rollouts" in text], "and no rollout is judged"
    assert not [text for text in statements if "device_models" in text], "nothing is read or written of the model"
    assert story.fleet.inventory.get("d1").last_seen == clock.now
    assert story.fleet.inventory.get("d1").state.counter == 2
    assert story.state(rollout) == "running"


def test_a_report_that_changes_something_is_judged(story, link):
    rollout = story.start(1)
    for name in story.devices:
        story.devices[name].say("presence", Presence(device=name, session=1, online=True))
    state = ModelState(serving=1, sha256=sha256(b"digits 1"), variant="cpu", phase=Phase.STEADY)
    for number, device in enumerate(story.devices.values()):
        said = signed_report(device.report(1, models={"digits": state}), device.key)
        link.store([Received(Message(topics.up(device.id, "state"), said), number, 1, 0)])
    assert story.state(rollout) == "completed"
