"""What simulated devices are and do: the pure parts, with a clock that is given."""

import json
import random

import pytest

from agent.contract.assignment import Assignment, ModelAssignment, Rollout
from agent.contract.names import ReleaseRef
from agent.contract.reports import Outcome, Phase
from fleet_server.errors import Invalid
from fleet_server.rollouts.gates import Fact, Ruling
from fleet_server.simulation import behaviours, expected, members, orders, plot, report
from fleet_server.simulation.behaviours import Behaviour, Share
from fleet_server.simulation.device import OTHER_BYTES, Device, Known
from fleet_server.simulation.expected import Ending, Plan, Stage
from fleet_server.simulation.members import KINDS, Member
from fleet_server.simulation.orders import Wish
from fleet_server.simulation.pace import Pace, Realism
from tests.fleet.test_gates import judge

NEW = ReleaseRef("m", 2)
EVERYONE = (Stage(permille=1000),)


def member(behaviour=Behaviour.HONEST, **fields):
    base = {"id": "d-1", "groups": (), "hardware": KINDS[0], "runs": {"m": 1}}
    return Member(**{**base, "behaviour": behaviour, **fields})


class Heard:
    """A voice that keeps what was said."""

    def __init__(self):
        self.reports, self.events, self.link = [], [], True

    def report(self, models, *, assignment):
        if not self.link:
            return None
        self.reports.append((models, assignment))
        return len(self.reports)

    def event(self, name, _message, *, model, release, reason=None):
        self.events.append((name, model, release, reason))


class Played:
    """A device, and the time that passes for it."""

    def __init__(self, behaviour=Behaviour.HONEST, **fields):
        self.voice, self.now, self.behaviour = Heard(), 0.0, behaviour
        pace = Pace(random.Random(1), behaviour, Realism())
        self.manifests = {ReleaseRef("m", 1): Known("1" * 64, "cpu"), NEW: Known("2" * 64, "cpu")}
        self.device = Device(member(behaviour, **fields), pace, self.voice, self.manifests.get, lambda: self.now, {NEW})
        self.device.connected(0.0)

    def hear(self, release, version, rollout=None):
        rules = ModelAssignment(
            release=release, rollout=Rollout(id=rollout, release=2, previous=1, permille=1000) if rollout else None
        )
        self.device.hear(Assignment(fleet="f", version=version, models={"m": rules}), (), self.now)

    def pass_time(self, seconds, *, delivered=True):
        """Lets time pass, from one thing that is due to the next; reports are delivered as they come."""
        end = self.now + seconds
        while self.now <= end:
            said = len(self.voice.reports)
            self.device.step(self.now)
            if delivered and len(self.voice.reports) > said:
                self.device.delivered(len(self.voice.reports), self.now)
            if (at := self.device.next_at()) > end:
                break
            self.now = max(self.now, at)
        self.now = end

    @property
    def last(self):
        return self.voice.reports[-1][0]["m"]

    def phases(self):
        found = [models["m"].phase for models, _ in self.voice.reports]
        return [phase for number, phase in enumerate(found) if number == 0 or found[number - 1] is not phase]


def test_an_update_goes_through_its_phases_and_is_committed_when_the_fleet_has_heard():
    played = Played()
    played.pass_time(1)
    assert (played.last.serving, played.last.phase) == (1, Phase.STEADY)
    played.hear(1, 2, rollout="r1")
    played.pass_time(600, delivered=False)
    assert played.last.phase is Phase.WATCHING
    assert played.last.passed
    assert played.last.serving == 2
    said_so = next(n for n, (models, _) in enumerate(played.voice.reports, start=1) if models["m"].passed)
    played.device.delivered(said_so - 1, played.now)
    assert played.device.models["m"].phase is Phase.WATCHING, "an earlier report does not say that it passed"
    played.device.delivered(said_so, played.now)
    played.pass_time(1)
    assert played.phases() == [
        Phase.STEADY, Phase.FETCHING, Phase.TRIALING, Phase.ACTIVATING, Phase.WATCHING, Phase.STEADY,
    ]  # fmt: skip
    assert [(a.release, a.outcome, a.rollout) for a in played.last.answers] == [(2, Outcome.COMMITTED, "r1")]
    assert [event[0] for event in played.voice.events] == ["update-started", "committed"]
    assert played.last.sha256 == "2" * 64


BAD = [
    (Behaviour.REFUSING, Outcome.REFUSED, "golden_mismatch", "refused"),
    (Behaviour.ROLLING_BACK, Outcome.ROLLED_BACK, "error_ratio", "rolled-back"),
]


