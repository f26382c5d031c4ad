"""How often the health of devices stops a release, and after how many devices: python -m benchmarks.health [--seeds N]

Devices give their samples one after the other, and the verdict is looked at after each. Beside it the usual fixed-sample test of the same
signs at 99 %, looked at as often, which shows what looking costs.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable

import numpy as np

from fleet_server.rollouts.health import Action, Health, HealthRules, HealthTest, Sample

DEVICES = 300
Fleet = Callable[[np.random.Generator, str], Sample]


def latency(more: float) -> Fleet:
    """The ratio to a device's own past varies by 15 % from device to device."""
    return lambda rng, name: Sample(
        name, HealthTest.LATENCY, 10.0, 10.0 * math.exp(rng.normal(math.log1p(more), 0.15)), 1000, 1000
    )


def errors(before: float, now: float, burst: int = 1) -> Fleet:
    """5 000 requests before and 1 000 now; each device has an error rate of its own, and errors come in bursts."""

    def of(rng: np.random.Generator, name: str) -> Sample:
        own = rng.lognormal(0, 0.8)
        had, has = (min(n, burst * int(rng.poisson(n * rate * own / burst))) for n, rate in ((5000, before), (1000, now)))
        return Sample(name, HealthTest.ERRORS, had, has, 5000, 1000)

    return of


def drift(moved: float, unrest: float) -> Fleet:
    """Each device's mix is from itself by about `unrest` from day to day."""

    def of(rng: np.random.Generator, name: str) -> Sample:
        own, now = abs(rng.normal(0, unrest)), abs(rng.normal(0, unrest))
        return Sample(name, HealthTest.CLASSES, min(1.0, own), min(1.0, now + moved), 1000, 1000)

    return of


FLEETS: tuple[tuple[str, Fleet], ...] = (
    ("latency the same", latency(0.0)),
    ("latency +5 %", latency(0.05)),
    ("latency +10 %, which is allowed", latency(0.1)),
    ("latency +20 %", latency(0.2)),
    ("latency +50 %", latency(0.5)),
    ("errors 0.3 to 0.3 %", errors(0.003, 0.003)),
    ("errors 0.3 to 0.36 %, which is allowed", errors(0.003, 0.0036)),
    ("errors 0.3 to 0.3 %, in bursts of 5", errors(0.003, 0.003, 5)),
    ("errors 0.3 to 0.3 %, in bursts of 50", errors(0.003, 0.003, 50)),
    ("errors 0.3 to 0.36 %, in bursts of 5", errors(0.003, 0.0036, 5)),
    ("errors 0.3 to 0.6 %", errors(0.003, 0.006)),
    ("errors 0.3 to 0.6 %, in bursts of 5", errors(0.003, 0.006, 5)),
    ("errors 0.05 to 0.5 %", errors(0.0005, 0.005)),
    ("errors 0 to 1 %", errors(0.0, 0.01)),
    ("classes at rest", drift(0.0, 0.03)),
    ("classes never at rest", drift(0.0, 0.2)),
    ("classes moved by 0.3", drift(0.3, 0.03)),
)


def needed(fleet: Fleet, seed: int) -> int | None:
    """Devices until something is found; None: nothing in DEVICES."""
    rng, health = np.random.default_rng(seed), Health(HealthRules())
    for number in range(DEVICES):
        health.add(fleet(rng, f"d{number}"))
        if health.verdict().action is not Action.PROMOTE:
            return number + 1
    return None


def usual_alarms(seeds: int) -> int:
    """False alarms of a one-sided binomial test at 99 %, looked at after each device from the 10th on, when nothing is wrong."""
    found = 0
    for seed in range(seeds):
        signs = np.random.default_rng(seed).random(DEVICES) < 0.5
        n, worse = np.arange(1, DEVICES + 1), signs.cumsum()
        found += bool(((worse - n / 2) / np.sqrt(n / 4) > 2.326)[9:].any())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.health", description=__doc__)
    parser.add_argument("--seeds", type=int, default=300)
    seeds = parser.parse_args().seeds
    print("| fleet | found | devices until then, median |\n|---|---|---|")
    for name, fleet in FLEETS:
        all_needed = [needed(fleet, seed) for seed in range(seeds)]
        hits = [one for one in all_needed if one is not None]
        print(f"| {name} | {len(hits)} of {seeds} | {statistics.median(hits) if hits else '-'} |", flush=True)
    print(f"a usual test at 99 %, looked at after each device: {usual_alarms(seeds)} of {seeds} false alarms")


if __name__ == "__main__":
    main()
