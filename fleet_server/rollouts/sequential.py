"""Whether something happens to more, or to less, than a share of the devices: tests that may be looked at after every report. Pure.

The answer is an e-value: how much likelier what was seen is under a mixture of other shares than under the share itself. While the truth is
no larger (no smaller), it is a supermartingale that begins at 1, so the chance that it ever reaches 1/alpha is at most alpha (Ville's
inequality), however often somebody looks. A test for a sample of fixed size, looked at after each report, would say yes sooner or later of every
good release.

The mixture is even over odds that grow evenly in their logarithm, so that a share a little too large is found nearly as soon as by somebody who
knew it. Whatever mixture is chosen before looking keeps the bound; it decides only how soon something is found.
"""

from __future__ import annotations

import functools
import math

ALTERNATIVES = 48
LEAST, MOST = 1.15, 400.0
"""The smallest and the largest ratio of an alternative's odds to those of the share; the other way round where less is looked for."""


def is_above(share: float, hits: int, of: int, confidence: float) -> bool:
    """Whether it happens to more than `share` (above 0, below 1) of all devices, when it happened to `hits` of `of`. `confidence`: of all rollouts
    in which it does not, at most 1 - confidence are ever told that it does.
    """
    return hits > share * of and log_e_above(share, hits, of) >= -math.log1p(-confidence)


def is_below(share: float, hits: int, of: int, confidence: float) -> bool:
    """Whether it happens to less than `share` of all devices: of all rollouts in which it does not, at most 1 - confidence are ever told so."""
    return hits < share * of and log_e_below(share, hits, of) >= -math.log1p(-confidence)


def log_e_above(share: float, hits: int, of: int) -> float:
    """The logarithm of the e-value against "it happens to `share` at most"."""
    return _log_e(_alternatives(share, above=True), hits, of)


def log_e_below(share: float, hits: int, of: int) -> float:
    """The logarithm of the e-value against "it happens to `share` at least"."""
    return _log_e(_alternatives(share, above=False), hits, of)


def _log_e(alternatives: tuple[tuple[float, float], ...], hits: int, of: int) -> float:
    if not 0 <= hits <= of:
        raise ValueError(f"{hits} of {of} devices cannot be")
    logs = [hits * does + (of - hits) * does_not for does, does_not in alternatives]
    largest = max(logs)
    return largest + math.log(math.fsum(math.exp(one - largest) for one in logs) / len(logs))


@functools.lru_cache(maxsize=64)
def _alternatives(share: float, *, above: bool) -> tuple[tuple[float, float], ...]:
    """The logarithms of how much likelier each alternative makes a device that it happens to, and one that it does not."""
    if not 0.0 < share < 1.0:
        raise ValueError(f"a share to test against is above 0 and below 1, not {share}")
    ratios = [LEAST * (MOST / LEAST) ** (step / (ALTERNATIVES - 1)) for step in range(ALTERNATIVES)]
    all_odds = [share / (1.0 - share) * (ratio if above else 1.0 / ratio) for ratio in ratios]
    return tuple((math.log(one / (1.0 + one) / share), -math.log1p(one) - math.log1p(-share)) for one in all_odds)
