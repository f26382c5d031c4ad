"""The gates: what each kind of device counts as, and which counts pass, wait or fail."""

import math
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.reports import Outcome, Phase
from fleet_server.rollouts import facts, gates, sequential
from fleet_server.rollouts.gates import Counts, Fact, Rules, Ruling, Standing, standing
from fleet_server.rollouts.tally import NAMED, ORDER, Entry, Tally
from fleet_server.storage.models import DeviceModel

O, P, S = Outcome, Phase, Standing  # noqa: E741 - short names for the rows below

ROWS = [
    # online, serving it, phase, outcome: standing
    ("committed and serves it", True, True, P.STEADY, O.COMMITTED, S.COMMITTED),
    ("committed, gone since", False, True, P.STEADY, O.COMMITTED, S.COMMITTED),
    ("served it before the rollout", True, True, P.STEADY, None, S.COMMITTED),
    ("says committed, serves other bytes", True, False, P.STEADY, O.COMMITTED, S.TOLD),
    ("watching is not committed", True, True, P.WATCHING, None, S.WATCHING),
    ("fetching", True, False, P.FETCHING, None, S.FETCHING),
    ("silent since it was told", False, False, None, None, S.LOST),
    ("online, says nothing of the model", True, False, None, None, S.TOLD),
    ("refused", True, False, P.QUARANTINED, O.REFUSED, S.REFUSED),
    ("refused, gone since", False, False, P.QUARANTINED, O.REFUSED, S.REFUSED),
    ("rolled back", True, False, P.STEADY, O.ROLLED_BACK, S.ROLLED_BACK),
    ("rolled back, still says it serves it", True, True, P.STEADY, O.ROLLED_BACK, S.ROLLED_BACK),
    ("could not fetch", True, False, P.STEADY, O.FAILED, S.FAILED),
    ("could not fetch, gone since", False, False, P.STEADY, O.FAILED, S.LOST),
    ("failed before, serves it now", True, True, P.STEADY, O.FAILED, S.COMMITTED),
    ("fell silent on the way", False, False, P.FETCHING, None, S.LOST),
]  # fmt: skip


ROWS += [
    ("runs on copies of requests", True, False, P.SHADOWING, None, S.SHADOWING),
    ("did well on copies of requests", True, False, P.SHADOWING, O.SHADOWED, S.SHADOWING),
    ("answers a share of the requests", True, False, P.CANARYING, O.SHADOWED, S.CANARYING),
]


@pytest.mark.parametrize(("name", "online", "serving", "phase", "outcome", "expected"), ROWS, ids=[row[0] for row in ROWS])
def test_what_a_device_counts_as(name, online, serving, phase, outcome, expected):
    """Of devices that were told. One that was not is offline where this one is lost."""
    assert standing(Fact("d", online, serving, phase, outcome, told=True)) is expected
    untold = standing(Fact("d", online, serving, phase, outcome))
    assert untold is (S.OFFLINE if expected is S.LOST else expected)


@pytest.mark.parametrize(
    ("fact", "expected"),
    [
        ({"held": True}, S.HELD),
        ({"held": True, "online": False, "told": True}, S.HELD),
        ({"held": True, "outcome": O.REFUSED}, S.REFUSED),
        ({"held": True, "serving_it": True, "phase": P.STEADY}, S.COMMITTED),
        ({"overdue": True}, S.TIMED_OUT),
        ({"overdue": True, "outcome": O.FAILED}, S.TIMED_OUT),
        ({"overdue": True, "outcome": O.REFUSED}, S.REFUSED),
        ({"overdue": True, "online": False, "told": True}, S.LOST),
        ({"overdue": True, "serving_it": True, "outcome": O.COMMITTED}, S.COMMITTED),
        ({"skipped": True}, S.SKIPPED),
        ({"skipped": True, "outcome": O.ROLLED_BACK}, S.SKIPPED),
        ({"skipped": True, "overdue": True, "held": True}, S.SKIPPED),
        ({"skipped": True, "serving_it": True, "outcome": O.COMMITTED}, S.COMMITTED),
    ],
)
def test_who_is_not_waited_for(fact, expected):
    assert standing(Fact(**{"device": "d", "online": True, "serving_it": False, "told": True} | fact)) is expected


