"""Telemetry at the server: only what a device signed and never said before counts, and rollouts are judged by it, the same way each time."""

from __future__ import annotations

import json

import msgspec
import pytest

from agent.contract import topics
from agent.contract.codec import convert, encode
from agent.contract.reports import Answer, ModelState, Outcome, Phase, Presence
from agent.contract.scopes import scope_of
from agent.contract.telemetry import Figures
from fleet_server.access import SERVER
from fleet_server.devices import shared_identity
from fleet_server.housekeeping import ROWS
from fleet_server.ingest.intake import Message
from fleet_server.ingest.telemetry import LENGTHS_S
from fleet_server.rollouts.evidence import Evidence, differences
from fleet_server.rollouts.health import Action, HealthRules, HealthTest
from fleet_server.storage.telemetry_models import DeviceTelemetry, FiguresRow, HealthSampleRow, PastRow
from tests.fleet.stand import sha256, signed_event, signed_report
from tests.fleet.tellers import did, signed_telemetry, telemetry
from tests.fleet.test_rollouts import Story

DAY_S = 86400.0
DEVICES = 16


class Clinic(Story):
    """A fleet whose devices tell how their models do."""

    def begin(self, devices: int) -> None:
        self.publish(1, 2, 3)
        self.told: dict[str, int] = {}
        self.join(*(f"d{number:02}" for number in range(devices)), online=False)
        self.there()

    def tell(self, name, *figures, key=None, **other):
        self.told[name] = self.told.get(name, 0) + 1
        said = telemetry(name, self.told[name], other.pop("at", self.clock()), *figures, **other)
        changes = self.devices[name].say("telemetry", signed_telemetry(said, key or self.devices[name].key))
        self.fleet.judge.evaluate(changes.models)
        return changes

    def all_tell(self, *figures, names=None):
        """All of them at once, as a batch of messages."""
        batch = []
        for name in names or self.devices:
            self.told[name] = self.told.get(name, 0) + 1
            said = telemetry(name, self.told[name], self.clock(), *figures)
            batch.append(Message(topics.up(name, "telemetry"), signed_telemetry(said, self.devices[name].key)))
        self.fleet.judge.evaluate(self.fleet.intake.store(batch).models)

    def all_commit(self, version, names=None):
        """The same of their state reports."""
        batch = []
        for name in names or self.devices:
            self.counters[name] += 1
            answers = (Answer(release=version, outcome=Outcome.COMMITTED, at=self.clock()),)
            state = ModelState(
                serving=version, sha256=sha256(f"digits {version}".encode()), variant="cpu", phase=Phase.STEADY, answers=answers
            )
            device = self.devices[name]
            report = device.report(self.counters[name], models={"digits": state})
            batch.append(Message(topics.up(name, "state"), signed_report(report, device.key)))
        self.fleet.judge.evaluate(self.fleet.intake.store(batch).models)

    def there(self):
        born = [(name, encode(Presence(device=name, session=1, online=True))) for name in self.devices]
        self.fleet.intake.store([Message(topics.up(name, "presence"), words) for name, words in born])

    def live_on(self, release, days=2, **doing):
        """Every device runs the release for some days."""
        for _ in range(days):
            self.all_tell((release, did(**doing)))
            self.clock.now += DAY_S
        self.there()

    def at_work(self, rollout):
        return self.fleet.views.rollout(rollout)

    def rows(self, table):
        with self.fleet.database.reading() as session:
            return list(session.query(table))

    @property
    def dropped(self):
        return dict(self.fleet.intake.dropped)


@pytest.fixture
def clinic(fleet, clock):
    made = Clinic(fleet, clock)
    made.begin(DEVICES)
    rollout = made.start(1)
    made.all_commit(1)
    assert made.state(rollout) == "completed"
    return made


@pytest.fixture
def one(fleet, clock):
    made = Clinic(fleet, clock)
    made.begin(1)
    return made


# -- what counts ---------------------------------------------------------------------------------------------------------------


def test_the_last_word_of_a_device_is_shown(one):
    one.tell("d00", (1, did(1000, ms=10)))
    one.tell("d00", (1, did(500, ms=20, run=3)))
    shown = one.fleet.inventory.get("d00").telemetry
    assert shown.told.figures[0].figures == did(500, ms=20, run=3)
    assert shown.medians_ms["digits:1"] == pytest.approx(20, rel=0.1)
    assert shown.told.machine.celsius == 55.0
    assert one.dropped == {}
    assert one.fleet.inventory.get("d00").last_seen == one.clock()


