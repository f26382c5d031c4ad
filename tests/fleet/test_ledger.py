"""A rollout's ledger, kept up by what changed, is what a reading of every device gives: after anything that happens to a fleet."""

import contextlib
import dataclasses
from collections import Counter

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from agent.contract.assignment import EVERYONE, reaches, slot
from agent.contract.names import ReleaseRef
from agent.contract.reports import Answer, Hardware, ModelState, Outcome, Phase, Presence, hardware_class
from fleet_server.access import SERVER
from fleet_server.devices import shared_identity
from fleet_server.errors import Conflict, Invalid
from fleet_server.rollouts import exclusions, facts, gates, rows, views
from fleet_server.rollouts.gates import Counts, Fact, Standing, Witness, standing
from fleet_server.rollouts.judging import WHAT_RUNS_JUDGED_S
from fleet_server.rollouts.tally import NAMED, ORDER, quarantined
from fleet_server.sections import RolloutSettings
from fleet_server.storage.models import Device, DeviceModel, RolloutRow, SkippedDevice, ToldDevice
from tests.fleet.stand import sha256
from tests.fleet.tellers import signed_telemetry, telemetry
from tests.fleet.test_rollouts import Story

NAMES = ("a", "b", "c", "d", "e", "f")
PI, JETSON = Hardware(arch="aarch64", machine="pi"), Hardware(arch="aarch64", machine="jetson", accelerator="cuda")


@dataclasses.dataclass
class Reading:
    """What a reading of every device says of a rollout."""

    counts: Counts
    witnesses: list
    refused: dict
    serving: Counter
    ahead: dict
    asked: Counter


def read_everything(fleet, session, row, now, told):
    """From the rows of every device, as it was done before there were ledgers, and without any of their code. `told`: device → when."""
    limit_s = rows.rules_of(row).time_limit_s
    skipped = set(session.scalars(select(SkippedDevice.device).where(SkippedDevice.rollout == row.id)))
    release = fleet.catalogue.manifest(ReleaseRef(row.model, row.release))
    hashes = {variant.name: release.model_sha256(variant) for variant in release.variants}
    said = {d.device: d for d in session.scalars(select(DeviceModel).where(DeviceModel.model == row.model))}
    excluded = {kind for kind, one in exclusions.known(session, row.model, row.release).items() if one.ended is None}
    wave, found, refused, serving, ahead, asked = rows.as_assigned(row), [], {}, Counter(), Counter(), Counter()
    goal = msgspec.structs.replace(
        wave, groups=tuple(groups_of(row)), group_permille={}, permille=max(w["permille"] for w in reached_by(row))
    )
    waits, there = 0, set(session.scalars(select(Device.id)))
    gone = {name: left(name, facts.DELETED) for name in told if name not in there}
    for device in session.scalars(select(Device).order_by(Device.id)):
        kind = hardware_class(Hardware(**device.hardware)) if device.hardware else None
        if device.revoked:
            gone |= {device.id: left(device.id, facts.SHUT_OUT)} if device.id in told else {}
            continue
        mine = said.get(device.id)
        if mine is not None and mine.serving == row.release and kind is not None:
            serving[kind] += 1
        if kind in excluded:
            continue
        if not reaches(wave, device.id, device.groups):
            if reaches(goal, device.id, device.groups) and device.present and device.last_seen is not None:
                ahead[slot(row.team or row.id, device.id)] += 1
            if device.id in told:
                gone[device.id] = left(device.id, facts.MOVED)
            waits += device.id not in told
            continue
        heard = device.last_seen is not None and now - max(device.last_seen, fleet.inventory.heard_since()) < (
            fleet.config.rollouts.silence_s
        )
        fact = facts.fact_of(device.id, device.present and heard, mine, row.release, hashes, row.id)
        fact = msgspec.structs.replace(
            fact, told=device.id in told, overdue=now >= told.get(device.id, now) + limit_s, skipped=device.id in skipped
        )
        several = device.shared is not None and now - device.shared < shared_identity.SHARED_S
        if several and fact.outcome not in (Outcome.REFUSED, Outcome.ROLLED_BACK):
            fact = Fact(device.id, online=False, serving_it=False, message="several machines report under this identity")
        found.append(fact)
        if kind is not None and standing(fact, shadow=row.mode == "shadow") not in {
            Standing.OFFLINE,
            Standing.HELD,
            Standing.SKIPPED,
        }:
            asked[kind] += 1
        if kind is not None and quarantined(fact):
            refused.setdefault(kind, []).append(fact)
    found = sorted([*found, *gone.values()], key=lambda fact: fact.device)
    stands = [(fact, standing(fact, shadow=row.mode == "shadow")) for fact in found]
    counts = Counts(**{one.value: sum(where is one for _, where in stands) for one in Standing} | {"not_reached": waits})
    witnesses = [
        Witness(fact.device, where, fact.reason, fact.message)
        for one in ORDER
        for fact, where in [pair for pair in stands if pair[1] is one][:NAMED]
    ]
    return Reading(counts, witnesses, refused, serving, ahead, asked)