def test_in_a_rollout_of_mode_shadow_nothing_need_be_committed():
    looked = Fact("d", True, False, P.SHADOWING, O.SHADOWED)
    assert standing(looked, shadow=True) is S.SHADOWED
    assert standing(Fact("d", True, False, P.SHADOWING, None), shadow=True) is S.SHADOWING
    assert standing(Fact("d", True, False, P.QUARANTINED, O.REFUSED), shadow=True) is S.REFUSED
    verdict = judge([looked], max_failures=0, shadow=True)
    assert (verdict.ruling, verdict.why) == (Ruling.PASS, "1 shadowed")
    assert judge([looked], max_failures=0).ruling is Ruling.WAIT


some_facts = st.builds(
    Fact, device=st.text(min_size=1, max_size=4), online=st.booleans(), serving_it=st.booleans(),
    phase=st.none() | st.sampled_from(list(Phase)), outcome=st.none() | st.sampled_from(list(Outcome)), told=st.booleans(),
    overdue=st.booleans(), held=st.booleans(), skipped=st.booleans(), left=st.booleans(),
)  # fmt: skip


def judge(found, *, shadow=False, **rules):
    """The verdict on devices with these facts; a device named twice is what it was last."""
    tally = Tally(shadow=shadow)
    for fact in found:
        tally.put(fact.device, Entry(fact, None, serves=False))
    return gates.judge(tally.counts, tally.witnesses, Rules(shadow=shadow, **rules))


def devices(**counts):
    made = {
        "committed": (True, True, P.STEADY, O.COMMITTED), "refused": (True, False, P.QUARANTINED, O.REFUSED),
        "failed": (True, False, P.STEADY, O.FAILED), "rolled_back": (True, False, P.STEADY, O.ROLLED_BACK),
        "fetching": (True, False, P.FETCHING, None), "offline": (False, False, None, None), "lost": (False, False, None, None),
        "timed_out": (True, False, P.FETCHING, None), "held": (True, False, None, None), "skipped": (True, False, None, None),
    }  # fmt: skip
    marks = {"lost": {"told": True}, "timed_out": {"overdue": True}, "held": {"held": True}, "skipped": {"skipped": True}}
    return [Fact(f"{kind}-{n}", *made[kind], **marks.get(kind, {})) for kind, number in counts.items() for n in range(number)]


@pytest.mark.parametrize(
    ("counts", "max_failures", "ruling"),
    [
        ({}, 0, Ruling.WAIT),
        ({"offline": 5}, 0, Ruling.WAIT),
        ({"committed": 1}, 0, Ruling.PASS),
        ({"committed": 1, "offline": 9}, 0, Ruling.PASS),
        ({"committed": 9, "fetching": 1}, 0, Ruling.WAIT),
        ({"committed": 9, "failed": 1}, 0, Ruling.WAIT),
        ({"committed": 9, "refused": 1}, 0, Ruling.FAIL),
        ({"committed": 9, "rolled_back": 1}, 0, Ruling.FAIL),
        ({"committed": 9, "rolled_back": 1}, 1, Ruling.PASS),
        ({"committed": 9, "rolled_back": 1, "refused": 1}, 1, Ruling.FAIL),
        ({"rolled_back": 1}, 1, Ruling.FAIL),
        ({"rolled_back": 1, "lost": 1}, 1, Ruling.STALL),
        ({"fetching": 9, "rolled_back": 1}, 0, Ruling.FAIL),
        ({"failed": 3}, 0, Ruling.WAIT),
        ({"committed": 110, "lost": 1016}, 0, Ruling.STALL),  # they fell silent in the update: what takes devices off the net
        ({"committed": 110, "offline": 1016}, 0, Ruling.PASS),  # they were not there
        ({"committed": 1, "lost": 5000}, 0, Ruling.STALL),
        ({"committed": 2, "lost": 1}, 0, Ruling.PASS),
        ({"committed": 1, "lost": 2}, 0, Ruling.STALL),
        ({"lost": 3}, 0, Ruling.STALL),
        ({"committed": 280, "lost": 20}, 0, Ruling.PASS),
        ({"committed": 240, "lost": 60}, 0, Ruling.STALL),
        ({"committed": 240, "timed_out": 60}, 0, Ruling.STALL),
        ({"committed": 240, "lost": 30, "timed_out": 30}, 0, Ruling.STALL),
        ({"committed": 240, "lost": 60, "fetching": 1}, 0, Ruling.WAIT),
        ({"committed": 5, "held": 5}, 0, Ruling.PASS),
        ({"committed": 1, "held": 50, "skipped": 50}, 0, Ruling.PASS),
        ({"held": 3}, 0, Ruling.WAIT),
        ({"committed": 3, "timed_out": 1}, 0, Ruling.PASS),
    ],
)
def test_rulings(counts, max_failures, ruling):
    verdict = judge(devices(**counts), max_failures=max_failures)
    assert verdict.ruling is ruling
    assert verdict.counts == Counts(**counts)


