"""What a rollout would reach, before it begins."""

import pytest

from agent.contract.assignment import slot
from agent.contract.manifest import Block, File
from agent.contract.names import ReleaseRef
from agent.contract.reports import Answer, Hardware, ModelState, Outcome, Phase
from fleet_server.errors import Invalid, NotFound
from fleet_server.rollouts import preview
from fleet_server.rollouts.preview import WavePreview
from tests.fleet.stand import sha256
from tests.fleet.test_rollouts import Story

PI = Hardware(arch="aarch64", machine="pi", memory_bytes=4 << 30, runtimes={"onnx": "onnxruntime 1.20"})
OLD = Hardware(arch="armv7l", machine="old", runtimes={})


@pytest.fixture
def story(fleet, clock):
    made = Story(fleet, clock)
    made.publish(1, 2)
    return made


def report(story, name, hardware=PI, **state):
    story.counters[name] += 1
    device = story.devices[name]
    models = {"digits": ModelState(**{"serving": None, "sha256": None, "phase": Phase.STEADY} | state)} if state else {}
    device.state(device.report(story.counters[name], models=models, hardware=hardware))


def planned(story, *waves, version=2, **first):
    return story.fleet.views.preview([ReleaseRef("digits", version)], waves, first.get("groups", ()), first.get("permille"))[0]


def test_each_wave_says_whom_it_adds(story):
    story.join("canary-1", "canary-2", groups=["canary"])
    story.join(*(f"plain-{n}" for n in range(20)))
    story.join("away", online=False)
    for name in story.devices:
        report(story, name)
    found = planned(story, "1", "canary", "50%")
    assert [one.reach for one in found.waves] == ["one device", "group canary", "50 % of the devices", "every device"]
    assert found.waves[0].devices == 1
    assert sum(one.devices for one in found.waves) == 23
    assert sum(one.online for one in found.waves) == 23, "who reported is there"
    share = max(500, min(slot(preview.DRAW, name) for name in story.devices) + 1)
    reached = [name for name in story.devices if slot(preview.DRAW, name) < share or "canary" in name]
    assert sum(one.devices for one in found.waves[:3]) == len(reached)


def test_what_stands_in_its_way(story, clock):
    story.join("serves", "held", "refused", "old", "unknown", "fetches")
    story.join("away", groups=["shop"], online=False)
    report(story, "serves", serving=2, sha256=sha256(b"digits 2"))
    report(story, "held", serving=1, sha256=sha256(b"digits 1"), held=True)
    refusal = Answer(release=2, outcome=Outcome.REFUSED, reason="golden_mismatch", at=clock())
    report(story, "refused", serving=1, sha256=sha256(b"digits 1"), quarantined=(refusal,))
    report(story, "old", hardware=OLD, serving=1, sha256=sha256(b"digits 1"))
    report(story, "fetches", serving=1, sha256=sha256(b"digits 1"))
    found = planned(story, groups=["shop"])
    size = len(b"digits 2")
    assert found.waves == (
        WavePreview(reach="group shop", devices=1, unknown=1),
        WavePreview(
            reach="every device", devices=6, online=6, serving=1, held=1, refusing=1, unfit=1, unknown=1, fetch_bytes=size
        ),
    )
    said = " | ".join(found.worries)
    assert "wave 1 (group shop): none of its devices is there now" in said
    assert "devices that no variant fits: 1 ('cpu': runtime 'onnx' does not work here (working: none))" in said
    assert "refuse it again: 1" in said
    assert "held on what they run, and not waited for: 1" in said


def test_blocks_that_a_device_has_are_not_fetched_again():
    def file(*pieces):
        blocks = tuple(Block(sha256=sha256(piece), size_bytes=len(piece)) for piece in pieces)
        return File(sha256=sha256(b"".join(pieces)), size_bytes=sum(map(len, pieces)), blocks=blocks)

    before, after = file(b"one", b"two"), file(b"one", b"three", b"three")
    missing = set(preview.pieces(after)) - {before.sha256, *preview.pieces(before)}
    assert sum(preview.pieces(after)[sha] for sha in missing) == len(b"three")
    assert preview.pieces(File(sha256="0" * 64, size_bytes=7)) == {"0" * 64: 7}


@pytest.mark.parametrize("waves", [("canari", "50%"), ("5%", "1%"), ("0",)])
def test_what_cannot_begin_cannot_be_planned(story, waves):
    story.join("one", groups=["canary"])
    with pytest.raises(Invalid):
        planned(story, *waves)
    with pytest.raises(NotFound):
        planned(story, version=9)


def test_a_plan_begins_nothing(server):
    server.publish_simple("planned", 1)
    server.publish_simple("planned-too", 1)
    server.enrol("plan-1", ["plans"])
    plain = server.cli("rollout", "plan", "planned:1", "--waves", "1,plans,50%")
    assert plain.returncode == 0, plain.stderr
    assert "one device" in plain.stdout
    assert "none of its devices is there now" in plain.stdout
    before = server.get("/rollouts")
    both = server.cli("rollout", "plan", "planned:1", "planned-too:1", "--team", "--json")
    assert '"planned-too:1"' in both.stdout
    assert server.get("/rollouts") == before
    nobody = server.cli("rollout", "plan", "planned:1", "--waves", "plams")
    assert (nobody.returncode, "no device is in the group 'plams'" in nobody.stderr) == (3, True)