@pytest.mark.parametrize(("behaviour", "outcome", "reason", "event"), BAD, ids=str)
def test_a_bad_release_is_quarantined_and_not_tried_again(behaviour, outcome, reason, event):
    played = Played(behaviour)
    played.hear(1, 2, rollout="r1")
    played.pass_time(600)
    assert (played.last.phase, played.last.serving) == (Phase.QUARANTINED, 1)
    assert [(a.outcome, a.reason) for a in played.last.answers] == [(outcome, reason)]
    assert [a.release for a in played.last.quarantined] == [2]
    said = len(played.voice.events)
    played.hear(1, 3, rollout="r1")
    played.pass_time(600)
    assert (len(played.voice.events), played.voice.events[-1][0]) == (said, event)
    played.hear(1, 4)
    played.pass_time(1)
    assert played.last.phase is Phase.STEADY


def test_who_is_silent_says_nothing_more_and_has_nothing_due():
    played = Played(Behaviour.SILENT)
    played.hear(1, 2, rollout="r1")
    played.pass_time(3600)
    assert played.device.muted
    assert played.last.phase is Phase.ACTIVATING
    assert played.device.next_at() == float("inf")


def test_a_wrong_digest_is_claimed_of_the_new_release_alone():
    played = Played(Behaviour.WRONG_DIGEST)
    played.pass_time(1)
    assert played.last.sha256 == "1" * 64
    played.hear(1, 2, rollout="r1")
    played.pass_time(600)
    assert (played.last.serving, played.last.sha256) == (2, OTHER_BYTES)
    assert played.last.answers[-1].outcome is Outcome.COMMITTED


@pytest.mark.parametrize("behaviour", [Behaviour.UNSIGNED, Behaviour.WRONG_KEY])
def test_signatures_are_spoilt_from_the_new_release_on(behaviour):
    played = Played(behaviour)
    assert not played.device.spoilt
    played.hear(1, 2, rollout="r1")
    assert played.device.spoilt


def test_an_aborted_rollout_takes_devices_back_to_what_they_know():
    played = Played()
    played.hear(1, 2, rollout="r1")
    played.pass_time(600)
    assert played.last.serving == 2
    said = len(played.voice.reports)
    played.hear(1, 3)
    played.pass_time(600)
    assert (played.last.serving, played.last.phase) == (1, Phase.STEADY)
    assert Phase.TRIALING not in {models["m"].phase for models, _ in played.voice.reports[said:]}


def test_overtaken_in_the_watch_the_release_before_serves():
    played = Played()
    played.hear(1, 2, rollout="r1")
    while played.device.models["m"].phase is not Phase.WATCHING:
        played.pass_time(1)
    played.hear(1, 3)
    played.pass_time(1)
    assert (played.last.serving, played.last.phase) == (1, Phase.STEADY)


def test_an_older_word_is_no_news_and_a_held_model_stays():
    played = Played()
    played.hear(1, 5)
    played.hear(1, 4, rollout="r1")
    played.pass_time(600)
    assert played.last.serving == 1
    held = Played(held=frozenset({"m"}))
    held.hear(1, 2, rollout="r1")
    held.pass_time(600)
    assert (held.last.serving, held.last.wanted, held.last.held) == (1, 2, True)


def test_without_the_manifest_nothing_begins():
    played = Played()
    del played.manifests[NEW]
    played.hear(1, 2, rollout="r1")
    assert played.device.missing == {NEW}
    played.manifests[NEW] = Known("2" * 64, "cpu")
    played.hear(1, 2, rollout="r1")
    played.pass_time(600)
    assert played.last.serving == 2


def test_nothing_is_said_without_a_link_and_all_of_it_after():
    played = Played()
    played.hear(1, 2, rollout="r1")
    played.device.disconnected()
    played.voice.link = False
    played.pass_time(600)
    assert played.voice.reports == []
    played.voice.link = True
    played.device.connected(played.now)
    played.pass_time(1)
    assert (played.last.serving, played.last.answers[-1].outcome) == (2, Outcome.COMMITTED)


def test_what_the_link_did_not_take_is_said_again():
    played = Played()
    played.voice.link = False
    played.pass_time(1)
    played.voice.link = True
    played.pass_time(1)
    assert len(played.voice.reports) == 1


# -- who they are --------------------------------------------------------------------------------------------------------------


def test_shares_are_exact_and_a_seed_repeats_them():
    shares = [behaviours.parse("refusing=3%"), behaviours.parse("offline=7")]
    drawn = behaviours.draw(300, shares, 5)
    assert (drawn.count(Behaviour.REFUSING), drawn.count(Behaviour.OFFLINE)) == (9, 7)
    assert drawn == behaviours.draw(300, shares, 5)
    assert drawn != behaviours.draw(300, shares, 6)