@pytest.mark.parametrize(
    ("phase", "stands"),
    [
        (None, S.TOLD), (P.STEADY, S.TOLD), (P.QUARANTINED, S.TOLD), (P.FETCHING, S.FETCHING), (P.TRIALING, S.TRIALING),
        (P.SHADOWING, S.SHADOWING), (P.WAITING, S.WAITING), (P.CANARYING, S.CANARYING), (P.ACTIVATING, S.ACTIVATING),
        (P.WATCHING, S.WATCHING), (P.ROLLING_BACK, S.ROLLING_BACK),
    ],
)  # fmt: skip
def test_who_has_still_to_answer_is_called_as_the_phase_of_its_update(phase, stands):
    fact = Fact("one", online=True, serving_it=False, phase=phase, told=True)
    assert standing(fact) is stands
    assert stands in gates.TO_ANSWER
    assert Counts(**{stands.value: 2}).to_answer == 2
    assert standing(msgspec.structs.replace(fact, overdue=True)) is S.TIMED_OUT
    assert standing(msgspec.structs.replace(fact, online=False)) is S.LOST


def test_every_phase_has_a_standing_and_every_standing_a_count():
    assert {standing(Fact("one", online=True, serving_it=False, phase=phase)) for phase in P} == set(gates.TO_ANSWER)
    assert {one.value for one in Standing} == set(Counts.__struct_fields__)


def test_who_left_or_was_not_reached_is_in_no_sum():
    counts = Counts(committed=2, fetching=1, failed=1, held=1, not_reached=40, left=7)
    assert (counts.total, counts.asked, counts.to_answer, counts.heard) == (5, 4, 1, 2)
    verdict = gates.judge(Counts(committed=2, left=7), [], Rules())
    assert (verdict.ruling, verdict.why) == (Ruling.PASS, "2 committed; 7 left")


def test_min_devices():
    assert judge(devices(committed=2), max_failures=0, min_devices=3).ruling is Ruling.STALL
    assert judge(devices(committed=3), max_failures=0, min_devices=3).ruling is Ruling.PASS


def test_evidence_names_the_bad_ones_first_and_is_bounded():
    verdict = judge(devices(committed=200, rolled_back=2, fetching=30), max_failures=5)
    assert [w.standing for w in verdict.evidence] == [S.ROLLED_BACK] * 2 + [S.FETCHING] * NAMED + [S.COMMITTED] * NAMED
    assert [w.device for w in verdict.evidence[2:4]] == ["fetching-0", "fetching-1"]
    assert set(ORDER) == set(Standing) - {S.NOT_REACHED, S.PENDING}, "nobody stands like that behind a verdict"


