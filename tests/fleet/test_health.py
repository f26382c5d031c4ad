"""Health of a release, judged from samples of devices: no false findings however often one looks, and what is worse is found."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable

import pytest

from fleet_server.rollouts import health
from fleet_server.rollouts.health import Action, Health, HealthRules, HealthTest, Sample

Fleet = Callable[[random.Random, int], Iterable[Sample]]


def latency(more: float) -> Fleet:
    def of(rng: random.Random, device: int) -> Iterable[Sample]:
        own = 10.0 * rng.lognormvariate(0, 1)  # some devices are much weaker than others
        yield Sample(f"d{device}", HealthTest.LATENCY, own, own * math.exp(rng.gauss(math.log1p(more), 0.15)), 1000, 1000)

    return of


def errors(before: float, now: float, burst: int = 1) -> Fleet:
    def of(rng: random.Random, device: int) -> Iterable[Sample]:
        own = rng.lognormvariate(0, 0.8)
        had = min(5000, burst * poisson(rng, 5000 * before * own / burst))
        has = min(1000, burst * poisson(rng, 1000 * now * own / burst))
        yield Sample(f"d{device}", HealthTest.ERRORS, had, has, 5000, 1000)

    return of


def drift(moved: float, unrest: float) -> Fleet:
    def of(rng: random.Random, device: int) -> Iterable[Sample]:
        own, now = abs(rng.gauss(0, unrest)), abs(rng.gauss(0, unrest))
        yield Sample(f"d{device}", HealthTest.CLASSES, min(1.0, own), min(1.0, now + moved), 1000, 1000)

    return of


def poisson(rng: random.Random, mean: float) -> int:
    count, left = 0, mean - rng.expovariate(1.0)
    while left > 0:
        count, left = count + 1, left - rng.expovariate(1.0)
    return count


def devices_needed(fleet: Fleet, seed: int, devices: int, rules: HealthRules | None = None) -> int | None:
    """After how many devices something is found, looking after each; None when it never is."""
    rng, seen = random.Random(seed), Health(rules or HealthRules())
    for device in range(devices):
        for sample in fleet(rng, device):
            seen.add(sample)
        if seen.verdict().action is not Action.PROMOTE:
            return device + 1
    return None


@pytest.mark.parametrize(
    ("fleet", "most"),
    [
        pytest.param(latency(0.0), 0, id="latency the same"),
        pytest.param(latency(0.05), 0, id="latency +5 %"),
        pytest.param(latency(0.10), 1, id="latency +10 %, which is allowed"),
        pytest.param(errors(0.003, 0.003), 0, id="errors the same"),
        pytest.param(errors(0.003, 0.0036), 1, id="errors at the allowed ratio"),
        pytest.param(errors(0.003, 0.003, burst=50), 1, id="errors in bursts of 50"),
        pytest.param(drift(0.0, 0.2), 0, id="a mix of classes that is never at rest"),
    ],
)
def test_a_release_that_is_no_worse_is_found_worse_in_at_most_one_of_a_hundred_rollouts(fleet: Fleet, most: int) -> None:
    assert sum(devices_needed(fleet, seed, 120) is not None for seed in range(60)) <= most


@pytest.mark.parametrize(
    ("fleet", "devices"),
    [
        pytest.param(latency(0.2), 110, id="latency +20 %"),
        pytest.param(latency(0.5), 16, id="latency +50 %"),
        pytest.param(errors(0.003, 0.006), 30, id="errors 0.3 to 0.6 %"),
        pytest.param(errors(0.0, 0.01), 8, id="errors none to 1 %"),
        pytest.param(errors(0.003, 0.006, burst=5), 40, id="errors 0.3 to 0.6 %, in bursts of 5"),
        pytest.param(drift(0.3, 0.05), 16, id="classes that moved"),
    ],
)
def test_what_is_worse_is_found(fleet: Fleet, devices: int) -> None:
    needed = [devices_needed(fleet, seed, 250) or 1000 for seed in range(31)]
    assert sorted(needed)[15] <= devices, sorted(needed)


def test_one_device_never_decides_whatever_happens_on_it() -> None:
    wild = Sample("d0", HealthTest.ERRORS, 0, 100_000, 100_000, 100_000)
    fine = [Sample(f"d{number}", HealthTest.ERRORS, 300, 300, 100_000, 100_000) for number in range(1, 10)]
    assert health.judge([wild, *fine], HealthRules()).action is Action.PROMOTE


def test_one_device_with_a_burst_before_does_not_hide_what_the_others_say() -> None:
    calm = Sample("d0", HealthTest.ERRORS, 5000, 0, 5000, 1000)
    worse = [Sample(f"d{number}", HealthTest.ERRORS, 15, 30, 5000, 1000) for number in range(1, 20)]
    assert health.judge([calm, *worse], HealthRules()).action is Action.ABORT


def test_a_device_says_its_part_once() -> None:
    slow = [Sample("d0", HealthTest.LATENCY, 10.0, 50.0, 1000, 1000)] * 50
    verdict = health.judge(slow, HealthRules())
    assert verdict.action is Action.PROMOTE
    assert [one.devices for one in verdict.findings if one.test is HealthTest.LATENCY] == [1]


def test_what_is_found_stays_found() -> None:
    slow = [Sample(f"d{number}", HealthTest.LATENCY, 10.0, 20.0, 1000, 1000) for number in range(30)]
    fast = [Sample(f"f{number}", HealthTest.LATENCY, 10.0, 10.0, 1000, 1000) for number in range(200)]
    assert health.judge([*slow, *fast], HealthRules()).action is Action.ABORT


def test_missing_telemetry_neither_passes_nor_fails_and_the_verdict_says_so() -> None:
    assert health.judge([], HealthRules()).why == "nothing is known of the devices' health"
    assert health.judge([], HealthRules()).action is Action.PROMOTE
    held = health.judge([], HealthRules(require=True))
    assert (held.action, held.why) == (Action.HOLD, "health of 0 devices known, 3 needed")


def test_where_health_is_required_both_errors_and_latency_must_be_known_or_agreement() -> None:
    rules = HealthRules(require=True)
    fast = [Sample(f"d{number}", HealthTest.LATENCY, 10.0, 10.0, 1000, 1000) for number in range(5)]
    right = [Sample(f"d{number}", HealthTest.ERRORS, 3, 3, 1000, 1000) for number in range(3)]
    agree = [Sample(f"d{number}", HealthTest.AGREEMENT, 0, 0, 0, 500) for number in range(3)]
    assert health.judge(fast, rules).action is Action.HOLD
    assert health.judge([*fast, *right[:2]], rules).why == "health of 2 devices known, 3 needed"
    assert health.judge([*fast, *right], rules).action is Action.PROMOTE
    assert health.judge(agree, rules).action is Action.PROMOTE
    assert health.judge(fast, HealthRules(require=True, abort=(HealthTest.LATENCY,))).action is Action.PROMOTE


def test_drift_pauses_and_worse_figures_abort() -> None:
    moved = [Sample(f"d{number}", HealthTest.CLASSES, 0.02, 0.5, 1000, 1000) for number in range(20)]
    slow = [Sample(f"d{number}", HealthTest.LATENCY, 10.0, 20.0, 1000, 1000) for number in range(20)]
    assert health.judge(moved, HealthRules()).action is Action.PAUSE
    verdict = health.judge([*moved, *slow], HealthRules())
    assert verdict.action is Action.ABORT
    assert (
        "the median latency is 2.00 times each device's own (1.1 allowed), worse on 20 of 20 devices, with more than 99.99% confidence"
        in verdict.why
    )


def test_the_alpha_is_shared_by_the_models_of_a_team() -> None:
    slow = [Sample(f"d{number}", HealthTest.LATENCY, 10.0, 20.0, 1000, 1000) for number in range(40)]
    alone, shared = (
        next(n for n in range(1, 41) if health.judge(slow[:n], HealthRules(), shares=s).action is Action.ABORT) for s in (1, 50)
    )
    assert alone < shared


def test_the_same_samples_give_the_same_verdict() -> None:
    rng = random.Random(1)
    samples = list(itertools.chain.from_iterable(errors(0.003, 0.006)(rng, device) for device in range(50)))
    assert health.judge(samples, HealthRules()) == health.judge(samples, HealthRules())


@pytest.mark.parametrize(
    "wrong",
    [
        {"confidence": 1.0}, {"confidence": math.nan}, {"latency_ratio": 0.5}, {"error_ratio": math.nan}, {"drift": 1.0}, {"devices": 0},
        {"patience_s": -1}, {"abort": (HealthTest.ERRORS,), "pause": (HealthTest.ERRORS,)}, {"abort": (HealthTest.ERRORS, HealthTest.ERRORS)},
    ],
)  # fmt: skip
def test_rules_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="health"):
        HealthRules(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", [(-1, 0, 1, 1), (math.nan, 0, 1, 1), (0, math.inf, 1, 1), (0, 0, 1, 0), (2, 0, 1, 1), (0, 2, 1, 1), (0, 0, 0, 1)]
)
def test_samples_that_cannot_be_are_refused(wrong: tuple[float, float, int, int]) -> None:
    with pytest.raises(ValueError, match=r"cannot be|more events"):
        Sample("d", HealthTest.ERRORS, *wrong)
