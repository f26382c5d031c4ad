"""What the devices of a wave answered, and what follows. Pure.

Only what a device signed counts, and only together with the digest that it really serves: a device that says "committed" and
serves other bytes has still to answer, and is no success. A device that was not there since its wave began says nothing about the release.
One that was there when it was told, and is silent since, may be silent because of the release: a wave does not wait for it, and does not
pass when there are too many like it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum

import msgspec

from agent.contract.reports import Outcome, Phase
from fleet_server.rollouts import sequential


class Standing(str, Enum):
    """How one device stands to the release of a rollout. Those from `TOLD` to `ROLLING_BACK` have still to answer; but for the first, they are
    called as the phase that the device's update is in.
    """

    COMMITTED = "committed"
    SHADOWED = "shadowed"
    REFUSED = "refused"
    FAILED = "failed"  # it could not fetch or store the release; it tries again
    ROLLED_BACK = "rolled_back"
    TOLD = "told"  # it is there, and no update of the model goes on
    FETCHING = "fetching"
    TRIALING = "trialing"
    SHADOWING = "shadowing"
    WAITING = "waiting"  # for a retry, a window, an approval or its team
    CANARYING = "canarying"
    ACTIVATING = "activating"
    WATCHING = "watching"
    ROLLING_BACK = "rolling_back"
    TIMED_OUT = "timed_out"  # it is there, and has not answered within the time that a device has
    LOST = "lost"  # it was there when it was told, and is silent since
    HELD = "held"  # an operator keeps it on what it serves
    SKIPPED = "skipped"  # an operator took it out of this rollout's count
    OFFLINE = "offline"  # it was not there since its wave began
    NOT_REACHED = "not_reached"  # it is in the rollout's scope, and was not told yet
    LEFT = "left"  # it was told, and is none of the rollout's devices any more
    PENDING = "pending"  # in verdicts stored before those that have still to answer were told apart: any of them


TO_ANSWER = (
    Standing.TOLD,
    Standing.FETCHING,
    Standing.TRIALING,
    Standing.SHADOWING,
    Standing.WAITING,
    Standing.CANARYING,
    Standing.ACTIVATING,
    Standing.WATCHING,
    Standing.ROLLING_BACK,
)
"""Of devices that are there, were told, and have not answered."""

AT_WORK = {Phase(one.value): one for one in TO_ANSWER if one is not Standing.TOLD}


MOST_ALLOWED = 0.5
"""A release that half of all devices refuse is no release of theirs; and twice `failure_share` must be a share (`rollouts.growth`)."""


MOST_BAKE_S = 365 * 86400.0
MOST_RATE = 1_000_000.0


class Ruling(str, Enum):
    WAIT = "wait"
    STALL = (
        "stall"  # no device is still to answer, and the wave cannot pass: a person, or devices that come back, must change that
    )
    PASS = "pass"  # noqa: S105 - a verdict
    FAIL = "fail"


NOT_COUNTED = frozenset({Standing.NOT_REACHED, Standing.LEFT})
"""The rollout has not come to these, or they are its devices no more."""

NOT_ASKED = NOT_COUNTED | {Standing.HELD, Standing.SKIPPED, Standing.OFFLINE}
"""Nobody waits for these, and they say nothing of the release."""


class Fact(msgspec.Struct, frozen=True):
    """What is known of one device that the wave reaches. `outcome` is its latest answer to this release, None without one."""

    device: str
    online: bool
    serving_it: bool
    """It reports to serve the release with the bytes the manifest names for its variant."""
    phase: Phase | None = None
    outcome: Outcome | None = None
    reason: str | None = None
    message: str = ""
    told: bool = False
    """It was there at a moment at which its wave had begun."""
    overdue: bool = False
    """It was told longer ago than a device may take."""
    held: bool = False
    skipped: bool = False
    left: bool = False
    """It was told, and is none of the rollout's devices any more; `message` says why."""