@given(st.data())
def test_a_tally_is_what_the_last_facts_say(data):
    """Whatever was put in and taken out before: counts, order, refusals and who serves are those of what is in it."""
    names, kinds = st.sampled_from("abcdefgh"), st.none() | st.sampled_from(["k1", "k2"])
    tally, known = Tally(), {}
    for _ in range(data.draw(st.integers(1, 25))):
        name = data.draw(names)
        if data.draw(st.booleans()):
            tally.drop(name)
            known.pop(name, None)
            continue
        fact = data.draw(st.none() | some_facts)
        known[name] = Entry(
            fact, data.draw(kinds), data.draw(st.booleans()), not_reached=fact is None and data.draw(st.booleans())
        )
        tally.put(name, known[name])
    fresh = Tally()
    for name, entry in sorted(known.items(), reverse=True):
        fresh.put(name, entry)
    for one in (tally, fresh):
        assert one.counts.total + one.counts.left == sum(entry.fact is not None for entry in known.values())
        assert one.counts.not_reached == sum(entry.not_reached for entry in known.values())
        assert one.serving == Counter(e.kind for e in known.values() if e.serves and e.kind)
    assert (tally.counts, tally.witnesses, tally.refused(1)) == (fresh.counts, fresh.witnesses, fresh.refused(1))


@pytest.mark.alone  # each example has a deadline
@given(st.lists(some_facts, max_size=30), st.integers(0, 5), st.integers(1, 3))
def test_no_wave_passes_on_anything_but_right_bytes(found, max_failures, min_devices):
    """PASS needs devices that serve the release; an online device that still has to answer, or a failure too many, prevents it."""
    found = list({fact.device: fact for fact in found}.values())
    verdict = judge(found, max_failures=max_failures, min_devices=min_devices)
    assert verdict.counts.total + verdict.counts.left == len(found)
    stands = [standing(f) for f in found]
    bad = sum(one in {S.REFUSED, S.ROLLED_BACK} for one in stands)
    assert bad >= sum(f.outcome in {O.REFUSED, O.ROLLED_BACK} for f in found if not (f.skipped or f.left))
    if bad > max_failures:
        assert verdict.ruling is Ruling.FAIL
    elif verdict.ruling is Ruling.FAIL:
        asked = verdict.counts.asked
        assert bad == asked or sequential.is_above(0.03, bad, asked, 0.99)
    if verdict.ruling is Ruling.PASS:
        good = [f for f in found if f.serving_it and not f.left and (f.skipped or f.outcome not in {O.REFUSED, O.ROLLED_BACK})]
        asked = [one for one in stands if one not in {S.OFFLINE, S.HELD, S.SKIPPED, S.LEFT}]
        assert len(good) >= max(min_devices, len(asked) / 2)
        assert not {*gates.TO_ANSWER, S.FAILED} & set(stands)


@pytest.mark.parametrize(
    ("counts", "ruling"),
    [
        ({"refused": 1}, Ruling.FAIL),  # all that were told
        ({"refused": 1, "pending": 2}, Ruling.WAIT),  # in a verdict stored before
        ({"refused": 1, "told": 1, "watching": 1}, Ruling.WAIT),
        ({"refused": 2, "trialing": 1}, Ruling.WAIT),
        ({"refused": 3, "fetching": 4}, Ruling.FAIL),  # sooner than the others can answer
        ({"committed": 2, "refused": 1}, Ruling.PASS),
        ({"committed": 1, "refused": 2}, Ruling.STALL),
        ({"committed": 28, "rolled_back": 2}, Ruling.PASS),
        ({"committed": 20, "refused": 10}, Ruling.FAIL),
        ({"committed": 291, "refused": 9}, Ruling.PASS),  # 3 %
        ({"committed": 279, "refused": 21}, Ruling.PASS),  # 7 %: too few devices to be sure
        ({"committed": 270, "refused": 30}, Ruling.FAIL),
        ({"committed": 28200, "rolled_back": 1800}, Ruling.FAIL),  # 6 %
        ({"committed": 29100, "rolled_back": 900}, Ruling.PASS),
    ],
)
def test_rulings_by_a_share_of_failures(counts, ruling):
    assert gates.judge(Counts(**counts), [], Rules()).ruling is ruling


