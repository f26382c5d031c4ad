"""One rollout in fast motion, and the rules that judge it: the product's own, those of others, and none."""

from __future__ import annotations

import collections
import functools
import heapq
from collections.abc import Callable
from typing import ClassVar, Literal, Protocol

import msgspec

from agent.contract.reports import Outcome
from benchmarks.gates_devices import SILENCE_MIN, TIME_LIMIT_MIN, Fleet
from fleet_server.rollouts import exclusions, gates, growth, sequential
from fleet_server.rollouts.gates import Counts, Fact, Rules, Ruling
from fleet_server.rollouts.health import Action, Health, HealthRules

SHARES = (0.01, 0.05, 0.25, 1.0)
EXCLUDE_AFTER, EXCLUDE_SHARE = 3, 0.02  # as in fleet.yaml

End = Literal["completed", "stopped", "held"]


class Course(msgspec.Struct, frozen=True):
    end: End
    harmed: int
    minutes: float
    signed: int


class World:
    """What is known of the devices at a moment: only what a fleet server knows, too."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.devices = fleet, len(fleet.here)
        self.goals = [max(1, round(self.devices * share)) for share in SHARES]
        self.wave, self.reached, self.before, self.now = 0, 0, 0, 0.0
        self.standing: dict[int, str] = {}
        self.counted: collections.Counter[str] = collections.Counter()
        self.since_wave: collections.Counter[str] = collections.Counter()
        self.refused: dict[int, int] = {}
        self.serving: collections.Counter[int] = collections.Counter()
        self.asked: collections.Counter[int] = collections.Counter()
        self.excluded: set[int] = set()
        self.health = Health(HealthRules())

    @property
    def goal(self) -> int:
        return self.goals[self.wave]

    @property
    def counts(self) -> Counts:
        c = self.counted
        return Counts(
            committed=c["committed"], refused=c["refused"], told=c["told"], timed_out=c["timed_out"], lost=c["lost"],
            offline=c["offline"],
        )  # fmt: skip

    def put(self, device: int, standing: str) -> None:
        """The device stands like that from now on."""
        if (old := self.standing.get(device)) is not None:
            self.counted[old] -= 1
            self.since_wave[old] -= device >= self.before
            self.asked[self.fleet.group[device]] -= old != "offline"
            if old == "committed":
                self.serving[self.fleet.group[device]] -= 1
        self.standing[device] = standing
        for sample in self.fleet.samples[device] if standing == "committed" else ():
            self.health.add(sample)
        self.counted[standing] += 1
        self.since_wave[standing] += device >= self.before
        group = self.fleet.group[device]
        self.asked[group] += standing != "offline"
        if standing == "committed":
            self.serving[group] += 1
        if standing == "refused":
            self.refused[group] = self.refused.get(group, 0) + 1

    def without(self, groups: set[int]) -> Counts:
        return Counts(
            **collections.Counter(how for device, how in self.standing.items() if self.fleet.group[device] not in groups)
        )

    def leave_out(self, groups: set[int]) -> None:
        self.excluded |= groups
        for device in [device for device in self.standing if self.fleet.group[device] in groups]:
            old = self.standing.pop(device)
            self.counted[old] -= 1
            self.since_wave[old] -= device >= self.before


class Rule(Protocol):
    name: ClassVar[str]

    def judge(self, world: World) -> Literal["stop", "pass", "wait"]: ...

    def reach(self, world: World) -> int:
        """How many devices, in their order, may be told by now."""


def run(fleet: Fleet, rule: Rule) -> Course:
    """A rollout from its first device to its end."""
    world, told, signed = World(fleet), set[int](), 0
    coming: list[tuple[float, int, str]] = []

    def tell() -> bool:
        nonlocal signed
        reach = min(rule.reach(world), world.goal)
        new = range(world.reached, reach)
        for device in new:
            _tell(world, device, told, coming)
        world.reached = max(world.reached, reach)
        signed += bool(new)
        return bool(new)

    tell()
    while True:
        verdict = rule.judge(world)
        if verdict == "stop":
            return Course("stopped", _harmed(fleet, told), world.now, signed)
        if verdict == "pass" and world.reached >= world.goal:
            if world.wave == len(SHARES) - 1:
                return Course("completed", _harmed(fleet, told), world.now, signed)
            world.wave, world.before, world.since_wave = world.wave + 1, world.reached, collections.Counter()
            tell()
            continue
        if tell():
            continue
        if not coming:
            return Course("held", _harmed(fleet, told), world.now, signed)
        world.now, device, standing = heapq.heappop(coming)
        if fleet.group[device] not in world.excluded:
            world.put(device, standing)


def _tell(world: World, device: int, told: set[int], coming: list[tuple[float, int, str]]) -> None:
    fleet, now = world.fleet, world.now
    if fleet.group[device] in world.excluded:
        return
    kind, at = fleet.kind[device], now + fleet.takes[device]
    if not fleet.here[device] or kind == "cloned":
        world.put(device, "offline")
        return
    if fleet.down is not None and fleet.site[device] == fleet.down[0] and fleet.down[1] <= now < fleet.down[2]:
        world.put(device, "offline")
        return
    told.add(device)
    world.put(device, "told")
    if kind == "lost":
        heapq.heappush(coming, (at + SILENCE_MIN, device, "lost"))
        return
    if fleet.flaps[device]:
        heapq.heappush(coming, (now + 0.4 * fleet.takes[device], device, "lost"))
        heapq.heappush(coming, (now + 0.7 * fleet.takes[device], device, "told"))
    if fleet.down is not None and fleet.site[device] == fleet.down[0] and now < fleet.down[1] < at:
        heapq.heappush(coming, (fleet.down[1] + SILENCE_MIN, device, "lost"))
        at += fleet.down[2] - fleet.down[1]
    answer = {"good": "committed", "refuses": "refused", "lying": "timed_out"}[kind]
    heapq.heappush(coming, (now + TIME_LIMIT_MIN if kind == "lying" else at, device, answer))


def _harmed(fleet: Fleet, told: set[int]) -> int:
    return sum(fleet.harms or fleet.kind[device] in {"refuses", "lost"} for device in told)


# -- the product ---------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1 << 18)
def _judged(counts: Counts, rules: Rules, whole: bool) -> Ruling:
    return gates.judge(counts, (), rules, whole=whole).ruling


@functools.lru_cache(maxsize=1 << 18)
def _may_be_told(counts: Counts, rules: Rules) -> int | None:
    return growth.may_be_told(counts, rules)


class Product:
    """`gates.judge`, `growth.may_be_told` and `exclusions.to_exclude`, called as the server calls them."""

    name: ClassVar[str] = "ours"
    rules = Rules()

    def judge(self, world: World) -> Literal["stop", "pass", "wait"]:
        ruling = _judged(world.counts, self.rules, world.reached >= world.goal)
        if world.health.taken and world.health.verdict().action in {Action.ABORT, Action.PAUSE}:
            return "stop"
        found = self._excludable(world)
        if ruling is Ruling.FAIL and not (found and gates.goes_well(world.counts, world.without(found), self.rules)):
            return "stop"
        if found:
            world.leave_out(found)
            return self.judge(world)
        return "pass" if ruling is Ruling.PASS else "wait"

    def _excludable(self, world: World) -> set[int]:
        if max(world.refused.values(), default=0) < EXCLUDE_AFTER:
            return set()
        said = {
            str(group): [Fact("", True, False, outcome=Outcome.REFUSED)] * number
            for group, number in world.refused.items()
            if number >= EXCLUDE_AFTER and group not in world.excluded
        }
        serving = {str(group): number for group, number in world.serving.items()}
        asked = {str(group): number for group, number in world.asked.items()}
        return set(
            map(int, exclusions.to_exclude(said, serving, EXCLUDE_AFTER, EXCLUDE_SHARE, gates.stands_out(asked, self.rules)))
        )

    def reach(self, world: World) -> int:
        if _judged(world.counts, self.rules, False) is Ruling.STALL:
            return world.reached
        most = _may_be_told(world.counts, self.rules)
        if most is None:
            return world.goal
        return _first(world, most - world.counts.asked)


def _first(world: World, number: int) -> int:
    """How far it is to so many more devices that are there."""
    fleet, place = world.fleet, world.reached
    while place < world.goal and number > 0:
        number -= fleet.here[place] and fleet.kind[place] != "cloned" and fleet.group[place] not in world.excluded
        place += 1
    if number > 0:
        return world.goal
    return place


class AtOnce(Product):
    name: ClassVar[str] = "ours, waves at once"
    rules = Rules(growth=False)


# -- others, and none ----------------------------------------------------------------------------------------------------------


class NoGate:
    name: ClassVar[str] = "no gate"

    def judge(self, world: World) -> Literal["stop", "pass", "wait"]:
        return "wait" if world.counted["told"] else "pass"

    def reach(self, world: World) -> int:
        return world.goal


class GroupShare(NoGate):
    """hawkBit's kind: an error condition as a share of the group, a success condition to begin the next one."""

    name: ClassVar[str] = "share of the group"

    def judge(self, world: World) -> Literal["stop", "pass", "wait"]:
        group = world.goal - world.before
        if world.since_wave["refused"] and world.since_wave["refused"] >= 0.10 * group:
            return "stop"
        return "pass" if world.since_wave["committed"] >= 0.5 * group else "wait"


