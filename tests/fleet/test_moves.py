"""What going on to a wave, going back and withdrawing would do to which devices, before it is done."""

import json

import pytest
from sqlalchemy import func, select

from agent.contract.manifest import Block, File, ReleaseManifest, Variant
from agent.contract.names import ReleaseRef
from agent.contract.reports import Answer, Hardware, ModelState, Outcome, Phase
from fleet_server.access import SERVER
from fleet_server.errors import Conflict, NotFound
from fleet_server.releases import keys, publisher
from fleet_server.rollouts.moves import Move
from fleet_server.storage.models import AuditRow, EventRow, RolloutRow, Setting
from tests.fleet.stand import sha256
from tests.fleet.test_rollouts import Story, completed

PI = Hardware(arch="aarch64", machine="pi", memory_bytes=4 << 30, runtimes={"onnx": "onnxruntime 1.20"})
OLD = Hardware(arch="armv7l", machine="old", runtimes={})
SIZE = len(b"digits 1")


@pytest.fixture
def story(fleet, clock):
    made = Story(fleet, clock)
    made.publish(1, 2, 3)
    made.join("canary-1", groups=["canary"])
    made.join("plain-1", "plain-2")
    return made


def report(story, name, serving, *, hardware=PI, previous=None, **state):
    """The device says what it runs, what it ran before, and what it is."""
    story.counters[name] += 1
    sha = sha256(f"digits {serving}".encode())
    said = ModelState(
        **{"serving": serving, "sha256": sha, "variant": "cpu", "phase": Phase.STEADY, "previous": previous} | state
    )
    device = story.devices[name]
    device.state(device.report(story.counters[name], models={"digits": said}, hardware=hardware))


def everything(story):
    """What a change would leave behind."""
    with story.fleet.database.reading() as session:
        counted = [session.scalar(select(func.count()).select_from(table)) for table in (AuditRow, EventRow)]
        rollouts = [(row.id, row.state, row.wave, row.reach) for row in session.scalars(select(RolloutRow))]
        settings = {row.name: row.value for row in session.scalars(select(Setting))}
    return counted, rollouts, settings, story.assignment, list(story.pokes)


def test_promote_says_whom_the_next_wave_would_change(story):
    completed(story, 1)
    rollout = story.start(2, groups=["canary"], confirm=True)
    story.commits("canary-1", version=2)
    story.join("away", "held", "old", "refused", "new")
    report(story, "plain-1", 1)
    report(story, "plain-2", 2)
    report(story, "held", 1, held=True)
    report(story, "old", 1, hardware=OLD)
    refusal = Answer(release=2, outcome=Outcome.REFUSED, reason="golden_mismatch", at=story.clock())
    report(story, "refused", 1, quarantined=(refusal,))
    report(story, "away", 1)
    story.clock.now += story.fleet.config.rollouts.silence_s + 1
    for name, serving in (("plain-1", 1), ("canary-1", 2)):
        report(story, name, serving)
    before = everything(story)
    found = story.fleet.rollouts.preview_promote(SERVER, rollout)
    assert found.moves == (
        Move(
            model="digits", release=2, mode="install", devices=7, changing=2, online=1, serving=1, held=1, refusing=1, unfit=1, unknown=1,
            fetch_bytes=2 * SIZE, unfit_classes={"armv7l/old/-": 1},
        ),
    )  # fmt: skip
    assert "goes on to every device" in found.says
    said = " | ".join(found.worries)
    assert "devices that no variant of digits:2 fits: 1 ('cpu': runtime 'onnx' does not work here" in said
    assert "quarantined digits:2 before and refuse it again: 1" in said
    assert "held on what they run: 1" in said
    assert everything(story) == before, "nothing is changed, written down, signed or told"
    story.fleet.rollouts.promote(SERVER, rollout)
    with pytest.raises(Conflict, match="cannot be promoted"):
        story.fleet.rollouts.preview_promote(SERVER, rollout)


def test_a_rollback_fetches_nothing_where_the_release_is_still_there(story):
    completed(story, 1)
    completed(story, 2)
    report(story, "canary-1", 2, previous=1)
    report(story, "plain-1", 2)
    report(story, "plain-2", 1)
    before = everything(story)
    found = story.fleet.rollouts.preview_roll_back(SERVER, "digits", None)
    expected = Move(model="digits", release=1, mode="install", devices=3, changing=2, online=2, serving=1, fetch_bytes=SIZE)
    assert (found.says, found.moves) == ("digits goes back to version 1 everywhere", (expected,))
    assert everything(story) == before
    with pytest.raises(Conflict, match="is no earlier release"):
        story.fleet.rollouts.preview_roll_back(SERVER, "digits", 3)
    with pytest.raises(NotFound, match="ever rolled out"):
        story.fleet.rollouts.preview_roll_back(SERVER, "other", None)
    story.fleet.rollouts.roll_back(SERVER, "digits", None)
    assert {story.wanted(name) for name in story.devices} == {1}, "as it was said"