class Counts(msgspec.Struct, frozen=True):
    """How many devices have each standing. `pending` is of verdicts stored before those that have still to answer were told apart."""

    committed: int = 0
    shadowed: int = 0
    refused: int = 0
    failed: int = 0
    rolled_back: int = 0
    told: int = 0
    fetching: int = 0
    trialing: int = 0
    shadowing: int = 0
    waiting: int = 0
    canarying: int = 0
    activating: int = 0
    watching: int = 0
    rolling_back: int = 0
    timed_out: int = 0
    lost: int = 0
    held: int = 0
    skipped: int = 0
    offline: int = 0
    not_reached: int = 0
    left: int = 0
    pending: int = 0

    @property
    def total(self) -> int:
        """How many devices the rollout has come to."""
        return self._all_but(NOT_COUNTED)

    def _all_but(self, standings: Collection[Standing]) -> int:
        but = {one.value for one in standings}
        return sum(int(getattr(self, name)) for name in self.__struct_fields__ if name not in but)

    @property
    def to_answer(self) -> int:
        """How many devices are there, were told, and have not answered."""
        return self.pending + sum(int(getattr(self, standing.value)) for standing in TO_ANSWER)

    @property
    def heard(self) -> int:
        """How many of those that the wave is judged by have answered, or are not waited for any more."""
        return self.asked - self.to_answer - self.failed

    @property
    def failures(self) -> int:
        """How many answers say that the release is bad."""
        return self.refused + self.rolled_back

    @property
    def missing(self) -> int:
        """How many devices were told and do not answer."""
        return self.lost + self.timed_out

    @property
    def asked(self) -> int:
        """How many devices the wave is judged by: those that were told, less those that an operator answers for."""
        return self._all_but(NOT_ASKED)


class Witness(msgspec.Struct, frozen=True):
    """A device behind a verdict, and why it counts as it does."""

    device: str
    standing: Standing
    reason: str | None = None
    message: str = ""


class Verdict(msgspec.Struct, frozen=True):
    ruling: Ruling
    why: str
    counts: Counts
    evidence: tuple[Witness, ...] = ()


class Rules(msgspec.Struct, frozen=True):
    """What a wave must keep to pass. `failure_share`: which part of the devices asked may refuse the release or roll it back; when it is more
    than that, with `confidence` that it is no accident, the rollout ends. None: no part is too much. `max_failures`: how many devices may, on
    top of that; None: no such number. `min_devices` and `min_share`: how many devices must have committed, and which part of those asked.
    `missing_share`: which part of those asked may fall silent or run out of time (`time_limit_s` after it was told); when it is more, with
    `confidence`, the wave does not pass. `growth`: a wave tells its devices in steps (`rollouts.growth`). `bake_s`: for how long a wave
    must have passed before the next one begins. `rate`: how many devices may be told in a minute; None: any number. `shadow`: the rollout has
    mode shadow, and devices need not commit.
    """

    max_failures: int | None = None
    failure_share: float | None = 0.03
    min_devices: int = 1
    min_share: float = 0.5
    missing_share: float = 0.1
    confidence: float = 0.99
    time_limit_s: float = 86400.0
    growth: bool = True
    bake_s: float = 0.0
    rate: float | None = None
    shadow: bool = False

    def __post_init__(self) -> None:
        if (self.max_failures or 0) < 0 or self.min_devices < 1:
            raise ValueError("max_failures must not be negative, and min_devices must be at least 1")
        if self.failure_share is not None and not 0 < self.failure_share < MOST_ALLOWED:
            raise ValueError(f"failure_share must be above 0 and below {MOST_ALLOWED}")
        if not (0 <= self.min_share <= 1 and 0 < self.missing_share < 1 and 0.5 <= self.confidence < 1):
            raise ValueError("min_share must be from 0 to 1, missing_share above 0 and below 1, confidence from 0.5 to below 1")
        if not 0 <= self.bake_s <= MOST_BAKE_S or (self.rate is not None and not 0 < self.rate <= MOST_RATE):
            raise ValueError("bake_s must be from 0 to a year, and rate, in devices a minute, above 0 and at most a million")
        if not self.time_limit_s >= 1:
            raise ValueError("time_limit_s must be at least 1 second")


def standing(fact: Fact, *, shadow: bool = False) -> Standing:
    """How one device stands. A bad answer counts whether the device is still there or not; a good one counts only while the
    right bytes serve. `shadow`: the rollout has mode shadow, and a release that kept its rules beside what serves is a success.
    """
    if fact.left:
        return Standing.LEFT
    good = fact.serving_it and (fact.outcome is Outcome.COMMITTED or fact.phase is Phase.STEADY)
    if fact.skipped and not good:
        return Standing.SKIPPED
    if fact.outcome is Outcome.REFUSED:
        return Standing.REFUSED
    if fact.outcome is Outcome.ROLLED_BACK:
        return Standing.ROLLED_BACK
    if good:
        return Standing.COMMITTED
    if shadow and fact.outcome is Outcome.SHADOWED:
        return Standing.SHADOWED
    if fact.held:
        return Standing.HELD
    if not fact.online:
        return Standing.LOST if fact.told else Standing.OFFLINE
    if fact.overdue:
        return Standing.TIMED_OUT
    if fact.outcome is Outcome.FAILED:
        return Standing.FAILED
    return AT_WORK.get(fact.phase, Standing.TOLD) if fact.phase is not None else Standing.TOLD