class AnsweredShare(NoGate):
    """AWS IoT Jobs' kind: an abort criterion as a share of those that ended, after a least number of them."""

    name: ClassVar[str] = "share of the answered"

    def judge(self, world: World) -> Literal["stop", "pass", "wait"]:
        c = world.counted
        bad, ended = c["refused"] + c["timed_out"] + c["lost"], c["refused"] + c["timed_out"] + c["lost"] + c["committed"]
        if ended >= 10 and bad >= 0.10 * ended:
            return "stop"
        return "wait" if c["told"] else "pass"


class FirstFailure(NoGate):
    """The product's rule until now."""

    name: ClassVar[str] = "first failure"

    def judge(self, world: World) -> Literal["stop", "pass", "wait"]:
        return "stop" if world.counted["refused"] else super().judge(world)


class Sketch(NoGate):
    """A mixture over failures and silence alike, allowed 3 %; waves at most double until below 10 % for sure."""

    name: ClassVar[str] = "the sketch"

    def _bad(self, world: World) -> tuple[int, int]:
        c = world.counted
        bad = c["refused"] + c["timed_out"] + c["lost"]
        return bad, bad + c["committed"]

    def judge(self, world: World) -> Literal["stop", "pass", "wait"]:
        bad, heard = self._bad(world)
        if _is_above(0.03, bad, heard):
            return "stop"
        if world.counted["told"]:
            return "wait"
        return (
            "pass"
            if world.since_wave["committed"] >= max(1, 0.5 * (sum(world.since_wave.values()) - world.since_wave["offline"]))
            else "wait"
        )

    def reach(self, world: World) -> int:
        if world.counted["told"] or world.reached >= world.goal:
            return world.reached
        bad, heard = self._bad(world)
        if not world.reached or _is_below(0.10, bad, heard):
            return world.goal
        return min(world.goal, 2 * world.reached)


@functools.lru_cache(maxsize=1 << 18)
def _is_above(share: float, bad: int, of: int) -> bool:
    return sequential.is_above(share, bad, of, 0.99)


@functools.lru_cache(maxsize=1 << 18)
def _is_below(share: float, bad: int, of: int) -> bool:
    return sequential.is_below(share, bad, of, 0.95)


RULES: tuple[Callable[[], Rule], ...] = (Product, AtOnce, Sketch, GroupShare, AnsweredShare, FirstFailure)