def test_forged_telemetry_counts_nowhere(one, clock):
    one.join("d01")
    one.tell("d00", (1, did()), key=one.devices["d01"].key)
    said = signed_telemetry(telemetry("d01", 1, clock(), (1, did())), one.devices["d01"].key)
    one.devices["d01"].say("telemetry", said, as_device="d00")
    one.devices["d00"].say("telemetry", signed_telemetry(telemetry("d01", 1, clock()), one.devices["d00"].key))
    one.devices["d00"].say("telemetry", b"{}")
    other_kind = msgspec.json.decode(signed_event({"device": "d00"}, one.devices["d00"].key))
    one.devices["d00"].say("telemetry", json.dumps(other_kind).encode())
    assert one.dropped == {"bad_signature": 2, "wrong_device": 1, "bad_envelope": 2}
    assert one.rows(DeviceTelemetry) == []
    assert one.rows(FiguresRow) == []


def test_replayed_telemetry_counts_once(one, clock):
    message = signed_telemetry(telemetry("d00", 5, clock(), (1, did())), one.devices["d00"].key)
    for _ in range(3):
        one.devices["d00"].say("telemetry", message)
    one.devices["d00"].say("telemetry", signed_telemetry(telemetry("d00", 4, clock(), (1, did())), one.devices["d00"].key))
    assert one.dropped == {"replayed": 3}
    assert [row.figures["ok"] for row in one.rows(FiguresRow)] == [1000] * len(LENGTHS_S)


@pytest.mark.parametrize(
    ("at", "cause"),
    [
        (-400 * DAY_S, "stale"),
        (-DAY_S - 1, "stale"),
        (400 * DAY_S, "bad_clock"),
        (3600, "bad_clock"),
        (-3600, None),
        (60, None),
    ],
)
def test_clocks_that_are_off(one, at, cause):
    one.tell("d00", (1, did()), at=one.clock() + at)
    assert one.dropped == ({cause: 1} if cause else {})
    assert bool(one.rows(DeviceTelemetry)) is (cause is None)
    assert all(row.start <= one.clock() for row in one.rows(FiguresRow))


@pytest.mark.parametrize(
    "words",
    [
        pytest.param({"seconds": 1e300}, id="longer than the universe"),
        pytest.param({"counter": 2**70}, id="a counter beyond all"),
        pytest.param({"figures": [{"model": "digits", "release": 1, "figures": {"ok": 10**30}}]}, id="more than there can be"),
        pytest.param({"figures": [{"model": "digits", "release": 1, "figures": {"ok": -5}}]}, id="less than none"),
        pytest.param(
            {
                "figures": [
                    {"model": "digits", "release": 1, "figures": {"rows": 10**5, "classes": {str(n): 1 for n in range(10**5)}}}
                ]
            },
            id="a hundred thousand classes",
        ),
        pytest.param(
            {"figures": [{"model": f"m{n}", "release": 1, "figures": {}} for n in range(1000)]}, id="a thousand models"
        ),
        pytest.param({"machine": {"celsius": 1e9}}, id="a star"),
        pytest.param({"kind": "state"}, id="of another kind"),
    ],
)
def test_absurd_words_are_counted_and_dropped(one, clock, words):
    said = {
        "device": "d00",
        "counter": 1,
        "at": clock(),
        "seconds": 300,
        "figures": [],
        "machine": None,
        "kind": "telemetry",
        "format": 1,
    }
    changes = one.devices["d00"].say(
        "telemetry", signed_telemetry(json.dumps({**said, **words}).encode(), one.devices["d00"].key)
    )
    assert set(one.dropped) <= {"bad_report", "too_large", "replayed"}
    assert sum(one.dropped.values()) == 1
    assert (changes.models, one.rows(DeviceTelemetry), one.rows(PastRow)) == (set(), [], [])


def test_releases_that_nobody_published_leave_no_rows(one):
    one.tell("d00", (77, did()))
    one.tell("d00", (1, did()), model="made-up")
    assert (one.rows(FiguresRow), one.rows(PastRow)) == ([], [])
    assert len(one.rows(DeviceTelemetry)) == 1