def test_a_rollback_during_a_rollout_moves_those_that_were_told(story):
    completed(story, 1)
    story.start(2, groups=["canary"])
    report(story, "canary-1", 2, previous=1, phase=Phase.WATCHING)
    found = story.fleet.rollouts.preview_roll_back(SERVER, "digits", None)
    assert found.moves == (Move(model="digits", release=1, mode="install", devices=1, changing=1, online=1),)


def test_a_withdrawal_says_where_each_goes_and_that_nobody_is_held_on_it(story):
    completed(story, 1)
    completed(story, 2)
    for name in story.devices:
        report(story, name, 2, previous=1, held=name == "plain-1")
    report(story, "plain-2", 1)
    found = story.fleet.rollouts.preview_withdraw(SERVER, ReleaseRef("digits", 2))
    assert found.moves == (Move(model="digits", release=1, mode="install", devices=3, changing=2, online=2, serving=1),)
    assert story.state(story.fleet.views.rollouts()[0].id) == "completed"
    story.fleet.rollouts.withdraw(SERVER, ReleaseRef("digits", 2))
    last = story.fleet.rollouts.preview_withdraw(SERVER, ReleaseRef("digits", 1))
    assert [(move.release, move.changing, move.serving, move.fetch_bytes) for move in last.moves] == [(None, 3, 0, 0)]
    assert last.worries == ("devices that would run no release of digits any more: 3",)
    with pytest.raises(Conflict, match="withdrawn already"):
        story.fleet.rollouts.preview_withdraw(SERVER, ReleaseRef("digits", 2))


def test_a_device_that_is_held_on_what_others_left_goes_too_when_it_is_withdrawn(story):
    completed(story, 1)
    completed(story, 2)
    report(story, "plain-1", 1, held=True)
    found = story.fleet.rollouts.preview_withdraw(SERVER, ReleaseRef("digits", 1))
    assert [(move.release, move.devices, move.changing) for move in found.moves] == [(2, 1, 1)]


def test_blocks_of_what_ran_before_are_not_fetched(story):
    """Release 5 shares a block with 4, which a device ran before it went back to 1."""

    def publish(version, *pieces):
        blocks = tuple(Block(sha256=sha256(piece), size_bytes=len(piece)) for piece in pieces)
        data = b"".join(pieces)
        (story.fleet.folder.blobs / sha256(data)).write_bytes(data)
        file = File(sha256=sha256(data), size_bytes=len(data), blocks=blocks)
        variant = Variant(name="cpu", runtime="onnx", file="model.onnx")
        manifest = ReleaseManifest(model="digits", version=version, variants=(variant,), files={"model.onnx": file})
        role = story.fleet.repository.releases()
        story.fleet.catalogue.publish(
            SERVER, *publisher.add(role, manifest, keys.load(story.fleet.releases_key), story.clock())
        )

    publish(4, b"one" * 1000, b"two")
    publish(5, b"one" * 1000, b"three")
    completed(story, 1)
    report(story, "plain-1", 1, previous=4)
    report(story, "plain-2", 1)
    report(story, "canary-1", 5)
    waves = story.fleet.views.preview([ReleaseRef("digits", 5)], (), (), None)[0].waves
    assert [one.fetch_bytes for one in waves] == [len(b"three") + 3000 + len(b"three")]


def test_commands_that_only_say_what_they_would_do(server):
    server.publish_simple("foreseen", 1)
    server.publish_simple("foreseen", 2)
    server.enrol("foreseen-1", ["foreseen"])
    begun = server.post("/rollouts", {"release": "foreseen:1", "scope": ["group:foreseen"]})
    server.post(f"/rollouts/{begun['id']}/complete")
    rollout = server.post("/rollouts", {"release": "foreseen:2", "scope": ["group:foreseen"], "waves": ["1"], "confirm": True})
    early = server.cli("rollout", "promote", rollout["id"], "--plan")
    assert (early.returncode, "cannot be promoted" in early.stderr) == (3, True)
    back = server.cli("rollback", "foreseen", "--scope", "group:foreseen", "--plan")
    assert back.returncode == 0, back.stderr
    assert "if done: foreseen goes back to version 1 in group:foreseen" in back.stdout
    document = server.cli("withdraw", "foreseen:2", "--plan", "--json")
    moves = json.loads(document.stdout)["moves"]
    assert [(one["release"], one["devices"], one["unfit"]) for one in moves] == [(1, 1, 1)], document.stderr
    assert server.get(f"/rollouts/{rollout['id']}")["state"] == "running"
    asked = server.cli("withdraw", "foreseen:2", "--json", stdin="n\n")
    assert (asked.returncode, asked.stdout) == (1, "")
    assert "if done: foreseen:2 was withdrawn" in asked.stderr
    assert "TOLD TO RUN" in asked.stderr
    assert not server.get("/releases/foreseen/2")["withdrawn"]
    viewer = server.make_token("viewer")
    assert server.request("POST", "/releases/foreseen/2/withdraw/plan", token=viewer).status_code == 200
    assert server.request("POST", "/releases/foreseen/2/withdraw", token=viewer).status_code == 403
