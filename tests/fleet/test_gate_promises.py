"""What the gates of a rollout promise, as sentences, whatever its devices do in whatever order."""

import collections
from typing import NamedTuple

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.contract.assignment import EVERYONE, Rollout, reaches, slot
from agent.contract.reports import Outcome, Phase
from fleet_server.rollouts import gates, growth, machine
from fleet_server.rollouts.gates import NOT_ASKED, Counts, Fact, Rules, Ruling, standing
from fleet_server.rollouts.machine import ACTIVE, TERMINAL, Event, Plan, State, Wave

DEVICES = [f"device-{n}" for n in range(30)]
ROLLOUT = "r1-abcd"
SLOTS = {device: slot(ROLLOUT, device) for device in DEVICES}
WAVES = (Wave(permille=100), Wave(permille=400), Wave(permille=EVERYONE))
RULES = Rules()

calmly = settings(deadline=None, max_examples=30)


class Turn(NamedTuple):
    plan: Plan
    reach: int
    counts: Counts
    ruling: Ruling
    told: frozenset[str]


class World:
    """A rollout in this process: facts of devices, and what the pure functions make of them."""

    def __init__(self, rules=RULES):
        self.rules, self.plan, self.reach = rules, Plan(State.RUNNING, WAVES), 0
        self.facts = {device: Fact(device, online=True, serving_it=False) for device in DEVICES}
        self.turns = []
        self.decide()

    @property
    def assigned(self):
        before = max((wave.permille for wave in WAVES[: self.plan.wave]), default=0)
        permille = max(before, min(WAVES[self.plan.wave].permille, self.reach))
        return Rollout(id=ROLLOUT, release=2, previous=1, permille=permille)

    def told(self):
        return [device for device in DEVICES if reaches(self.assigned, device, ())]

    def counts(self):
        for device in self.told():
            if self.facts[device].online:
                self.facts[device] = msgspec.structs.replace(self.facts[device], told=True)
        found = collections.Counter(standing(self.facts[device]).value for device in self.told())
        return Counts(**found)

    def decide(self):
        """As the server does: again as long as something follows."""
        while self.plan.state is State.RUNNING:
            counts = self.counts()
            ruling = gates.judge(counts, (), self.rules, whole=self.reach >= EVERYONE).ruling
            self.turns.append(Turn(self.plan, self.reach, counts, ruling, frozenset(self.told())))
            if ruling is Ruling.FAIL:
                self.plan = machine.step(self.plan, Event.GATE_FAILED)
            elif ruling is Ruling.PASS:
                event = machine.on_pass(self.plan)
                self.plan = machine.step(self.plan, event)
                self.reach = 0 if event is Event.WAVE_PASSED else self.reach
            elif ruling is Ruling.WAIT and self.reach < EVERYONE and (reach := self.grown(counts)) > self.reach:
                self.reach = reach
            else:
                return

    def grown(self, counts):
        told, ahead = set(self.told()), [0] * EVERYONE
        for device in DEVICES:
            if device not in told and SLOTS[device] < WAVES[self.plan.wave].permille:
                ahead[SLOTS[device]] += self.facts[device].online
        most = growth.may_be_told(counts, self.rules)
        return growth.next_reach(self.reach, ahead, None if most is None else most - counts.asked)

    def happens(self, what, number):
        device = DEVICES[number % len(DEVICES)]
        self.facts[device] = msgspec.structs.replace(self.facts[device], **WHAT[what])
        self.decide()


WHAT = {
    "commits": {"serving_it": True, "outcome": Outcome.COMMITTED, "phase": Phase.STEADY, "online": True},
    "claims": {"serving_it": False, "outcome": Outcome.COMMITTED, "phase": Phase.STEADY, "online": True},
    "refuses": {"serving_it": False, "outcome": Outcome.REFUSED, "phase": Phase.QUARANTINED},
    "rolls back": {"serving_it": False, "outcome": Outcome.ROLLED_BACK, "phase": Phase.STEADY},
    "could not fetch": {"serving_it": False, "outcome": Outcome.FAILED, "phase": Phase.STEADY},
    "falls silent": {"online": False},
    "comes back": {"online": True},
    "is held": {"held": True},
    "is skipped": {"skipped": True},
    "is overdue": {"overdue": True},
}
OFTEN = [*WHAT, "commits", "commits", "commits", "commits"]
stories = st.lists(st.tuples(st.sampled_from(OFTEN), st.integers(0, 29)), max_size=80)


def told_by(story, rules=RULES):
    world = World(rules)
    for what, number in story:
        world.happens(what, number)
    return world