def test_what_several_machines_with_one_identity_do_says_nothing_of_one(one):
    for run, counter in (("a", 1), ("b", 2), ("a", 3)):
        one.devices["d00"].state(one.devices["d00"].report(counter, run=run))
    one.tell("d00", (1, did()))
    assert one.dropped == {"identity_shared": 1}
    one.clock.now += shared_identity.SHARED_S
    one.tell("d00", (1, did()))
    assert len(one.rows(DeviceTelemetry)) == 1


# -- what is kept --------------------------------------------------------------------------------------------------------------


def test_figures_are_added_up_by_time_and_go_when_they_are_old(one):
    one.clock.now = 1_800_000_000.0 // DAY_S * DAY_S
    one.there()
    for _ in range(24):
        one.tell("d00", (1, did(100)))
        one.clock.now += 300
    assert [f.requests for f in one.fleet.told.series("d00", length_s=3600)] == [1200, 1200]
    assert [f.requests for f in one.fleet.told.series("d00", length_s=86400, model="digits")] == [2400]
    assert len(one.fleet.told.series("d00", length_s=300)) == 24
    kept = one.fleet.config.telemetry
    one.clock.now += kept.minutes_kept_s + 300
    one.fleet.housekeeping.run()
    assert {row.length_s for row in one.rows(FiguresRow)} == {3600, 86400}
    one.clock.now += kept.hours_kept_s
    one.fleet.housekeeping.run()
    assert {row.length_s for row in one.rows(FiguresRow)} == {86400}
    one.clock.now += kept.days_kept_s
    one.fleet.housekeeping.run()
    assert (one.rows(FiguresRow), one.rows(PastRow)) == ([], [])
    assert one.fleet.housekeeping.removed["figures"] == 28
    assert one.fleet.told.prune(ROWS) == 0


def test_a_device_that_is_deleted_leaves_nothing_and_comes_back_as_another(one):
    for _ in range(5):
        one.tell("d00", (1, did()))
    one.fleet.inventory.delete(SERVER, "d00")
    assert [one.rows(table) for table in (DeviceTelemetry, FiguresRow, PastRow)] == [[], [], []]
    one.join("d00")
    one.told = {}
    one.tell("d00", (1, did()))
    assert one.dropped == {}


def test_a_message_costs_the_same_however_many_devices_there_are(clinic, monkeypatch):
    """Nothing reads all devices, all pasts or all samples."""
    clinic.live_on(1)
    statements = []
    from sqlalchemy import event

    event.listen(clinic.fleet.database.engine, "before_cursor_execute", lambda *a: statements.append(a[2]))
    clinic.tell("d00", (1, did()))
    assert 0 < len(statements) <= 20, statements
    assert not [one for one in statements if "FROM devices" in one and "WHERE" not in one]


# -- what rollouts make of it ---------------------------------------------------------------------------------------------------


def test_a_release_that_makes_devices_slower_takes_everybody_back(clinic):
    clinic.live_on(1, ms=10)
    rollout = clinic.start(2)
    clinic.all_tell((2, did(300, ms=20)))
    found = clinic.at_work(rollout)
    assert found.state == "aborted"
    assert "the median latency is 2.00 times each device's own" in found.reason
    assert found.verdict.health.models["digits"].action is Action.ABORT
    assert {clinic.wanted(name) for name in clinic.devices} == {1}
    assert [e.name for e in clinic.fleet.journal.events(limit=3)].count("rollout_aborted") == 1


def test_errors_that_become_more_frequent_take_everybody_back(clinic):
    clinic.live_on(1, days=2, ok=5000, run=15)
    rollout = clinic.start(2)
    clinic.all_tell((2, did(1000, run=9)))
    assert clinic.at_work(rollout).state == "aborted"
    assert "errors are" in clinic.at_work(rollout).reason


def test_a_release_that_is_as_good_goes_through(clinic):
    clinic.live_on(1, ok=2000, run=6)
    rollout = clinic.start(2)
    clinic.all_tell((2, did(1000, run=3)))
    clinic.all_commit(2)
    found = clinic.at_work(rollout)
    assert found.state == "completed"
    assert found.verdict.health.models["digits"].why == "health of 16 devices: nothing found"


