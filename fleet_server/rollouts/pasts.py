"""What a device did with a release, kept so that another one can be compared with it, and the samples that come of it. Pure.

A device's past with a release is what it did in the present window of time and in the one before (days, so that each has the same hours);
what is older is forgotten. How far these two are from each other says how much its answers change without a change of release. Beside them
stands what it did since it came to the release last: its present stay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import msgspec

from agent.contract import codec
from agent.contract.telemetry import Figures, median_ms, shares_apart
from fleet_server.rollouts.health import HealthRules, HealthTest, Sample


class Past(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`window`: the number of the present window; `present`, `before`: what was done in it and in the one before; `stay`: since the device
    came to the release, in `worked_s` seconds of telemetry.
    """

    window: int = 0
    present: Figures = Figures()
    before: Figures = Figures()
    stay: Figures = Figures()
    worked_s: float = 0.0

    @property
    def figures(self) -> Figures:
        """Of both windows."""
        return self.present.plus(self.before)

    def plus(self, figures: Figures, seconds: float, window: int, *, comes: bool) -> Past:
        """With what was done in a window. `comes`: the device has come (back) to the release."""
        present, before = self.present, self.before
        if window > self.window:
            present, before = Figures(), present if window == self.window + 1 else Figures()
        return Past(
            window=max(window, self.window), present=present.plus(figures), before=before, stay=figures if comes else self.stay.plus(figures),
            worked_s=seconds if comes else self.worked_s + seconds,
        )  # fmt: skip


def read(stored: Any) -> Past:
    """Raises: msgspec.ValidationError."""
    return codec.convert(stored, Past, str_keys=True)


def stored(value: object) -> Any:
    """As it stands in a column."""
    return msgspec.to_builtins(value, str_keys=True)


def samples(
    device: str, rules: HealthRules, now: Past, others: Iterable[Past], taken: Collection[HealthTest]
) -> Iterator[Sample]:
    """What the device says by now in the tests in which it has said nothing yet. `others`: its pasts with other releases, the last one
    first; the first that has enough is what it is compared with.
    """
    known = list(others)
    for test in rules.tests:
        if test in taken:
            continue
        if test is HealthTest.AGREEMENT:
            if rules.enough(test, now.stay.compared, now.worked_s):
                yield Sample(device, test, 0.0, float(now.stay.differ), 0, now.stay.compared)
            continue
        amount = _amount(test, now.stay)
        before = next((one for one in known if rules.enough(test, _amount(test, one.figures), now.worked_s)), None)
        if before is not None and rules.enough(test, amount, now.worked_s):
            compared = _compared(test, now.stay, before)
            if compared is not None:
                yield Sample(device, test, *compared, _amount(test, before.figures), amount)


def _amount(test: HealthTest, figures: Figures) -> int:
    """Of what there must be enough."""
    if test is HealthTest.ERRORS:
        return figures.requests
    if test is HealthTest.LATENCY:
        return figures.ok
    return figures.rows if test is HealthTest.UNUSABLE else sum(figures.classes.values())


def _compared(test: HealthTest, now: Figures, before: Past) -> tuple[float, float] | None:
    """Before and now; None where that says nothing."""
    whole = before.figures
    if test is HealthTest.ERRORS:
        return float(whole.errors), float(now.errors)
    if test is HealthTest.UNUSABLE:
        return float(whole.unusable), float(now.unusable)
    if test is HealthTest.LATENCY:
        then, since = median_ms(whole.latency), median_ms(now.latency)
        return (then, since) if then is not None and since is not None else None
    name = "classes" if test is HealthTest.CLASSES else "confidence"
    if not getattr(before.before, name) or not getattr(before.present, name):
        return None  # how much it changes by itself is not known yet
    own = shares_apart(getattr(before.before, name), getattr(before.present, name))
    return own, shares_apart(getattr(whole, name), getattr(now, name))
