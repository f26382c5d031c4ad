"""Whether a release does worse on devices than what each of them ran before: tests that may be looked at after every sample. Pure.

A device gives one sample for each test: its own figures under the release before and under this one, taken once it has enough of both
(`HealthRules.requests`, `HealthRules.rows`) and never again. What decides when it is taken is how much the device worked, not how well.

 1. Latency, classes, confidence, agreement: is a device worse than its own past by more than a margin, and is that so in more than half of
    the devices? A device is worse or it is not, so a burst within one counts once, and slow devices are compared with themselves. What an
    even coin would have shown is the bet against.
 2. Errors and unusable answers: given all errors of a device, how many fell into now? With one ratio allowed for all devices, a mixture of
    larger ones is the bet. A device's part is bounded by what a single event of it would give, since errors come in bursts.
 3. Every stake starts at 1 and does not grow on average while a release is no worse than allowed. So the chance that it ever reaches 1/alpha
    is at most alpha (Ville's inequality), however often somebody looks.
 4. Several tests, and several models of a team, share one alpha in equal parts.
 5. What is missing (no telemetry, too little of it) says nothing. It never counts as good or bad, and verdicts say how many gave a sample.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from enum import Enum

import msgspec

from fleet_server.rollouts import sequential

RATIOS = tuple(1.1 * 1.16**step for step in range(24))
"""How much larger than allowed the alternatives are: from 1.1 to some 33 times, evenly in the logarithm."""

STAKE = 0.8
"""How much of what is there is bet on one device. So no device can take more than four fifths of it: one that had a burst of errors before
does not hide what all others say."""


class HealthTest(str, Enum):
    ERRORS = "errors"
    UNUSABLE = "unusable"  # answers that are no numbers
    LATENCY = "latency"
    CLASSES = "classes"
    CONFIDENCE = "confidence"
    AGREEMENT = "agreement"  # with the release that serves, while this one shadows it


COUNTED = frozenset({HealthTest.ERRORS, HealthTest.UNUSABLE})
"""Tests of events among requests; the others ask of each device whether it is worse."""


class Action(str, Enum):
    PROMOTE = "promote"  # nothing speaks against going on
    HOLD = "hold"  # too little is known to go on
    PAUSE = "pause"  # something is different, and a person decides
    ABORT = "abort"


class Sample(msgspec.Struct, frozen=True):
    """What one device says in one test. `before` and `now`, out of `of_before` and `of_now`:

    errors, unusable: how many requests or rows;
    latency: the median in milliseconds;
    classes, confidence: how far the device's own past was from itself (0 to 1), and how far it is from its past now;
    agreement: 0, and how many compared answers differ.
    """

    device: str
    test: HealthTest
    before: float
    now: float
    of_before: int
    of_now: int

    def __post_init__(self) -> None:
        if not (0 <= self.before < math.inf and 0 <= self.now < math.inf and self.of_before >= 0 and self.of_now > 0):
            raise ValueError(f"a sample of {self.device!r} in test {self.test.value} has numbers that cannot be")
        if self.test in COUNTED and (self.before > self.of_before or self.now > self.of_now or not self.of_before):
            raise ValueError(f"a sample of {self.device!r} in test {self.test.value} counts more events than it has requests")


class HealthRules(msgspec.Struct, frozen=True, kw_only=True):
    """What the health of a release must keep. `abort` and `pause`: the tests whose finding does so; one that is in neither is not made.

    `latency_ratio`, `error_ratio`: how much worse than before is allowed. `drift`: how much further from its past than usual a device's
    classes or confidence may be. `disagreement`: which share of a device's compared answers may differ. `requests`, `rows`, `errors_of`: from
    how many on a device gives a sample: of latency, of outputs, of errors. `patience_s`: after so long at work a tenth of that is enough.
    `devices`: a finding needs samples from so many. `require`: without them a wave does not pass, of errors and of latency where both are tested.
    """

    abort: tuple[HealthTest, ...] = (HealthTest.ERRORS, HealthTest.UNUSABLE, HealthTest.LATENCY)
    pause: tuple[HealthTest, ...] = (HealthTest.CLASSES, HealthTest.CONFIDENCE, HealthTest.AGREEMENT)
    confidence: float = 0.99
    latency_ratio: float = 1.1
    error_ratio: float = 1.2
    drift: float = 0.1
    disagreement: float = 0.1
    requests: int = 200
    rows: int = 200
    errors_of: int = 1000
    patience_s: float = 3600.0
    devices: int = 3
    require: bool = False

    def __post_init__(self) -> None:
        if set(self.abort) & set(self.pause):
            raise ValueError("health: a test is in abort or in pause, not in both")
        if len({*self.abort, *self.pause}) < len(self.abort) + len(self.pause):
            raise ValueError("health: abort and pause name each test once")
        if not 0.5 <= self.confidence < 1:
            raise ValueError("health.confidence must be from 0.5 to below 1")
        if not (1 <= self.latency_ratio <= 100 and 1 <= self.error_ratio <= 100):
            raise ValueError("health.latency_ratio and health.error_ratio must be from 1 to 100")
        if not (0 <= self.drift < 1 and 0 <= self.disagreement < 1):
            raise ValueError("health.drift and health.disagreement must be from 0 to below 1")
        if min(self.requests, self.rows, self.errors_of, self.devices) < 1 or not self.patience_s >= 0:
            raise ValueError("health.requests, rows, errors_of and devices must be at least 1, patience_s not negative")

    @property
    def tests(self) -> tuple[HealthTest, ...]:
        return tuple(test for test in HealthTest if test in self.abort or test in self.pause)

    def enough(self, test: HealthTest, of: int, worked_s: float) -> bool:
        """Whether a device that did `of` in `worked_s` seconds gives its sample of `test` now."""
        least = self.errors_of if test is HealthTest.ERRORS else self.requests if test is HealthTest.LATENCY else self.rows
        return of >= least or (worked_s >= self.patience_s and of >= max(1, least // 10))


class Finding(msgspec.Struct, frozen=True):
    """What a test says by now. `worse`: devices that are worse than their own past by more than is allowed; `figure`: the ratio of errors
    of all devices to before, or the median over devices of what the test compares; `found`: whether the test is through, at
    `confidence` (of the verdict as a whole: it takes into account how many tests are made).
    """

    test: HealthTest
    devices: int
    worse: int
    figure: float | None
    log_e: float
    found: bool
    confidence: float


class HealthVerdict(msgspec.Struct, frozen=True):
    action: Action
    why: str
    findings: tuple[Finding, ...] = ()


class Health:
    """The samples of one rollout of one model, taken in one by one. What a sample costs does not depend on how many there were.

    `shares`: how many models of a team share the alpha.
    """

    def __init__(self, rules: HealthRules, *, shares: int = 1) -> None:
        self.rules = rules
        self.taken = 0
        self._seen: set[tuple[str, HealthTest]] = set()
        self._parts = max(1, len(rules.tests) * shares)
        self._bets: dict[HealthTest, _Coin | _Events] = {
            test: _Events(rules.error_ratio) if test in COUNTED else _Coin(test, rules) for test in rules.tests
        }

    def add(self, sample: Sample) -> None:
        """A second sample of a device in the same test, and one of a test that is not made, change nothing."""
        bet = self._bets.get(sample.test)
        if bet is None or (sample.device, sample.test) in self._seen:
            return
        self._seen.add((sample.device, sample.test))
        bet.add(sample)
        if bet.devices >= self.rules.devices:
            bet.peak = max(bet.peak, bet.log_e)
        self.taken += 1

    def verdict(self) -> HealthVerdict:
        findings = tuple(self._finding(test, bet) for test, bet in self._bets.items())
        through = [one for one in findings if one.found]
        for action, tests in ((Action.ABORT, self.rules.abort), (Action.PAUSE, self.rules.pause)):
            said = [_said(one, self.rules) for one in through if one.test in tests]
            if said:
                return HealthVerdict(action, "; ".join(said), findings)
        most = max((one.devices for one in findings), default=0)
        known = _known(findings)
        if self.rules.require and known < self.rules.devices:
            return HealthVerdict(Action.HOLD, f"health of {known} devices known, {self.rules.devices} needed", findings)
        why = f"health of {most} devices: nothing found" if most else "nothing is known of the devices' health"
        return HealthVerdict(Action.PROMOTE, why, findings)

    def _finding(self, test: HealthTest, bet: _Coin | _Events) -> Finding:
        surprise = bet.peak - math.log(self._parts)  # the alpha at which it would just be found
        confidence = -math.expm1(-surprise) if surprise > 0 else 0.0
        return Finding(test, bet.devices, bet.worse, bet.figure, bet.peak, confidence >= self.rules.confidence, confidence)


def judge(samples: Iterable[Sample], rules: HealthRules, *, shares: int = 1) -> HealthVerdict:
    """The verdict after all of these samples, in their order."""
    health = Health(rules, shares=shares)
    for sample in samples:
        health.add(sample)
    return health.verdict()


class _Coin:
    """Bets that more than half of the devices are worse."""

    def __init__(self, test: HealthTest, rules: HealthRules) -> None:
        self._test, self._rules = test, rules
        self._figures: list[float] = []
        self.devices = self.worse = 0
        self.peak = self.log_e = 0.0

    def add(self, sample: Sample) -> None:
        figure, limit = self._compare(sample)
        bisect.insort(self._figures, figure)
        self.devices += 1
        self.worse += figure > limit
        self.log_e = sequential.log_e_above(0.5, self.worse, self.devices)

    @property
    def figure(self) -> float | None:
        return self._figures[len(self._figures) // 2] if self._figures else None

    def _compare(self, sample: Sample) -> tuple[float, float]:
        rules = self._rules
        if self._test is HealthTest.LATENCY:
            return (sample.now / sample.before if sample.before else 1.0), rules.latency_ratio
        if self._test is HealthTest.AGREEMENT:
            return sample.now / sample.of_now, rules.disagreement
        return sample.now - sample.before, rules.drift


class _Events:
    """Bets that errors are more than `ratio` times as frequent as before, by one factor in all devices."""

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._logs = [0.0] * len(RATIOS)
        self._above = self._below = 0.0
        self.devices = self.worse = 0
        self.peak = self.log_e = 0.0

    def add(self, sample: Sample) -> None:
        share = sample.of_now / sample.of_before
        allowed = self._ratio * share / (self._ratio * share + 1.0)
        bound = -math.log(allowed)  # of one event that fell into now
        for at, more in enumerate(RATIOS):
            expected = self._ratio * more * share
            likelier = sample.now * math.log(expected / (1.0 + expected) / allowed)
            likelier -= sample.before * (math.log1p(expected) + math.log1p(-allowed))  # events before speak against it
            self._logs[at] += math.log1p(STAKE * math.expm1(min(likelier, bound)))
        largest = max(self._logs)
        self.log_e = largest + math.log(math.fsum(math.exp(one - largest) for one in self._logs) / len(self._logs))
        both = sample.of_before + sample.of_now
        self._above += sample.now * sample.of_before / both  # Mantel and Haenszel's ratio, of all devices
        self._below += sample.before * sample.of_now / both
        self.devices += 1
        self.worse += sample.now > self._ratio * sample.before * share

    @property
    def figure(self) -> float | None:
        return self._above / self._below if self._below else None


def _known(findings: Sequence[Finding]) -> int:
    """Of how many devices enough is known: of requests both errors and latency, where these tests are made; or that it agrees."""
    of_requests = [one.devices for one in findings if one.test in {HealthTest.ERRORS, HealthTest.LATENCY}]
    others = [one.devices for one in findings if one.test is HealthTest.AGREEMENT or not of_requests]
    return max(min(of_requests, default=0), max(others, default=0))


def _said(one: Finding, rules: HealthRules) -> str:
    figure = "from none" if one.figure is None else f"{one.figure:.2f}"
    what = {
        HealthTest.ERRORS: f"errors are {figure} times as frequent as before ({rules.error_ratio:g} allowed)",
        HealthTest.UNUSABLE: f"answers that are no numbers are {figure} times as frequent as before ({rules.error_ratio:g} allowed)",
        HealthTest.LATENCY: f"the median latency is {figure} times each device's own ({rules.latency_ratio:g} allowed)",
        HealthTest.CLASSES: f"the mix of classes moved by {figure} more than usual ({rules.drift:g} allowed)",
        HealthTest.CONFIDENCE: f"the confidence moved by {figure} more than usual ({rules.drift:g} allowed)",
        HealthTest.AGREEMENT: f"{figure} of the answers differ from those that serve ({rules.disagreement:g} allowed)",
    }[one.test]
    sure = "more than 99.99%" if one.confidence > 0.9999 else f"{one.confidence:.2%}"
    return f"{what}, worse on {one.worse} of {one.devices} devices, with {sure} confidence"
