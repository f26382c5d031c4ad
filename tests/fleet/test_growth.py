"""Waves that tell their devices in steps, at their pace and at their time: what devices are told, what is signed, and what a crash leaves."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract import topics
from agent.contract.assignment import EVERYONE, Rollout, reaches, slot
from agent.contract.names import ReleaseRef
from agent.contract.reports import Outcome, Phase
from fleet_server.access import SERVER, Actor, Role
from fleet_server.errors import Conflict, Invalid
from fleet_server.ingest.intake import Message
from fleet_server.rollouts import growth, machine, planning
from fleet_server.rollouts.gates import Counts, Rules
from fleet_server.sections import RolloutSettings
from fleet_server.storage.models import Device, RolloutRow
from tests.fleet.tellers import signed_telemetry, telemetry
from tests.fleet.test_rollouts import Story

NAMES = [f"d{n:02}" for n in range(24)]
DAY = 86400.0


@pytest.fixture
def many(fleet, clock):
    """Two dozen devices, all of which are there."""
    made = Story(fleet, clock)
    made.publish(1, 2, 3)
    made.join(*NAMES)
    return made


def told(story, version=1):
    return {name for name in story.devices if story.wanted(name) == version}


def row(story, rollout):
    with story.fleet.database.reading() as session:
        return session.get(RolloutRow, rollout)


# -- steps ------------------------------------------------------------------------------------------------------------------


def test_a_wave_tells_a_few_first_and_more_as_they_answer(many):
    rollout, sizes, pokes = many.start(1), [], len(many.pokes)
    while many.state(rollout) == "running":
        now = told(many)
        assert len(now) <= max(3, 2 * sum(sizes[-1:]) + 3)
        sizes.append(len(now))
        many.commits(*now, version=1)
    assert many.state(rollout) == "completed"
    assert sizes[0] <= 4, "three, and who shares a slot with them"
    assert sizes[-1] == len(NAMES)
    assert len(many.pokes) - pokes <= 16, "as many signatures as steps, not as devices"
    assert len(many.fleet.views.rollout(rollout).verdicts) <= 3, "a step is no change of mind"
    assert [one.name for one in many.fleet.journal.events(limit=100)].count("rollout_wave") == 0, "and no wave"


def test_at_once_tells_all_of_the_wave(many):
    many.start(1, at_once=True)
    assert len(told(many)) == len(NAMES)


def test_a_step_is_signed_once_and_no_report_without_a_step_is(many):
    many.start(1)
    first, version = sorted(told(many)), many.assignment.version
    many.say(first[0], None, phase=Phase.FETCHING, sha="0" * 64)
    assert many.assignment.version == version
    many.commits(*first, version=1)
    assert many.assignment.version > version
    assert many.pokes[-1] == many.assignment.version


def test_devices_that_serve_it_already_cost_one_signature(many):
    for name in NAMES:
        many.say(name, 1)
    pokes = len(many.pokes)
    rollout = many.start(1)
    assert many.state(rollout) == "completed"
    assert len(many.pokes) == pokes + 1


def test_a_release_that_fails_meets_few_devices(many):
    rollout = many.start(1)
    for name in sorted(told(many)):
        many.say(name, None, Outcome.REFUSED, answered=1, sha="0" * 64)
    assert many.state(rollout) == "aborted"
    assert told(many) == set()
    found = many.fleet.views.rollout(rollout)
    assert found.verdict.counts.total <= 4
    assert "refused it" in found.reason


def test_a_first_failure_makes_it_careful_and_does_not_stop_it(many):
    rollout = many.start(1)
    first = sorted(told(many))
    many.say(first[0], None, Outcome.REFUSED, answered=1, sha="0" * 64)
    many.commits(*first[1:], version=1)
    assert many.state(rollout) == "running"
    assert len(told(many)) <= len(first) + 3, "two more, and who shares a slot with them"
    for _ in range(60):
        if many.state(rollout) != "running":
            break
        many.commits(*(told(many) - {first[0]}), version=1)
    found = many.fleet.views.rollout(rollout)
    assert (found.state, found.verdict.counts) == ("completed", Counts(committed=23, refused=1))


def test_a_wave_of_a_group_tells_a_share_of_it(fleet, clock):
    story = Story(fleet, clock)
    story.publish(1)
    story.join(*NAMES, groups=["shop"])
    story.join("other-1", "other-2")
    rollout = story.start(1, groups=["shop"], confirm=True)
    said = story.assignment.models["digits"].rollout
    assert said.groups == ("shop",)
    assert 0 < said.group_permille["shop"] < EVERYONE
    assert 1 <= len(told(story)) <= 4
    while story.state(rollout) == "running":
        assert not told(story) & {"other-1", "other-2"}
        story.commits(*told(story), version=1)
    assert (story.state(rollout), len(told(story))) == ("waiting", len(NAMES))
    assert story.assignment.models["digits"].rollout.group_permille == {}
    story.fleet.rollouts.promote(SERVER, rollout)
    assert len(told(story)) == len(NAMES) + 2, "the wave before stays reached"


def test_a_device_that_is_away_is_no_step_and_is_told_when_it_comes(fleet, clock):
    story = Story(fleet, clock)
    story.publish(1)
    story.join(*NAMES[:12])
    story.join(*NAMES[12:], online=False)
    story.start(1)
    assert len(told(story) & set(NAMES[:12])) in {3, 4}


def test_a_crash_between_a_step_and_its_signature_is_made_good(many, monkeypatch):
    rollout = many.start(1)
    first, version = sorted(told(many)), many.assignment.version
    with monkeypatch.context() as broken:
        broken.setattr(many.fleet.repository, "assign", lambda _: (_ for _ in ()).throw(OSError("the disk is full")))
        with pytest.raises(OSError, match="disk is full"):
            many.commits(*first, version=1)
    assert many.assignment.version == version
    reach = row(many, rollout).reach
    many.fleet.judge.ledgers.forget_all()  # as after a restart
    many.fleet.judge.evaluate()
    assert many.assignment.version > version
    assert many.assignment.models["digits"].rollout.permille >= reach
    assert len(told(many)) > len(first)


def test_a_rollout_from_before_there_were_steps_reaches_all_of_its_wave(many):
    rollout = many.start(1, permille=500)
    with many.fleet.database.session() as session:
        old = session.get(RolloutRow, rollout)
        old.reach, old.rules, old.max_failures = None, None, 0
    many.fleet.judge.ledgers.forget_all()
    many.say(next(iter(told(many))), None, Outcome.REFUSED, answered=1, sha="0" * 64)
    assert many.state(rollout) == "aborted", "its rules are those of when it began: no failure"


def test_a_paused_rollout_tells_nobody_more(many):
    rollout = many.start(1)
    first = told(many)
    many.fleet.rollouts.pause(SERVER, rollout)
    many.commits(*first, version=1)
    assert told(many) == first
    many.fleet.rollouts.resume(SERVER, rollout)
    assert told(many) > first


# -- pace -------------------------------------------------------------------------------------------------------------------


def test_a_rate_tells_so_many_in_a_minute(many, clock):
    rollout = many.start(1, rate=6.0, at_once=True)
    begun, seen = clock.now, [len(told(many))]
    assert seen[0] <= 7
    for _ in range(40):
        if len(told(many)) == len(NAMES):
            break
        clock.now += 30
        hear(many)
        many.fleet.judge.evaluate()
        seen.append(len(told(many)))
    assert seen[-1] == len(NAMES)
    assert clock.now - begun >= 60 * (len(NAMES) - 7) / 6
    assert len(set(seen)) >= 4
    assert many.fleet.views.rollout(rollout).rate == 6.0


def test_a_wave_bakes_before_the_next_one_begins(many, clock):
    rollout = many.start(1, waves=["3"], bake_s=1800.0)
    first = told(many)
    many.commits(*first, version=1)
    found = many.fleet.views.rollout(rollout)
    assert (found.wave, found.verdict.verdict) == (0, "pass")
    assert "bakes until" in found.waits_for
    clock.now += 1700
    many.fleet.judge.evaluate()
    assert many.fleet.views.rollout(rollout).wave == 0
    clock.now += 120
    many.fleet.judge.ledgers.forget_all()  # a restart in the middle
    many.commits(*first, version=1)
    assert many.fleet.views.rollout(rollout).wave == 1
    assert told(many) > first


def test_a_device_that_rolls_back_while_its_wave_bakes_stops_it(many, clock):
    rollout = many.start(1, waves=["1"], bake_s=1800.0)
    first = told(many)
    many.commits(*first, version=1)
    clock.now += 600
    for name in first:
        many.say(name, None, Outcome.ROLLED_BACK, answered=1, sha="0" * 64)
    assert many.state(rollout) == "aborted"


def test_a_rollout_begins_at_its_time(many, clock):
    version = many.assignment.version
    rollout = many.start(1, starts=clock.now + 3600)
    assert many.state(rollout) == "scheduled"
    assert "begins at" in many.fleet.views.rollout(rollout).waits_for
    assert (told(many), many.assignment.version) == (set(), version)
    with pytest.raises(Conflict, match="scheduled"):
        many.start(2)
    clock.now += 3599
    many.fleet.judge.evaluate()
    assert many.state(rollout) == "scheduled"
    clock.now += 1
    many.join("new")
    many.fleet.judge.evaluate()
    assert many.state(rollout) == "running"
    assert told(many)


def test_what_is_scheduled_can_be_aborted_and_tells_nobody(many, clock):
    rollout = many.start(1, starts=clock.now + 3600)
    many.fleet.rollouts.abort(SERVER, rollout)
    clock.now += 7200
    many.fleet.judge.evaluate()
    assert (many.state(rollout), told(many)) == ("aborted", set())


def test_a_scheduled_rollout_whose_group_is_gone_ends_with_its_reason(many, clock):
    many.join("shop-1", groups=["shop"])
    rollout = many.start(1, groups=["shop"], starts=clock.now + 3600)
    many.fleet.inventory.set_groups(SERVER, "shop-1", [])
    clock.now += 3600
    many.fleet.judge.evaluate()
    found = many.fleet.views.rollout(rollout)
    assert found.state == "aborted"
    assert "no device is in the group 'shop'" in found.reason


frozen = pytest.mark.parametrize("settings", [RolloutSettings(freeze=("mon-fri 08:00-18:00",))], ids=["frozen by day"])
MONDAY_NOON, MONDAY_NIGHT = 4 * DAY + DAY / 2, 4 * DAY + DAY * 0.8  # 1970-01-05


def weeks_on(clock, moment):
    """The next time that it is this moment of the week."""
    return moment + 7 * DAY * -(-(clock.now - moment) // (7 * DAY))


@frozen
def test_in_a_freeze_no_rollout_begins_and_no_wave_grows(many, clock):
    clock.now = weeks_on(clock, MONDAY_NOON)
    hear(many)
    rollout = many.start(1)
    found = many.fleet.views.rollout(rollout)
    assert (found.state, told(many)) == ("scheduled", set())
    assert "frozen until" in found.waits_for
    assert "18:00 UTC" in found.waits_for
    clock.now = weeks_on(clock, MONDAY_NIGHT)
    hear(many)
    many.fleet.judge.evaluate()
    first = told(many)
    assert first
    clock.now += 0.7 * DAY
    hear(many)
    many.commits(*first, version=1)
    assert told(many) == first, "who was told goes on, nobody else is told"
    assert "frozen until" in many.fleet.views.rollout(rollout).waits_for
    many.fleet.rollouts.abort(SERVER, rollout)
    assert told(many) == set(), "an abort works at any time"


@frozen
def test_in_a_freeze_no_wave_begins_but_a_bad_release_is_stopped(many, clock):
    clock.now = weeks_on(clock, MONDAY_NIGHT)
    hear(many)
    rollout = many.start(1, waves=["1"])
    first = told(many)
    clock.now += 0.7 * DAY
    many.commits(*first, version=1)
    assert (many.fleet.views.rollout(rollout).wave, told(many)) == (0, first)
    for name in first:
        many.say(name, None, Outcome.ROLLED_BACK, answered=1, sha="0" * 64)
    assert many.state(rollout) == "aborted"


def hear(story):
    """Every device is there now."""
    now = story.clock()
    told = [(name, signed_telemetry(telemetry(name, int(now * 1000), now), one.key)) for name, one in story.devices.items()]
    story.fleet.intake.store([Message(topics.up(name, "telemetry"), words) for name, words in told])


approved = pytest.mark.parametrize("settings", [RolloutSettings(approval=True)], ids=["approval"])


@approved
def test_another_person_approves_before_anybody_is_told(many, clock):
    ada, bob = Actor("ada", Role.OPERATOR), Actor("bob", Role.OPERATOR)
    rollout = many.fleet.rollouts.start(ada, ReleaseRef("digits", 1)).id
    found = many.fleet.views.rollout(rollout)
    assert (found.state, told(many)) == ("proposed", set())
    assert "another person than ada" in found.waits_for
    with pytest.raises(Conflict, match="another person must approve it"):
        many.fleet.rollouts.approve(ada, rollout)
    many.fleet.judge.evaluate()
    assert told(many) == set()
    found = many.fleet.rollouts.approve(bob, rollout)
    assert (found.state, found.approved_by) == ("running", "bob")
    assert told(many)
    audited = many.fleet.journal.audited(limit=10)
    assert [(one.action, one.who) for one in audited if one.action.startswith("rollout.")] == [
        ("rollout.approve", "bob"), ("rollout.start", "ada"),
    ]  # fmt: skip
    with pytest.raises(Conflict, match="cannot be approved"):
        many.fleet.rollouts.approve(bob, rollout)


@approved
def test_what_was_approved_waits_for_its_time(many, clock):
    ada, bob = Actor("ada", Role.OPERATOR), Actor("bob", Role.OPERATOR)
    rollout = many.fleet.rollouts.start(ada, ReleaseRef("digits", 1), starts=clock.now + 600).id
    assert many.fleet.rollouts.approve(bob, rollout).state == "scheduled"
    clock.now += 600
    many.fleet.judge.evaluate()
    assert many.state(rollout) == "running"


@pytest.mark.parametrize(
    "wish", [{"bake_s": -1.0}, {"rate": 0.0}, {"failure_share": 0.5}, {"failure_share": 0.0}, {"max_failures": -1}]
)
def test_wishes_that_make_no_sense(fleet, clock, wish):
    with pytest.raises(Invalid, match="must"):
        Story(fleet, clock).start(1, **wish)


# -- how many may be told, by itself ------------------------------------------------------------------------------------------

some_counts = st.builds(Counts, **dict.fromkeys(Counts.__struct_fields__, st.integers(0, 60)))


@given(some_counts)
def test_never_fewer_than_were_told_and_never_many_beyond_what_was_heard(counts):
    most = growth.may_be_told(counts, Rules())
    heard = counts.heard
    assert most is None or most >= counts.asked
    if most is not None and most > counts.asked:
        assert most <= max(heard + growth.UNHEARD, growth.GROWTH * heard)
    if most is None:
        assert heard >= 20, "nobody is told at once before many have answered"


def test_nobody_more_is_told_while_too_many_are_missing():
    assert growth.may_be_told(Counts(committed=10, lost=10, told=1), Rules()) == 21
    assert growth.may_be_told(Counts(committed=10, lost=2, fetching=1), Rules()) > 13
    assert growth.may_be_told(Counts(committed=100, lost=1), Rules()) is None


@given(some_counts)
def test_who_is_held_skipped_or_away_changes_nothing(counts):
    without = msgspec.structs.replace(counts, held=0, skipped=0, offline=0, not_reached=0, left=0)
    assert growth.may_be_told(counts, Rules()) == growth.may_be_told(without, Rules())


@given(
    st.integers(0, EVERYONE), st.dictionaries(st.integers(0, EVERYONE - 1), st.integers(1, 3), max_size=40), st.integers(1, 50)
)
def test_a_step_tells_as_many_as_it_may_and_one_slot_at_least(reach, slots, more):
    ahead = [slots.get(slot, 0) if slot >= reach else 0 for slot in range(EVERYONE)]
    found = growth.next_reach(reach, ahead, more)
    new = sum(ahead[reach:found])
    assert found >= reach
    assert new <= max(more, *ahead)
    if any(ahead[found:]):
        assert new >= 1
        assert new == more or new + next(number for number in ahead[found:] if number) > more
    else:
        assert found == EVERYONE
    assert growth.next_reach(reach, ahead, 0) == reach
    assert growth.next_reach(reach, ahead, None) == EVERYONE


@given(st.integers(0, EVERYONE), st.integers(0, EVERYONE), st.integers(0, EVERYONE), st.sampled_from(["d1", "d2", "d3"]))
def test_devices_that_were_reached_stay_reached_as_a_wave_grows(one, two, permille, device):
    less, more = sorted((one, two))
    of = [
        Rollout(id="r1", release=1, previous=None, groups=("a",), permille=min(permille, reach), group_permille={"a": reach})
        for reach in (less, more)
    ]
    for groups in ((), ("a",)):
        assert reaches(of[0], device, groups) <= reaches(of[1], device, groups)
        assert reaches(of[0], device, groups) == (slot("r1", device) < (less if groups else min(permille, less)))


# -- who comes first ----------------------------------------------------------------------------------------------------------


def drawn(number, **fields):
    base = {
        "groups": frozenset(),
        "hardware": ["pi", "jetson", "pc"][number % 3],
        "site": f"site-{number % 4}",
        "there": number % 2 == 0,
    }
    return planning.Drawn(f"d{number}", **(base | fields))


def test_the_first_wave_is_spread_over_hardware_and_sites_and_is_there(fleet):
    devices = [drawn(number) for number in range(24)]
    with fleet.database.session() as session:
        session.add_all(
            Device(id=one.id, created=0.0, hardware_class=one.hardware, labels={"site": one.site}, present=one.there)
            for one in devices
        )
    waves = machine.read_waves(["6"])
    alone = sorted(planning.spread(f"r1-{number:04x}", devices, waves) for number in range(300))
    with fleet.database.reading() as session:
        chosen = [planning.spread(planning.draw(session, 1, waves, "digits", ()), devices, waves) for _ in range(10)]
    assert min(chosen) >= alone[len(alone) // 2], "better than a draw of one in every case"
    assert all(kinds == 3 for _, kinds, *_ in chosen)
    assert sum(there for _, _, _, there, *_ in chosen) / 10 > sum(there for _, _, _, there, *_ in alone) / len(alone)


def test_in_a_large_fleet_few_are_drawn(monkeypatch, fleet):
    monkeypatch.setattr(planning, "HASHES", 10)
    with fleet.database.session() as session:
        session.add_all(Device(id=f"d{number}", created=0.0) for number in range(11))
    monkeypatch.setattr(planning, "spread", None)  # nothing to choose by: it would fail
    with fleet.database.reading() as session:
        assert planning.draw(session, 7, machine.read_waves(["1"]), "digits", ()).startswith("r7-")