@pytest.mark.parametrize(
    "text", ["", "refusing", "refusing=", "refusing=-1", "refusing=101%", "refusing=1e3%", "refusing=2.5", "honest=3%", "sleepy=3%", "refusing=٣"]
)  # fmt: skip
def test_shares_that_are_none(text):
    with pytest.raises(Invalid, match="behaviour"):
        behaviours.parse(text)


def test_more_bad_devices_than_there_are():
    with pytest.raises(Invalid, match="11 devices are to misbehave, and there are 10"):
        behaviours.draw(10, [Share(Behaviour.OFFLINE, devices=11)], 1)
    with pytest.raises(Invalid, match="one share"):
        behaviours.draw(10, [Share(Behaviour.OFFLINE, devices=1), Share(Behaviour.OFFLINE, devices=1)], 1)


def listed(device, **fields):
    state = {"serving": 3, "sha256": "a" * 64, "phase": "steady"}
    return {"id": device, "groups": ["shop"], "hardware": {"arch": "arm64", "machine": "x"}, "models": {"m": state}, **fields}


def test_an_inventory_gives_groups_hardware_and_what_devices_run():
    held = {
        "m": {"serving": 2, "sha256": None, "phase": "steady", "held": True},
        "n": {"serving": None, "sha256": None, "phase": "fetching"},
    }
    found = members.from_inventory(
        json.dumps([listed("a"), listed("b", models=held, hardware=None), listed("c", revoked=True)]).encode(), (), 1
    )
    assert [(one.id, one.groups, one.runs, one.held) for one in found] == [
        ("a", ("shop",), {"m": 3}, frozenset()),
        ("b", ("shop",), {"m": 2}, frozenset({"m"})),
    ]
    assert found[0].hardware_class == "arm64/x/-"
    assert members.most_run(found) == {"m": 3}


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{}", b"[1]", b'[{"id": 1}]', b'[{"id": "../x"}]', b'[{"id": "a", "groups": ["#"]}]', b'[{"id":"a"},{"id":"a"}]',
        b"[" * 100_000, b'[{"id":"a","models":{"m":{"serving":"x","sha256":null,"phase":"steady"}}}]',
        b'[{"id":"a","models":{"../m":{"serving":1,"sha256":null,"phase":"steady"}}}]',
    ],
    ids=range(10),
)  # fmt: skip
def test_what_is_no_inventory(data):
    with pytest.raises(Invalid):
        members.from_inventory(data, (), 1)


WISH = Wish(release=None, plan=Plan(EVERYONE), shares=(), realism=Realism(), seed=1, timeout_s=60.0)


def test_what_is_brought_out_is_newer_than_what_runs():
    order = orders.of_inventory(json.dumps([listed("a"), listed("b")]).encode(), WISH)
    assert str(order.release) == "m:4"

    def refused(match, **fields):
        import msgspec

        with pytest.raises(Invalid, match=match):
            orders.of_inventory(json.dumps([listed("a")]).encode(), msgspec.structs.replace(WISH, **fields))

    refused("is not new", release=ReleaseRef("m", 3))
    refused("no device is in the group 'canary'", plan=Plan((Stage(group="canary"), *EVERYONE)))
    with pytest.raises(Invalid, match="no device that is not shut out"):
        orders.of_inventory(b"[]", WISH)
    with pytest.raises(Invalid, match="no device runs a model yet"):
        orders.of_inventory(b'[{"id": "a"}]', WISH)


# -- how it must end -----------------------------------------------------------------------------------------------------------


def test_waves():
    assert expected.stages("1%, 10%,100%") == (Stage(permille=10), Stage(permille=100), Stage(permille=1000))
    assert expected.stages("canary,100%") == (Stage(group="canary"), Stage(permille=1000))
    for text in ("", "10%", "10%,5%,100%", "canary", "0%,100%", "10%,101%", "10%,10%,100%", "1,100%", "x%,100%"):
        with pytest.raises(Invalid):
            expected.stages(text)


def fleet(**counts):
    found = [one for name, number in counts.items() for one in [Behaviour(name.replace("_", "-"))] * number]
    return [member(behaviour, id=f"d-{number}") for number, behaviour in enumerate(found)]