def test_a_wave_that_has_not_told_all_of_its_devices_does_not_pass():
    counts = Counts(committed=3)
    assert gates.judge(counts, [], Rules(), whole=False).ruling is Ruling.WAIT
    assert gates.judge(Counts(refused=3), [], Rules(), whole=False).ruling is Ruling.FAIL


@given(st.integers(1, 5000), st.integers(1, 200))
def test_a_silent_fleet_never_passes(silent, committed):
    """However many committed before: when most of those that were told are silent, no wave passes."""
    counts = Counts(committed=committed, lost=max(silent, committed + 1))
    assert gates.judge(counts, [], Rules()).ruling is Ruling.STALL


@given(st.builds(Counts, **dict.fromkeys(Counts.__struct_fields__, st.integers(0, 50))))
def test_who_is_held_skipped_or_not_there_changes_no_ruling(counts):
    """So they never keep a wave waiting, and never let it pass."""
    without = msgspec.structs.replace(counts, held=0, skipped=0, offline=0, not_reached=0, left=0)
    assert gates.judge(counts, [], Rules()).ruling is gates.judge(without, [], Rules()).ruling


@given(st.builds(Counts, **dict.fromkeys(Counts.__struct_fields__, st.integers(0, 50))))
def test_nobody_who_is_gone_is_waited_for(counts):
    """WAIT means that a device which is there may still answer, or that nobody was there."""
    waits = gates.judge(counts, [], Rules(failure_share=None)).ruling is Ruling.WAIT
    assert waits == bool(counts.to_answer or counts.failed or not counts.asked)


@pytest.mark.parametrize(
    "rules",
    [
        {"max_failures": -1}, {"min_devices": 0}, {"min_share": 1.5}, {"min_share": math.nan}, {"missing_share": 0.0}, {"missing_share": 1.0},
        {"failure_share": 0.0}, {"failure_share": 0.5}, {"failure_share": math.nan}, {"bake_s": -1.0}, {"rate": 0.0}, {"rate": math.nan},
        {"confidence": 1.0}, {"confidence": 0.2}, {"time_limit_s": 0.0}, {"time_limit_s": math.nan},
    ],
)  # fmt: skip
def test_rules_that_make_no_sense(rules):
    with pytest.raises(ValueError, match="must"):
        Rules(**rules)


@pytest.mark.alone  # each example has a deadline
@given(st.lists(some_facts, min_size=1, max_size=20), st.integers(0, 3))
def test_the_order_of_devices_does_not_matter(found, max_failures):
    found = list({fact.device: fact for fact in found}.values())
    assert judge(found, max_failures=max_failures) == judge(found[::-1], max_failures=max_failures)


@pytest.mark.parametrize(
    ("reason", "rollout", "outcome"),
    [
        ("wrong_release", "r2", None),
        ("wrong_release", "r3", Outcome.REFUSED),
        ("bad_signature", "r2", None),
        ("golden_mismatch", "r2", Outcome.REFUSED),
    ],
)
def test_a_refusal_for_the_metadata_of_its_time_counts_in_its_own_rollout(reason, rollout, outcome):
    """A release that was refused while the server stood on an old copy gets its chance in the next rollout."""
    said = {"release": 4, "outcome": "refused", "reason": reason, "rollout": rollout, "message": "", "at": 1.0}
    row = DeviceModel(device="cam", model="m", serving=3, sha256=None, variant=None, phase="steady", answers=[said])

    assert facts.fact_of("cam", True, row, 4, {}, "r3").outcome is outcome


@pytest.mark.parametrize(
    ("outcome", "counted"),
    [(None, S.OFFLINE), (O.COMMITTED, S.OFFLINE), (O.REFUSED, S.REFUSED), (O.ROLLED_BACK, S.ROLLED_BACK)],
)
def test_several_machines_under_one_identity_are_nobodys_success(outcome, counted):
    fact = Fact("cam", online=True, serving_it=True, phase=P.STEADY, outcome=outcome)

    assert standing(facts.of_one(fact, several=True)) is counted
    assert facts.of_one(fact, several=False) == fact