def judge(counts: Counts, evidence: Sequence[Witness], rules: Rules, *, whole: bool = True) -> Verdict:
    """The verdict on a wave whose devices stand like that: FAIL when too many found the release bad; WAIT while a device that is there may
    still answer; then PASS or STALL. `whole`: all devices of the wave may be told by now; until then it does not pass, and waits where it
    would. `evidence`: some of the devices, which the verdict names.
    """
    ruling, why = _rule(counts, rules)
    if ruling is Ruling.PASS and not whole:
        ruling = Ruling.WAIT
    return Verdict(ruling, why, counts, tuple(evidence))


def _rule(counts: Counts, rules: Rules) -> tuple[Ruling, str]:
    if (too_many := _too_many_failed(counts, rules)) is not None:
        return Ruling.FAIL, too_many
    if counts.to_answer or counts.failed:
        return Ruling.WAIT, _say((counts.to_answer, "still to answer"), (counts.failed, "could not fetch it"))
    if not counts.asked:
        return Ruling.WAIT, f"none of {counts.total} was there yet" if counts.total else "the wave reaches no device"
    return _weigh(counts, rules)


def _too_many_failed(counts: Counts, rules: Rules) -> str | None:
    """Why the rollout ends; None when it does not. Failures are counted over all that were asked, those still to answer included: a device
    refuses sooner than another one commits, so over those that answered they would be too many in every wave that just began.
    """
    bad = _say((counts.refused, "refused it"), (counts.rolled_back, "rolled back"))
    if rules.max_failures is not None and counts.failures > rules.max_failures:
        return f"{bad}; {rules.max_failures or 'none'} allowed"
    if rules.failure_share is None or not counts.failures:
        return None
    if sequential.is_above(rules.failure_share, counts.failures, counts.asked, rules.confidence):
        return f"{bad}: of {counts.asked} that is more than {100 * rules.failure_share:g} %, with {rules.confidence:.1%} confidence"
    if counts.failures == counts.asked:
        return f"{bad}, and nobody else was asked"
    return None


def stands_out(asked: Mapping[str, int], rules: Rules) -> Callable[[str, int], bool]:
    """Whether so many devices of a hardware class that refuse the release are the class's own trouble: more than is allowed of all devices.
    Otherwise a release that one device in ten refuses, of whatever class, would lose one class after the other and never be stopped. `asked`:
    how many devices of each class were asked. Rules without a share, of rollouts begun before there was one, let any class stand out.
    """

    def does(kind: str, refused: int) -> bool:
        if rules.failure_share is None:
            return True
        of = max(refused, asked.get(kind, 0))
        return sequential.is_above(rules.failure_share, refused, of, rules.confidence)

    return does


def goes_well(counts: Counts, rest: Counts, rules: Rules) -> bool:
    """Whether the gate does not fail without the devices of some hardware classes (`rest`), one device does well then, and no number of
    failures that an operator named is exceeded by all of them (`counts`).
    """
    if rules.max_failures is not None and counts.failures > rules.max_failures:
        return False
    return rest.committed + rest.shadowed > 0 and _too_many_failed(rest, rules) is None


def _weigh(counts: Counts, rules: Rules) -> tuple[Ruling, str]:
    """The verdict when nobody who is there is still to answer."""
    good = counts.committed + counts.shadowed
    wish = "shadowed" if rules.shadow else "committed"
    said = _say((counts.committed, "committed"), (counts.shadowed, "shadowed")) or f"0 {wish}"
    gone = _say((counts.lost, "fell silent after they were told"), (counts.timed_out, "did not answer in time"))
    rest = _say((counts.held, "held"), (counts.skipped, "skipped"), (counts.offline, "offline"), (counts.left, "left"))
    all_said = "; ".join(filter(None, (said, gone, rest)))
    if good < rules.min_devices:
        return Ruling.STALL, f"{all_said}; at least {rules.min_devices} needed"
    if good < rules.min_share * counts.asked:
        return Ruling.STALL, f"{all_said}; at least {rules.min_share:.0%} of {counts.asked} needed"
    if sequential.is_above(rules.missing_share, counts.missing, counts.asked, rules.confidence):
        limit = f"more than {rules.missing_share:.0%}, with {rules.confidence:.1%} confidence"
        return Ruling.STALL, f"{all_said}: of {counts.asked} that is {limit}"
    return Ruling.PASS, all_said


def _say(*parts: tuple[int, str]) -> str:
    return ", ".join(f"{number} {text}" for number, text in parts if number)