ENDS = [
    ({"honest": 9, "refusing": 1}, 1, "completed"),
    ({"honest": 9, "refusing": 2}, 1, "aborted"),
    ({"honest": 9, "refusing": 1, "rolling_back": 1}, 1, "aborted"),
    ({"honest": 9, "offline": 5, "silent": 2, "cloned": 1, "unsigned": 1, "wrong_key": 1}, 0, "completed"),
    ({"honest": 9, "offline": 50}, 0, "completed"),
    ({"honest": 9, "silent": 10}, 0, "stalled"),
    ({"honest": 90, "silent": 40}, 0, "stalled"),
    ({"honest": 9, "wrong_digest": 1}, 0, "running"),
    ({"offline": 9}, 0, "running"),
    ({"slow": 3, "flapping": 3, "wrong_clock": 3}, 0, "completed"),
    ({"refusing": 3, "wrong_digest": 1}, 2, "aborted"),
]


@pytest.mark.parametrize(("counts", "allowed", "state"), ENDS)
def test_endings_are_those_of_the_gates(counts, allowed, state):
    """The oracle shares no code with the gates, and must agree with them."""
    found = fleet(**counts)
    ending = expected.ending(found, Plan(EVERYONE, allowed), "r1", "m")
    assert (ending.state, ending.wave, ending.reached) == ("running" if state == "stalled" else state, 0, len(found))
    outcomes = {"good": Outcome.COMMITTED, "bad": Outcome.REFUSED}
    facts = [
        Fact(
            one.id,
            online=kind not in {"silent", "lost"},
            serving_it=kind == "good",
            outcome=outcomes.get(kind),
            told=kind != "silent",
        )
        for one in found
        for kind in [expected.ANSWERS[one.behaviour]]
    ]
    ruling = {"completed": Ruling.PASS, "aborted": Ruling.FAIL, "running": Ruling.WAIT, "stalled": Ruling.STALL}[state]
    assert judge(facts, max_failures=allowed).ruling is ruling


def test_the_wave_in_which_it_ends():
    canaries = [member(Behaviour.REFUSING, id="c", groups=("canary",)), *fleet(honest=5)]
    plan = Plan((Stage(group="canary"), *EVERYONE))
    assert expected.ending(canaries, plan, "r1", "m") == Ending(
        "aborted", 0, 1, {"good": 0, "bad": 1, "claims": 0, "held": 0, "lost": 0, "silent": 0}
    )
    good = [member(id="c", groups=("canary",)), *fleet(refusing=1, honest=5)]
    assert expected.ending(good, plan, "r1", "m").wave == 1
    assert expected.ending(good, Plan(plan.stages, confirm=True), "r1", "m").state == "waiting"


# -- what is told --------------------------------------------------------------------------------------------------------------


def told(**fields):
    sent = report.Sent(
        reports=1, events=1, pokes=1, requests=1, fetched_bytes=0, verifying=1, distrusted=[], unanswered=0, reconnected=0, accepted=1,
        dropped={},
    )  # fmt: skip
    end = Ending("completed", 1, 3, {"good": 3, "bad": 0, "claims": 0, "held": 0, "lost": 0, "silent": 0})
    moments = [
        report.Moment(at=float(n), connected=3, busy=1, committed=n, bad=0, wave=n // 2, state="running" if n < 3 else "completed")
        for n in range(4)
    ]  # fmt: skip
    base = {
        "devices": 3, "behaviours": {"honest": 3}, "seed": 1, "speed": 1.0, "release": "m:2", "rollout": "r1", "max_failures": 0, "failure_share": 0.03,
        "waves": ["10 %", "100 %"], "connected": 3, "connecting_s": 1.0, "ended": end, "expected": end, "why": "3 committed",
        "late": False, "over_s": 3.0, "last_commit_s": 3.0, "settled_s": 3.0, "lost": [], "problems": [], "sent": sent, "moments": moments,
    }  # fmt: skip
    return report.Report(**{**base, **fields})


def test_what_ends_otherwise_is_said():
    assert told().as_expected
    other = told(expected=Ending("aborted", 0, 1, {"bad": 1}))
    assert not other.as_expected
    assert "NOT AS IT HAD TO: aborted in wave 1" in "\n".join(report.lines(other))
    assert not told(lost=["d-1"]).as_expected
    assert not told(late=True).as_expected
    assert "LOST: 1 devices" in "\n".join(report.lines(told(lost=["d-1"])))
    assert json.loads(json.dumps(told().to_builtins()))["as_expected"] is True


def test_the_picture_is_xml_with_each_curve_and_wave():
    import xml.etree.ElementTree as ET

    drawn = ET.fromstring(plot.svg(told(release="<m>:2")))
    space = "{http://www.w3.org/2000/svg}"
    assert len(drawn.findall(f"{space}polyline")) == 4
    words = [text.text for text in drawn.findall(f"{space}text")]
    assert {"wave 1", "wave 2", "completed", "<m>:2 to 3 devices: completed after 3 s"} <= set(words)
    assert ET.fromstring(plot.svg(told(moments=[]))) is not None