def test_other_classes_pause_it_once(clinic):
    clinic.live_on(1, days=3)
    rollout = clinic.start(2)
    clinic.all_tell((2, did(400, classes={5: 400})))
    found = clinic.at_work(rollout)
    assert (found.state, found.verdict.health.paused) == ("paused", (HealthTest.CLASSES,))
    assert "the mix of classes moved by 1.00 more than usual" in found.reason
    clinic.fleet.rollouts.resume(SERVER, rollout)
    clinic.all_tell((2, did(400, classes={5: 400})))
    clinic.fleet.judge.evaluate()
    assert clinic.at_work(rollout).state == "running", "who let it go on has seen it"
    clinic.all_commit(2)
    assert clinic.at_work(rollout).state == "completed"


def test_a_mix_that_is_never_at_rest_says_nothing(clinic):
    mixes = ({0: 500}, {0: 250, 1: 250}, {1: 500}, {2: 500})
    for day in range(4):
        for number, name in enumerate(clinic.devices):
            clinic.tell(name, (1, did(500, classes=mixes[(number + day) % 4])))
        clinic.clock.now += DAY_S
    clinic.there()
    rollout = clinic.start(2)
    for number, name in enumerate(clinic.devices):
        clinic.tell(name, (2, did(500, classes=mixes[number % 4])))
    assert clinic.at_work(rollout).state == "running"


def test_without_a_past_or_telemetry_nothing_is_known_and_that_is_said(clinic):
    rollout = clinic.start(2)
    clinic.all_tell((2, did(5000, ms=900, run=900)))  # no device was heard of with release 1
    clinic.all_commit(2)
    found = clinic.at_work(rollout)
    assert found.state == "completed"
    assert found.verdict.health.models["digits"].why == "nothing is known of the devices' health"


def test_where_health_is_required_a_wave_waits_for_it(clinic):
    clinic.fleet.judge.health = HealthRules(require=True)
    clinic.live_on(1)
    rollout = clinic.start(2)
    clinic.all_commit(2)
    found = clinic.at_work(rollout)
    assert (found.state, found.verdict.verdict.value) == ("running", "wait")
    assert found.verdict.why == "16 committed; health of 0 devices known, 3 needed"
    clinic.all_tell((2, did(1000)), names=list(clinic.devices)[:3])
    assert clinic.at_work(rollout).state == "completed"


def test_telemetry_of_another_release_moves_nothing(clinic):
    clinic.live_on(1)
    rollout = clinic.start(2)
    clinic.all_tell((1, did(1000, ms=500)))
    clinic.all_tell((3, did(1000, ms=500)))
    assert clinic.rows(HealthSampleRow) == []
    assert clinic.at_work(rollout).state == "running"


def test_what_a_release_did_in_an_earlier_rollout_is_not_taken_for_now(clinic):
    """Devices ran release 2 badly, went back, and come to it again: only the new stay counts."""
    clinic.live_on(1, ms=10)
    clinic.fleet.rollouts.abort(SERVER, first := clinic.start(2))
    clinic.all_tell((2, did(1000, ms=50)))
    clinic.live_on(1, ms=10)
    again = clinic.start(2)
    clinic.all_tell((2, did(400, ms=10)))
    assert clinic.at_work(first).state == "aborted"
    assert clinic.at_work(again).state == "running"
    latencies = [row.now for row in clinic.rows(HealthSampleRow) if row.test == "latency" and row.rollout == again]
    assert latencies == pytest.approx([10.0] * DEVICES, rel=0.1)


def test_a_device_gives_each_sample_once_also_when_it_is_another_one_by_then(clinic):
    clinic.live_on(1)
    rollout = clinic.start(2)
    for _ in range(3):
        clinic.tell("d00", (2, did(1000)))
    clinic.fleet.inventory.delete(SERVER, "d00")
    clinic.join("d00")
    clinic.told["d00"] = 0
    clinic.tell("d00", (1, did(1000)))
    clinic.tell("d00", (2, did(1000, ms=90)))
    by_test = [row.test for row in clinic.rows(HealthSampleRow)]
    assert len(by_test) == len(set(by_test)) == 5
    assert clinic.at_work(rollout).state == "running"


