"""The rollout machine: every pair of state and event, and what no order of events can break."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.assignment import EVERYONE
from fleet_server.rollouts.machine import (
    ACTIVE,
    NEXT_WAVE,
    TERMINAL,
    TRANSITIONS,
    Event,
    IllegalTransition,
    Plan,
    State,
    Wave,
    on_pass,
    read_waves,
    resolved,
    step,
    waves,
)  # fmt: skip

TWO = (Wave(groups=("canary",)), Wave(permille=EVERYONE))

EXPECTED = {
    "created": {"propose": "proposed", "schedule": "scheduled", "start": "running", "abort": "aborted"},
    "proposed": {"approve": "scheduled", "abort": "aborted"},
    "scheduled": {"start": "running", "abort": "aborted"},
    "running": {
        "wave_passed": "running", "wait": "waiting", "last_wave_passed": "completed", "gate_failed": "aborted", "pause": "paused",
        "complete": "completed", "supersede": "superseded", "abort": "aborted",
    },
    "waiting": {
        "promote": "running", "gate_failed": "aborted", "pause": "paused", "complete": "completed", "supersede": "superseded",
        "abort": "aborted",
    },
    "paused": {
        "resume": "running", "gate_failed": "aborted", "complete": "completed", "supersede": "superseded", "abort": "aborted",
    },
    "completed": {},
    "superseded": {},
    "aborted": {},
}  # fmt: skip


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_every_pair(state, event):
    """A pair of the table leads where it says; any other raises and changes nothing."""
    last = event is Event.LAST_WAVE_PASSED
    plan = Plan(state, TWO, wave=1 if last else 0)
    wanted = EXPECTED[state.value].get(event.value)
    if wanted is None:
        with pytest.raises(IllegalTransition):
            step(plan, event)
        assert plan == Plan(state, TWO, wave=1 if last else 0)
    else:
        after = step(plan, event)
        assert after.state.value == wanted
        assert after.wave == plan.wave + (event in NEXT_WAVE)


def test_states_are_active_or_over():
    assert {*ACTIVE, *TERMINAL} == set(State)
    assert not {state for state, _ in TRANSITIONS} & set(TERMINAL)


@pytest.mark.parametrize("event", [Event.WAVE_PASSED, Event.PROMOTE])
def test_there_is_no_wave_behind_the_last(event):
    state = State.RUNNING if event is Event.WAVE_PASSED else State.WAITING
    with pytest.raises(IllegalTransition):
        step(Plan(state, TWO, wave=1), event)


def test_only_the_last_wave_completes():
    with pytest.raises(IllegalTransition):
        step(Plan(State.RUNNING, TWO), Event.LAST_WAVE_PASSED)


@pytest.mark.parametrize(
    ("groups", "permille", "expected"),
    [
        ((), None, (Wave(permille=1000),)),
        (("canary",), None, (Wave(groups=("canary",)), Wave(permille=1000))),
        ((), 100, (Wave(permille=100), Wave(permille=1000))),
        (("a", "b"), 50, (Wave(groups=("a", "b"), permille=50), Wave(permille=1000))),
        ((), 1000, (Wave(permille=1000),)),
        (("a",), 1000, (Wave(groups=("a",), permille=1000),)),
    ],
)
def test_waves_of_a_start(groups, permille, expected):
    assert waves(groups, permille) == expected


@pytest.mark.parametrize("bad", [{"permille": 1001}, {"permille": -1}, {}, {"groups": ("../x",)}])
def test_a_wave_that_cannot_be(bad):
    with pytest.raises(ValueError):
        Wave(**bad)


def test_the_last_wave_reaches_everyone():
    with pytest.raises(ValueError, match="everyone"):
        Plan(State.CREATED, (Wave(groups=("a",)),))


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (Plan(State.RUNNING, TWO), Event.WAVE_PASSED),
        (Plan(State.RUNNING, TWO, confirm=True), Event.WAIT),
        (Plan(State.RUNNING, TWO, wave=1), Event.LAST_WAVE_PASSED),
        (Plan(State.RUNNING, TWO, wave=1, confirm=True), Event.LAST_WAVE_PASSED),
        (Plan(State.WAITING, TWO, confirm=True), None),
        (Plan(State.PAUSED, TWO), None),
        (Plan(State.COMPLETED, TWO, wave=1), None),
    ],
)
def test_what_a_passed_gate_means(plan, expected):
    assert on_pass(plan) is expected


@pytest.mark.alone  # each example has a deadline
@given(st.lists(st.sampled_from(list(Event)), max_size=40), st.booleans(), st.integers(1, 5))
def test_no_order_of_events_breaks_it(events, confirm, count):
    """Waves only go up and by one, an end is an end, completing happens in the last wave only, unless an operator says so."""
    plan = Plan(State.CREATED, (*(Wave(permille=n + 1) for n in range(count - 1)), Wave(permille=EVERYONE)), confirm=confirm)
    for event in events:
        before = plan
        try:
            plan = step(plan, event)
        except IllegalTransition:
            assert plan is before
            continue
        assert before.state not in TERMINAL
        assert plan.wave - before.wave in {0, 1}
        assert plan.waves == before.waves
        if plan.state is State.COMPLETED:
            assert plan.last_wave or event is Event.COMPLETE
        follow = on_pass(plan)
        if follow is not None:
            step(plan, follow)  # what a passed gate means is always possible


# -- waves that are named -----------------------------------------------------------------------------------------------------

ALL = Wave(permille=EVERYONE)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (
            ["1", "5%", "canary", "25%", "100%"],
            (Wave(count=1), Wave(permille=50), Wave(groups=("canary",)), Wave(permille=250), ALL),
        ),
        (["1", "10"], (Wave(count=1), Wave(count=10), ALL)),
        (["0.01%"], (Wave(permille=1), ALL)),
        ([" canary "], (Wave(groups=("canary",)), ALL)),
        (["100%"], (ALL,)),
    ],
)
def test_named_waves(texts, expected):
    assert read_waves(texts) == expected


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["0"], "0 devices"), (["0%"], "above 0"), (["101%"], "at most 100%"), (["nan%"], "above 0"), (["x%"], "not a number of devices"),
        (["5%", "1%"], "shares grow"), (["5%", "5%"], "shares grow"), (["10", "1"], "numbers of devices grow"), (["100%", "canary"], "nothing can follow"),
        (["a group"], "group"), ([""], "group"), (["-1"], "group"),
    ],
)  # fmt: skip
def test_waves_that_contradict_themselves(texts, said):
    with pytest.raises(ValueError, match=said):
        read_waves(texts)


@given(
    st.lists(st.tuples(st.integers(0, EVERYONE - 1), st.frozensets(st.sampled_from("ab"))), min_size=1, max_size=40),
    st.lists(st.integers(1, 50), min_size=1, max_size=3, unique=True), st.integers(1, EVERYONE),
)  # fmt: skip
def test_a_wave_reaches_as_many_as_it_names_and_one_at_least(devices, counts, permille):
    def reached(said):
        groups, share = {group for wave in said for group in wave.groups}, max(wave.permille for wave in said)
        return sum(slot < share or bool(groups & set(mine)) for slot, mine in devices)

    asked = [*(Wave(count=count) for count in sorted(counts)), Wave(groups=("a",)), Wave(permille=permille), ALL]
    found = resolved(asked, devices)
    for number, count in enumerate(sorted(counts)):
        together = reached(found[: number + 1])
        assert together >= min(count, len(devices))
        at_the_edge = max(sum(slot == one for slot, _ in devices) for one, _ in devices)
        assert together < count + at_the_edge, "no more than share the last one's slot"
    assert found[-2].permille >= permille
    assert reached(found[-2:-1]) >= 1
    assert reached(found) == len(devices)
    assert [wave.groups for wave in found] == [wave.groups for wave in asked]


def test_a_fleet_without_devices_has_waves_too():
    assert resolved((Wave(count=2), Wave(permille=5), ALL), []) == (Wave(count=2, permille=EVERYONE), Wave(permille=5), ALL)