def left(device, why):
    return Fact(device, online=False, serving_it=False, message=why, told=True, left=True)


def reached_by(row):
    return row.waves[: row.wave + 1]


def groups_of(row):
    return dict.fromkeys(group for wave in reached_by(row) for group in wave["groups"])


class Fleet(Story):
    """A story in which anything may happen, and after each step of which the ledgers are compared."""

    def begin(self):
        self.fleet.inventory.heard_since = lambda: 0.0
        for name in list(self.devices):
            self.fleet.inventory.delete(SERVER, name)
        self.devices, self.counters, self.runs = {}, {}, {}
        self.hardware = dict.fromkeys(NAMES, PI) | {"d": JETSON, "e": JETSON, "f": None}
        self.restart()
        for name in NAMES[:4]:
            self.join(name)
        for row in self.active():
            self.fleet.rollouts.abort(SERVER, row.id)

    def join(self, *names, **options):
        super().join(*names, **options)
        self.runs |= dict.fromkeys(names, 1)

    def active(self):
        with self.fleet.database.reading() as session:
            return list(session.scalars(select(RolloutRow).where(RolloutRow.state.in_(rows.ACTIVE))))

    def restart(self):
        self.fleet.judge.ledgers.keep(())

    def compare(self):
        """Every ledger there is, brought up to date as for a decision, beside a reading of everything."""
        judge, ledgers, now = self.fleet.judge, self.fleet.judge.ledgers, self.clock()
        with self.fleet.database.reading() as session:
            for row in session.scalars(select(RolloutRow).where(RolloutRow.state.in_(rows.BEGUN))):
                tally = ledgers.tally(session, row)
                reading = read_everything(self.fleet, session, row, now, self.told(session, row))
                ahead = Counter({slot: number for slot, number in enumerate(tally.ahead) if number})
                asked = Counter(tally.asked)
                assert Reading(tally.counts, tally.witnesses, tally.refused(1), Counter(tally.serving), ahead, asked) == reading
                assert judge.verdict(session, row, tally).ruling is _ruling(reading, rows.rules_of(row), session, row)
            for row in session.scalars(select(RolloutRow).where(RolloutRow.state == "completed")):
                if (known := ledgers.of(row.id)) is not None and known.about.over:
                    tally, reading = ledgers.tally(session, row, over=True), read_everything(self.fleet, session, row, now, {})
                    said = {kind: {fact.device for fact in found} for kind, found in tally.refused(1).items()}
                    assert said == {kind: {fact.device for fact in found} for kind, found in reading.refused.items()}
                    assert Counter(tally.serving) == reading.serving

    def told(self, session, row):
        """What is written down, and what whoever decides next is going to write down."""
        written = session.execute(select(ToldDevice.device, ToldDevice.at).where(ToldDevice.rollout == row.id))
        return self.fleet.judge.ledgers.of(row.id).told | dict(row for row in written)

    # What may happen. Each takes two numbers to choose by.

    def does_report(self, one, two):
        name = NAMES[one % len(NAMES)]
        if name not in self.devices:
            return
        self.counters[name] += 1
        version = 1 + two % 3
        outcome = [None, *Outcome][(two // 3) % 6]
        reason = [None, "golden_mismatch", "operator", "download_failed"][(two // 18) % 4]
        answers = (
            () if outcome is None else (Answer(release=1 + (one + two) % 3, outcome=outcome, at=self.clock(), reason=reason),)
        )
        sha = sha256(f"digits {version}".encode()) if two % 7 else "0" * 64
        state = ModelState(
            serving=version, sha256=sha, variant="cpu", phase=list(Phase)[two % 10], answers=answers, held=two % 13 == 0
        )  # fmt: skip
        report = self.devices[name].report(
            self.counters[name], models={} if two % 11 == 0 else {"digits": state}, hardware=self.hardware[name],
            run=f"run-{self.runs[name]}",
        )  # fmt: skip
        self.fleet.judge.evaluate(self.devices[name].state(report).models)

    def does_commit(self, one, _two):
        for name in [name for name in NAMES if name in self.devices][: 1 + one % len(NAMES)]:
            for row in self.active():
                self.say(name, row.release, Outcome.COMMITTED)

    def does_say_presence(self, one, two):
        name = NAMES[one % len(NAMES)]
        if name in self.devices:
            self.devices[name].say("presence", Presence(device=name, session=1, online=bool(two % 3)))

    def does_share_an_identity(self, one, _two):
        name = NAMES[one % len(NAMES)]
        if name in self.devices:
            for run in (1, 2, 1):
                self.runs[name] = run
                self.does_report(one, 1)

    def does_wait(self, one, two):
        silence, hour = self.fleet.config.rollouts.silence_s, shared_identity.SHARED_S
        self.clock.now += [1.0, 20.0, silence, hour, hour - 10][one % 5] + two % 5
        if two % 2:
            self.fleet.judge.evaluate()

    def does_go_back_in_time(self, one, _two):
        self.clock.now -= one % 400

    def does_lose_the_broker(self, one, _two):
        since = 0.0 if one % 3 == 2 else self.clock()
        self.fleet.inventory.heard_since = self.clock if one % 3 == 1 else lambda: since

    def does_enrol(self, one, _two):
        name = NAMES[one % len(NAMES)]
        if name not in self.devices:
            self.join(name, groups=["canary"] if one % 2 else [])

    def does_regroup(self, one, two):
        name = NAMES[one % len(NAMES)]
        if name in self.devices:
            self.fleet.inventory.set_groups(SERVER, name, ["canary"] if two % 2 else [])

    def does_shut_out(self, one, two):
        name = NAMES[one % len(NAMES)]
        if name in self.devices:
            if two % 2:
                self.fleet.inventory.revoke(SERVER, name)
            self.fleet.inventory.delete(SERVER, name)
            del self.devices[name]
            if two % 3:
                self.join(name)

    def does_revoke(self, one, _two):
        name = NAMES[one % len(NAMES)]
        if name in self.devices:
            self.fleet.inventory.revoke(SERVER, name)

    def does_change_hardware(self, one, two):
        self.hardware[NAMES[one % len(NAMES)]] = [PI, JETSON][two % 2]

    def does_start(self, one, two):
        waves = [{}, {"groups": ["canary"]}, {"permille": 400}, {"groups": ["canary"], "confirm": True}][one % 4]
        mode = "shadow" if two % 4 == 0 else "install"
        with _refusals_ignored():
            limit_s = [None, 30.0, 4000.0][(one // 3) % 3]
            failures, at_once = [None, 0, 2][one % 3], two % 5 == 0
            self.start(1 + two % 3, max_failures=failures, mode=mode, time_limit_s=limit_s, at_once=at_once, **waves)

    def does_ask(self, one, two):
        for row in self.active():
            with _refusals_ignored():
                verb = ["promote", "pause", "resume", "abort"][one % (3 + (two % 5 == 0))]
                getattr(self.fleet.rollouts, verb)(SERVER, row.id)

    def does_skip(self, one, two):
        name = NAMES[one % len(NAMES)]
        for row in self.active() if name in self.devices else ():
            with _refusals_ignored():
                (self.fleet.rollouts.unskip if two % 3 == 0 else self.fleet.rollouts.skip)(SERVER, row.id, name)

    def does_end_an_exclusion(self, _one, _two):
        for one in self.fleet.views.exclusions():
            with _refusals_ignored():
                self.fleet.rollouts.end_exclusion(SERVER, one.id)

    def does_start_anew(self, one, _two):
        if one % 2:
            self.restart()
        self.clock.now += WHAT_RUNS_JUDGED_S
        self.fleet.judge.evaluate()


def _ruling(reading, rules, session, row):
    if not reading.counts.total and any(
        one.ended is None for one in exclusions.known(session, row.model, row.release).values()
    ):
        return gates.Ruling.FAIL
    return gates.judge(reading.counts, [], rules, whole=rows.reach_of(row) >= EVERYONE).ruling


def _refusals_ignored():
    return contextlib.suppress(Conflict, Invalid)


STEPS = sorted(name for name in vars(Fleet) if name.startswith("does_"))
OFTEN = ["does_report"] * 6 + ["does_commit"] * 2 + ["does_start"] * 3 + ["does_wait"] * 2 + ["does_regroup", "does_shut_out"]
steps = st.lists(st.tuples(st.sampled_from(STEPS + OFTEN), st.integers(0, 500), st.integers(0, 500)), min_size=5, max_size=25)


two_exclude_a_class = pytest.mark.parametrize(
    "settings", [RolloutSettings(exclude_after=2, exclude_share=0.0)], ids=["two exclude a class"]
)


@pytest.fixture
def anything(fleet, clock):
    made = Fleet(fleet, clock)
    made.publish(1, 2, 3)
    return made


def tried(anything, done):
    anything.begin()
    anything.does_start(2, 1)
    anything.compare()
    for name, one, two in done:
        getattr(anything, name)(one, two)
        anything.compare()


A_MOMENT, SILENCE, AN_HOUR, NEARLY_AN_HOUR = 1, 2, 3, 4  # the first number of `does_wait`
EVERYBODY, CANARY = 0, 1  # of `does_start`


@two_exclude_a_class
@pytest.mark.parametrize(
    "done",
    [
        [("does_shut_out", 0, 0)],
        [("does_shut_out", 0, 2), ("does_report", 0, 4)],
        [("does_revoke", 0, 0)],
        [("does_enrol", 4, 0), ("does_say_presence", 4, 1)],
        [("does_say_presence", 0, 0), ("does_say_presence", 0, 1)],
        [("does_wait", SILENCE, 0), ("does_say_presence", 0, 1)],
        [("does_wait", SILENCE, 0), ("does_lose_the_broker", 1, 0), ("does_lose_the_broker", 0, 0), ("does_wait", SILENCE, 0)],
        [("does_lose_the_broker", 1, 0), ("does_wait", SILENCE, 0), ("does_lose_the_broker", 0, 0), ("does_wait", SILENCE, 0)],
        [("does_share_an_identity", 0, 0), ("does_wait", AN_HOUR, 0)],
        [("does_share_an_identity", 0, 0), ("does_wait", NEARLY_AN_HOUR, 0), ("does_say_presence", 0, 1), ("does_wait", A_MOMENT, 0)],
        [("does_lose_the_broker", 1, 0), ("does_wait", SILENCE, 0), ("does_lose_the_broker", 2, 0)],
        [("does_wait", SILENCE, 0), ("does_go_back_in_time", 150, 0)],
        [("does_report", 0, 34), ("does_report", 1, 34), ("does_end_an_exclusion", 0, 0)],
        [("does_change_hardware", 0, 1), ("does_report", 0, 4), ("does_report", 0, 34)],
        [("does_ask", 3, 0), ("does_regroup", 3, 1), ("does_start", CANARY, 1), ("does_regroup", 0, 1), ("does_regroup", 1, 1), ("does_regroup", 0, 0)],
        [("does_ask", 3, 0), ("does_regroup", 3, 1), ("does_start", CANARY, 1), ("does_regroup", 0, 1), ("does_commit", 0, 0), ("does_commit", 5, 0)],
        [("does_wait", SILENCE, 1), ("does_start_anew", 1, 0)],
        [("does_skip", 0, 1), ("does_report", 0, 34), ("does_skip", 0, 0)],
        [("does_shut_out", 0, 2), ("does_wait", SILENCE, 1)],
        [("does_report", 0, 26)],
        [("does_commit", 5, 0), ("does_start_anew", 0, 0), ("does_report", 0, 34), ("does_start_anew", 0, 0), ("does_start_anew", 1, 0)],
    ],
)  # fmt: skip
def test_each_thing_that_may_happen(anything, done):
    anything.begin()
    anything.start(2, max_failures=5)
    anything.compare()
    for name, one, two in done:
        getattr(anything, name)(one, two)
        anything.compare()


EXAMPLES = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@two_exclude_a_class
@settings(max_examples=8, **EXAMPLES)
@given(done=steps)
def test_a_ledger_is_a_reading_of_everything(anything, done):
    tried(anything, done)


@pytest.mark.long  # many stories
@pytest.mark.timeout(300)
@two_exclude_a_class
@settings(max_examples=60, **EXAMPLES)
@given(done=steps)
def test_a_ledger_is_a_reading_of_everything_for_long(anything, done):
    tried(anything, done)


@pytest.fixture
def many(fleet, clock):
    """A rollout to a fleet of 300, with rows as enrolment makes them."""
    made = Story(fleet, clock)
    made.publish(1, 2)
    made.join("one", "two")
    with fleet.database.session() as session:
        session.add_all(
            Device(id=f"d{n:03}", created=clock(), groups=[], revoked=False, present=True, last_seen=clock())
            for n in range(300)
        )
    made.rollout = made.start(1, at_once=True)
    return made


def ledger(story):
    return story.fleet.judge.ledgers.of(story.rollout)


def test_a_report_costs_as_much_as_it_changed(many):
    begun = ledger(many).read
    assert begun == 604, "each device once when the wave begins, and once when it is told"
    many.say("one", 1, phase=Phase.FETCHING)
    assert ledger(many).read == begun + 1
    many.say("one", 1, phase=Phase.WATCHING)
    many.commits("one", version=1)
    assert ledger(many).read == begun + 3
    many.fleet.judge.evaluate()
    assert ledger(many).read == begun + 3, "a tick without news reads no device"
    assert many.fleet.views.rollout(many.rollout).verdict.counts == Counts(committed=1, told=301)


def test_who_is_deleted_or_shut_out_after_it_was_told_left(many):
    """It counts no more, is shown as such, also by a process that begins anew; and an id that is enrolled again begins anew."""
    read = ledger(many).read
    inventory, shown = many.fleet.inventory, many.fleet.views
    inventory.revoke(SERVER, "one")
    inventory.delete(SERVER, "d000")
    many.fleet.judge.evaluate()
    assert ledger(many).read == read + 1, "what is gone costs as much as it is"
    found = shown.rollout(many.rollout).verdict
    assert found.counts == Counts(told=300, left=2)
    said = [Witness("d000", Standing.LEFT, None, "it was deleted"), Witness("one", Standing.LEFT, None, "it is shut out")]
    assert [one for one in found.evidence if one.standing is Standing.LEFT] == said
    assert shown.devices(many.rollout, standing=Standing.LEFT).devices == said
    many.fleet.judge.ledgers.keep(())  # as after a restart
    many.fleet.judge.evaluate()
    assert shown.rollout(many.rollout).verdict.counts == Counts(told=300, left=2)
    inventory.delete(SERVER, "one")
    many.join("d000", online=False)
    many.fleet.judge.evaluate()
    assert shown.rollout(many.rollout).verdict.counts == Counts(told=300, offline=1, left=1)
    inventory.delete(SERVER, "d000")
    many.fleet.judge.evaluate()
    assert shown.rollout(many.rollout).verdict.counts == Counts(told=300, left=1), "a device that was never told did not leave"


def test_deleted_devices_stand_in_their_place_among_the_pages(many, monkeypatch):
    for name in ("d001", "d002", "d150", "two"):
        many.fleet.inventory.delete(SERVER, name)
    monkeypatch.setattr(views, "ROWS_READ", 7)
    read, after, pages = [], "", 0
    while after is not None:
        page = many.fleet.views.devices(many.rollout, limit=5, after=after)
        read, after, pages = [*read, *page.devices], page.next, pages + 1
    assert pages > 1
    assert [one.device for one in read] == sorted({*(f"d{n:03}" for n in range(300)), "one", "two"})
    assert Counter(one.standing for one in read) == {Standing.TOLD: 298, Standing.LEFT: 4}


def test_a_report_that_changes_nothing_is_no_change(many):
    many.say("one", 1, phase=Phase.FETCHING)
    device, read = many.devices["one"], ledger(many).read
    state = ModelState(serving=1, sha256=sha256(b"digits 1"), variant="cpu", phase=Phase.FETCHING, requests=77)
    many.clock.now += 60
    assert device.state(device.report(50, models={"digits": state})).models == set()
    many.fleet.judge.evaluate()
    assert ledger(many).read == read
    assert device.view.last_seen == many.clock(), "it was heard all the same"


def test_who_falls_silent_is_read_when_it_does_and_not_before(many, clock):
    many.say("one", 1, phase=Phase.FETCHING)
    silence = many.fleet.config.rollouts.silence_s
    clock.now += silence - 10
    many.say("one", 1, phase=Phase.WATCHING)
    read = ledger(many).read
    clock.now += 7
    many.fleet.judge.evaluate()
    assert ledger(many).read == read
    clock.now += 1
    many.fleet.judge.evaluate()
    assert many.fleet.views.rollout(many.rollout).verdict.counts == Counts(lost=301, watching=1)
    assert ledger(many).read == read + 301


def test_a_device_whose_words_come_late_is_there_again(many, clock):
    silence = many.fleet.config.rollouts.silence_s
    clock.now += 2 * silence
    many.fleet.judge.evaluate()
    assert many.fleet.views.rollout(many.rollout).verdict.counts.lost == 302
    told = telemetry("one", 1, clock())
    many.devices["one"].say("telemetry", signed_telemetry(told, many.devices["one"].key))
    many.fleet.judge.evaluate()
    assert many.fleet.views.rollout(many.rollout).verdict.counts == Counts(lost=301, told=1)


def test_a_reading_that_breaks_off_loses_nothing(many, clock, monkeypatch):
    """The database fails between finding out who fell silent and reading them."""
    clock.now += 2 * many.fleet.config.rollouts.silence_s
    with monkeypatch.context() as broken:
        broken.setattr(facts, "of_some", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            many.fleet.judge.evaluate()
    many.fleet.judge.evaluate()
    assert many.fleet.views.rollout(many.rollout).verdict.counts == Counts(lost=302)


def test_verdicts_are_as_many_as_changes_of_mind(many):
    for n in range(5):
        many.say("one", 1, phase=[Phase.FETCHING, Phase.WATCHING][n % 2], outcome=[Outcome.FAILED, None][n % 2])
    found = many.fleet.views.rollout(many.rollout)
    assert [one.verdict for one in found.verdicts] == ["wait"]
    assert found.verdicts[0].counts == found.verdict.counts == Counts(failed=1, told=301)
