"""How many devices of a wave may be told by now. Pure.

A wave does not tell all of its devices at once: what would be found out with twenty devices should not be found out with a thousand. It tells
a few, and more as they answer, until what was heard says that the release is good; then it tells the rest. So devices are told in steps:

 1. UNHEARD devices may be told that have not answered yet, or three quarters as many as have answered, whichever is more.
 2. While failures, or devices that went missing, are so many that they speak for more than what is allowed of them, no more than CAREFUL
    devices may be told that have not answered yet.
 3. While so many went missing that the wave cannot pass, nobody more is told.
 4. Once failures are below TOLERABLE times what is allowed of them, with CONFIDENCE, the rest of the wave may be told.

A step is not a wave: nobody confirms it, and it has no gate of its own. A failing release is stopped by the wave's gate (`gates`), at any moment.
"""

from __future__ import annotations

from collections.abc import Sequence

from agent.contract.assignment import EVERYONE
from fleet_server.rollouts import sequential
from fleet_server.rollouts.gates import Counts, Rules

UNHEARD = 3
"""As many as exclude a hardware class by default (`rollouts.exclude_after`). A fleet of three has no steps."""

GROWTH = 1.75
CAREFUL = 2
TOLERABLE = 2.0
CONFIDENCE = 0.95
STEP = 5
"""A step tells a fifth of those that were told, at least: each one is signed, and read by every device."""


def may_be_told(counts: Counts, rules: Rules) -> int | None:
    """How many devices may be told, with those that are, when the devices of the wave stand like that; None: all of the wave."""
    if not rules.growth or rules.failure_share is None:
        return None
    heard = counts.heard
    if sequential.is_above(rules.missing_share, counts.missing, heard, rules.confidence):
        return counts.asked
    if _is_likely_above(rules.failure_share, counts.failures, heard) or _is_likely_above(
        rules.missing_share, counts.missing, heard
    ):
        return max(counts.asked, heard + CAREFUL)
    if sequential.is_below(TOLERABLE * rules.failure_share, counts.failures, heard, CONFIDENCE):
        return None
    most = max(heard + UNHEARD, int(GROWTH * heard))
    more = most - counts.asked
    return most if more >= 1 and STEP * more >= counts.asked else counts.asked


def next_reach(reach: int, ahead: Sequence[int], more: int | None) -> int:
    """The slot up to which a wave tells its devices, when it tells `more` devices that are there (None: all of them) and told those up to
    `reach`. `ahead`: for each slot, how many devices of the wave are there that were not told. At least one more is told where `more` is
    above 0, with those that share its slot; EVERYONE where nobody is left.
    """
    if more is None:
        return EVERYONE
    if more <= 0:
        return reach
    found = 0
    for slot in range(reach, EVERYONE):
        if found and ahead[slot] and found + ahead[slot] > more:
            return slot
        found += ahead[slot]
    return EVERYONE


def _is_likely_above(share: float, hits: int, of: int) -> bool:
    return hits > 0 and sequential.log_e_above(share, hits, of) >= 0.0