@calmly
@given(stories)
def test_nobody_is_told_beyond_the_wave_or_beyond_what_was_heard(story):
    world, before = told_by(story), frozenset()
    for turn in world.turns:
        assert all(SLOTS[device] < WAVES[turn.plan.wave].permille for device in turn.told)
        assert before <= turn.told, "and who was told stays so"
        before = turn.told


@calmly
@given(stories)
def test_a_step_leaves_few_unheard_until_it_is_sure(story):
    for turn in told_by(story).turns:
        grew = growth.may_be_told(turn.counts, RULES)
        unheard = turn.counts.to_answer + turn.counts.failed
        heard = turn.counts.asked - unheard
        if grew is not None and grew > turn.counts.asked:
            assert grew - heard <= max(growth.UNHEARD, (growth.GROWTH - 1) * heard)


@calmly
@given(stories)
def test_a_wave_passes_only_on_devices_that_serve_the_right_bytes_now(story):
    """What was said before, and is no longer so, passes nothing; nor does a device that claims to serve it."""
    for turn in told_by(story).turns:
        if turn.ruling is Ruling.PASS:
            assert turn.counts.committed >= max(1, turn.counts.asked / 2)
            assert not turn.counts.to_answer
            assert turn.reach >= EVERYONE


@calmly
@given(
    st.lists(
        st.tuples(st.sampled_from(["falls silent", "comes back", "could not fetch", "claims"]), st.integers(0, 29)), max_size=80
    )
)
def test_a_fleet_of_which_nobody_commits_never_passes(story):
    world = told_by(story)
    for device in range(30):
        world.happens("is overdue", device)
    for device in range(30):
        world.happens("falls silent", device)
    assert (world.plan.state, world.plan.wave) == (State.RUNNING, 0)
    assert all(turn.ruling is not Ruling.PASS for turn in world.turns)


@calmly
@given(stories, st.sets(st.integers(0, 29), max_size=3))
def test_devices_that_are_held_or_dead_never_keep_a_rollout_waiting_for_ever(story, dead):
    """Once everybody else committed, and a device's time is over, the rollout is over."""
    world = World()
    for number in dead:
        world.happens("is held" if number % 2 else "falls silent", number)
    for what, number in story:
        if what in {"commits", "comes back", "could not fetch"} and number not in dead:
            world.happens(what, number)
    for _ in range(40):
        for number in range(30):
            if number not in dead and world.plan.state is State.RUNNING and DEVICES[number] in world.told():
                world.happens("comes back", number)
                world.happens("commits", number)
    for number in range(30):
        world.happens("is overdue", number)
    assert world.plan.state is State.COMPLETED


@calmly
@given(stories)
def test_the_same_evidence_gives_the_same_verdicts(story):
    assert told_by(story).turns == told_by(story).turns


@calmly
@given(stories, st.permutations(range(8)))
def test_the_order_in_which_the_same_answers_come_changes_no_verdict_on_them(story, order):
    """A verdict follows from how the devices stand, not from how they came to."""
    world = told_by(story)
    facts = [world.facts[DEVICES[number]] for number in range(8)]
    counts = [collections.Counter(standing(facts[number]).value for number in numbers) for numbers in (range(8), order)]
    assert gates.judge(Counts(**counts[0]), (), RULES) == gates.judge(Counts(**counts[1]), (), RULES)


@calmly
@given(stories)
def test_an_abort_is_possible_as_long_as_a_rollout_is_not_over(story):
    for turn in told_by(story).turns:
        assert machine.step(turn.plan, Event.ABORT).state is State.ABORTED
    for state in State:
        can = (state, Event.ABORT) in machine.TRANSITIONS
        assert can == (state in ACTIVE) == (state not in TERMINAL)


@calmly
@given(stories)
def test_a_rollout_ends_as_aborted_only_for_failures_that_are_too_many(story):
    """Never for who is silent, held or slow."""
    world = told_by(story)
    if world.plan.state is State.ABORTED:
        counts = world.turns[-1].counts
        assert counts.failures
        assert counts.failures == counts.asked or counts.failures > 0.03 * counts.asked


@calmly
@given(stories)
def test_at_most_two_devices_are_unheard_while_failures_are_many(story):
    for before, after in zip(world_turns := told_by(story).turns, world_turns[1:], strict=False):
        heard = before.counts.heard
        if before.counts.failures >= 2 and heard < 20 and before.plan is after.plan and after.told > before.told:
            shared = max(collections.Counter(SLOTS.values()).values())
            new = after.told - before.told
            online = after.counts.asked - before.counts.asked
            assert online <= growth.CAREFUL + shared or not new


def test_who_is_not_asked_is_said_in_one_place():
    assert {one.value for one in NOT_ASKED} == {"held", "skipped", "offline", "not_reached", "left"}
    assert Counts(held=1, skipped=2, offline=3, not_reached=4, left=5).asked == 0
