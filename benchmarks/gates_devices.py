"""Fleets for `benchmarks.gates`: what each device is going to answer, and when."""

from __future__ import annotations

import functools

import msgspec
import numpy as np

from fleet_server.rollouts.health import HealthTest, Sample

TIME_LIMIT_MIN = 60.0
"""After it a device that is there counts as timed out."""

SILENCE_MIN = 3.0
"""After it a device that says nothing counts as gone: `rollouts.silence_s`."""

UPDATE_MIN = 8.0
"""What an update takes in the mean; failures and commits alike, which is hard on gates: failures come sooner."""


class Scenario(msgspec.Struct, frozen=True):
    """`good`: the release ought to come to everyone; `bad`: the rollout ought to be stopped, or to leave the class out."""

    name: str
    refusing: float = 0.005
    lost: float = 0.0
    lying: float = 0.0
    cloned: float = 0.0
    flapping: float = 0.0
    slower: float = 1.0
    bad_class: bool = False
    site_down: bool = False
    latency: float = 0.0
    errors: float = 0.0
    drift: float = 0.0
    good: bool = True

    @property
    def is_about_health(self) -> bool:
        """Whether devices that commit say how the release does on them: then all that were told are harmed by a bad one."""
        return bool(self.latency or self.errors or self.drift)


SCENARIOS = (
    Scenario("all well (0.5 % refuse)"),
    Scenario("1 % refuse", refusing=0.01),
    Scenario("2 % refuse", refusing=0.02),
    Scenario("3 % refuse", refusing=0.03),
    Scenario("6 % refuse", refusing=0.06, good=False),
    Scenario("10 % refuse", refusing=0.10, good=False),
    Scenario("30 % refuse", refusing=0.30, good=False),
    Scenario("all refuse", refusing=1.0, good=False),
    Scenario("5 % lost", lost=0.05),
    Scenario("30 % lost", lost=0.30, good=False),
    Scenario("slow (ten times)", slower=10.0),
    Scenario("one hardware class in ten bad", bad_class=True, good=False),
    Scenario("a site's uplink down for an hour", site_down=True),
    Scenario("10 % flap", flapping=0.10),
    Scenario("3 % lie (serve other bytes)", lying=0.03),
    Scenario("3 % are clones", cloned=0.03),
    Scenario("latency as before", latency=1.0),
    Scenario("latency + 10 % (allowed)", latency=1.10),
    Scenario("latency + 50 %", latency=1.50, good=False),
    Scenario("errors 0.3 to 0.6 %", errors=0.006, good=False),
    Scenario("class mix shifted by a fifth", drift=0.20, good=False),
)  # fmt: skip


class Fleet(msgspec.Struct, frozen=True):
    """Devices in the order of their slots. `here`: it is there when it is told; `kind`: good, refuses, lost, lying, cloned; `takes`: minutes from
    when it was told to its answer; `flaps`: it is gone for some minutes meanwhile; `group`: its hardware class; `site`: of ten.
    """

    here: list[bool]
    kind: list[str]
    takes: list[float]
    flaps: list[bool]
    group: list[int]
    site: list[int]
    down: tuple[int, float, float] | None
    """A site whose devices are not heard from a minute on until another."""
    harms: bool
    """Whether the release harms every device that is told."""
    samples: list[tuple[Sample, ...]]
    """What each device says of the release's health once it committed; nothing where the scenario is not about it."""


@functools.lru_cache(maxsize=2000)
def fleet(scenario: Scenario, devices: int, seed: int) -> Fleet:
    rng = np.random.default_rng(seed)
    here = rng.random(devices) >= 0.2
    draw = rng.random(devices)
    takes = rng.exponential(UPDATE_MIN * scenario.slower, devices)
    flaps = rng.random(devices) < scenario.flapping
    group, site = rng.integers(0, 10, devices), rng.integers(0, 10, devices)
    starts = float(rng.uniform(0, 60))
    edges = np.cumsum([scenario.refusing, scenario.lost, scenario.lying, scenario.cloned])
    names = ("refuses", "lost", "lying", "cloned", "good")
    kind = [names[int(np.searchsorted(edges, one, side="right"))] for one in draw]
    if scenario.bad_class:
        kind = ["refuses" if one == 0 else old for one, old in zip(group, kind, strict=True)]
    return Fleet(
        here.tolist(), kind, np.minimum(takes, TIME_LIMIT_MIN * 5).tolist(), flaps.tolist(), group.tolist(), site.tolist(),
        (0, starts, starts + 60.0) if scenario.site_down else None,
        scenario.is_about_health and not scenario.good,
        [_samples(scenario, rng, number) for number in range(devices)] if scenario.is_about_health else [()] * devices,
    )  # fmt: skip


def _samples(scenario: Scenario, rng: np.random.Generator, number: int) -> tuple[Sample, ...]:
    """Of a device whose own latency is anything from a tenth of the others' to ten times theirs, and so are its errors."""
    device, before, now = f"d{number}", 5000, 1000
    latency, errs = rng.lognormal(1.0, 1.0), 0.003 * rng.lognormal(0.0, 0.8)
    later = latency * (scenario.latency or 1.0) * rng.lognormal(0.0, 0.15)
    worse = errs * ((scenario.errors or 0.003) / 0.003)
    usual = float(rng.uniform(0.02, 0.08))
    moved = max(0.0, usual + scenario.drift + float(rng.normal(0.0, 0.03)))
    return (
        Sample(device, HealthTest.LATENCY, float(latency), float(later), before, now),
        Sample(device, HealthTest.ERRORS, float(rng.binomial(before, min(1, errs))), float(rng.binomial(now, min(1, worse))), before, now),
        Sample(device, HealthTest.CLASSES, usual, moved, before, now),
    )  # fmt: skip
