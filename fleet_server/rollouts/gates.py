"""What the devices of a wave answered, and what follows. Pure.

Only what a device signed counts, and only together with the digest that it really serves: a device that says "committed" and
serves other bytes is pending, not a success. Offline devices and failed downloads say nothing about a release and neither pass
nor stop it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import msgspec

from agent.contract.reports import Outcome, Phase


class Standing(str, Enum):
    """How one device stands to the release of a rollout."""

    COMMITTED = "committed"
    SHADOWED = "shadowed"
    REFUSED = "refused"
    FAILED = "failed"
    ROLLED_BACK = "rolled_back"
    PENDING = "pending"
    OFFLINE = "offline"


class Ruling(str, Enum):
    WAIT = "wait"
    PASS = "pass"  # noqa: S105 - a verdict
    FAIL = "fail"


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


class Counts(msgspec.Struct, frozen=True):
    committed: int = 0
    shadowed: int = 0
    refused: int = 0
    failed: int = 0
    rolled_back: int = 0
    pending: int = 0
    offline: int = 0

    @property
    def total(self) -> int:
        return self.committed + self.shadowed + self.refused + self.failed + self.rolled_back + self.pending + self.offline

    @property
    def failures(self) -> int:
        """How many answers say that the release is bad."""
        return self.refused + self.rolled_back


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


def standing(fact: Fact, *, shadow: bool = False) -> Standing:
    """How one device stands. A bad answer counts whether the device is still there or not; a good one counts only while the
    right bytes serve. `shadow`: the rollout has mode shadow, and a release that kept its rules beside what serves is a success.
    """
    if fact.outcome is Outcome.REFUSED:
        return Standing.REFUSED
    if fact.outcome is Outcome.ROLLED_BACK:
        return Standing.ROLLED_BACK
    if fact.serving_it and (fact.outcome is Outcome.COMMITTED or fact.phase is Phase.STEADY):
        return Standing.COMMITTED
    if shadow and fact.outcome is Outcome.SHADOWED:
        return Standing.SHADOWED
    if not fact.online:
        return Standing.OFFLINE
    if fact.outcome is Outcome.FAILED:
        return Standing.FAILED
    return Standing.PENDING


def judge(
    counts: Counts, evidence: Sequence[Witness], *, max_failures: int, min_devices: int = 1, shadow: bool = False
) -> Verdict:
    """The verdict on a wave whose devices stand like that: FAIL above `max_failures`; PASS when `min_devices` committed and no
    online device is still to answer. `evidence`: some of the devices, which the verdict names. `shadow`: the rollout has mode
    shadow, and devices need not commit to pass.
    """
    ruling, why = _rule(counts, max_failures, min_devices, "shadowed" if shadow else "committed")
    return Verdict(ruling, why, counts, tuple(evidence))


def _rule(counts: Counts, max_failures: int, min_devices: int, wish: str) -> tuple[Ruling, str]:
    if counts.failures > max_failures:
        bad = _say((counts.refused, "refused it"), (counts.rolled_back, "rolled back"))
        return Ruling.FAIL, f"{bad}; {max_failures or 'none'} allowed"
    if counts.pending or counts.failed:
        return Ruling.WAIT, _say((counts.pending, "still to answer"), (counts.failed, "could not fetch it"))
    good = _say((counts.committed, "committed"), (counts.shadowed, "shadowed")) or f"0 {wish}"
    if counts.committed + counts.shadowed < min_devices:
        return Ruling.WAIT, f"{good}; at least {min_devices} needed"
    left = f"; {counts.offline} offline" if counts.offline else ""
    return Ruling.PASS, f"{good}{left}"


def _say(*parts: tuple[int, str]) -> str:
    return ", ".join(f"{number} {text}" for number, text in parts if number)