def test_a_server_that_starts_anew_judges_the_same(clinic):
    clinic.live_on(1)
    rollout = clinic.start(2)
    for number, name in enumerate(clinic.devices):
        clinic.tell(name, (2, did(1000, ms=20)))
        if number == 8:
            before = clinic.at_work(rollout).verdict.health
            clinic.fleet.judge.vitals.keep(())
            clinic.fleet.judge.evaluate()
            assert clinic.at_work(rollout).verdict.health == before
    assert clinic.at_work(rollout).state == "aborted"


def test_rollouts_of_one_release_to_parts_of_the_fleet_are_judged_by_their_own_devices(clinic):
    names = list(clinic.devices)
    for name in names:
        clinic.fleet.inventory.set_groups(SERVER, name, ["good" if name in names[:2] else "bad"])
    clinic.live_on(1, ms=10)
    good = clinic.start(2, scope=scope_of(["group:good"]), at_once=True)
    bad = clinic.start(2, scope=scope_of(["group:bad"]), at_once=True)
    clinic.all_tell((2, did(1000, ms=10)), names=names[:2])
    clinic.all_tell((2, did(1000, ms=30)), names=names[2:])
    told = {rollout: {row.device for row in clinic.rows(HealthSampleRow) if row.rollout == rollout} for rollout in (good, bad)}
    assert told == {good: set(names[:2]), bad: set(names[2:])}
    assert (clinic.at_work(good).state, clinic.at_work(bad).state) == ("running", "aborted")


# -- evidence ------------------------------------------------------------------------------------------------------------------


def whole(clinic, rollout, limit):
    """As a client has it: through JSON, page after page."""
    found, after = None, 0
    while after is not None:
        page = msgspec.json.decode(msgspec.json.encode(clinic.fleet.recorder.evidence(rollout, after=after, limit=limit)))
        if found is None:
            found = page
        else:
            found["samples"] += page["samples"]
        after = page["next"]
    return convert(found, Evidence)


def test_a_recorded_rollout_judged_again_gives_the_same_verdicts(clinic):
    clinic.live_on(1, days=3, ok=2000, run=6)
    stories = {}
    for name, doing in (
        ("good", did(1000, run=3)),
        ("moved", did(1000, run=3, classes={7: 1000})),
        ("slow", did(1000, run=3, ms=30)),
    ):
        rollout = clinic.start(2)
        names = list(clinic.devices)
        for part in (names[:9], names[9:]):
            clinic.all_tell((2, doing), names=part)
            clinic.all_commit(2, names=names[:7])
        stories[name] = whole(clinic, rollout, 7)
        clinic.fleet.rollouts.abort(SERVER, rollout) if clinic.at_work(rollout).state != "aborted" else None
        clinic.live_on(1, days=3, ok=2000, run=6)
    assert {name: one.verdicts[-1].health.models["digits"].action.value for name, one in stories.items()} == {
        "good": "promote", "moved": "pause", "slow": "abort",
    }  # fmt: skip
    for one in stories.values():
        assert len(one.samples) == DEVICES * 5 or one.verdicts[-1].verdict.value == "fail"
        assert differences(one) == []


def test_evidence_that_was_altered_comes_out_otherwise(clinic):
    clinic.live_on(1)
    rollout = clinic.start(2)
    clinic.all_tell((2, did(1000, ms=30)))
    one = whole(clinic, rollout, 1000)
    assert differences(one) == []
    better = [
        msgspec.structs.replace(each, sample=msgspec.structs.replace(each.sample, now=each.sample.before))
        if each.sample.test is HealthTest.LATENCY
        else each
        for each in one.samples
    ]
    assert differences(msgspec.structs.replace(one, samples=tuple(better)))
    looser = msgspec.structs.replace(one.health, latency_ratio=5.0)
    assert differences(msgspec.structs.replace(one, health=looser))
    counts = msgspec.structs.replace(one.verdicts[0].counts, refused=3)
    first = msgspec.structs.replace(one.verdicts[0], counts=counts)
    assert differences(msgspec.structs.replace(one, verdicts=(first,)))


def test_figures_with_more_than_a_device_can_have_done_stay_one_device(clinic):
    """A device that lies is one of many."""
    clinic.live_on(1)
    rollout = clinic.start(2)
    clinic.tell("d00", (2, Figures(ok=2**40, run=2**40, latency={216: 2**40})))
    clinic.all_tell((2, did(1000)), names=list(clinic.devices)[1:])
    assert clinic.at_work(rollout).state == "running"
