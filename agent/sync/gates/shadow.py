"""A release on copies of live requests, judged. Pure: numbers of `serve` go in, one verdict comes out.

Rules, in the order they are judged:
 1. Crashes of `serve` count against the release, as in a watch: it runs in the same process.
 2. What `serve` gave up (a run that never ended, failure after failure) is refused.
 3. Once `min_samples` were tried: the share of failed runs, the share of samples that agree, flips of the best class, the ratio
    of times.
 4. It ends well after `duration_s` with `min_samples`, or after `max_duration_s` with fewer, unless most of those few went
    wrong.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from agent.contract.acceptance import ShadowRules
from agent.contract.codec import Document
from agent.contract.reasons import Reason
from agent.sync.gates.watch import LATENCY_FLOOR_MS, MOST, Commit, Keep, RollBack, Verdict, Watched, percentile

Evidence = dict[str, float | str]


class ShadowCounts(Document, frozen=True, kw_only=True):
    """What came of copies since a shadow began; sums of several add up. Times are totals over `pairs`; `counts` has one more
    than `bounds`.
    """

    samples: int = 0
    agreed: int = 0
    rows: int = 0
    flips: int = 0
    errors: int = 0
    dropped: int = 0
    max_difference: float = 0.0
    pairs: int = 0
    live_ms: float = 0.0
    run_ms: float = 0.0
    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()

    @property
    def tried(self) -> int:
        return self.samples + self.errors

    @property
    def agreement(self) -> float:
        return self.agreed / self.samples if self.samples else 1.0

    @property
    def flip_ratio(self) -> float:
        return self.flips / self.rows if self.rows else 0.0

    @property
    def error_ratio(self) -> float:
        return self.errors / self.tried if self.tried else 0.0

    @property
    def latency_ratio(self) -> float | None:
        return percentile(self.bounds, self.counts, 0.5)

    @property
    def run_mean_ms(self) -> float:
        return self.run_ms / self.pairs if self.pairs else 0.0

    def plus(self, other: ShadowCounts) -> ShadowCounts:
        bounds, counts = other.bounds or self.bounds, other.counts or self.counts
        if self.counts and other.counts and self.bounds == other.bounds:
            counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        sums = ("samples", "agreed", "rows", "flips", "errors", "dropped", "pairs", "live_ms", "run_ms")
        return msgspec.structs.replace(
            other,
            **{name: getattr(self, name) + getattr(other, name) for name in sums},
            max_difference=max(self.max_difference, other.max_difference),
            bounds=bounds,
            counts=counts,
        )


class Shadowed(Document, frozen=True, kw_only=True):
    """The memory of a shadow, persisted so that it survives a restart of `sync`. `earlier` adds up those that ended with a life
    of `serve`.
    """

    watched: Watched
    earlier: ShadowCounts = ShadowCounts()
    current: ShadowCounts = ShadowCounts()
    throttled: str = ""
    verdict: Literal["running", "passed", "skipped"] = "running"
    message: str = ""
    evidence: Evidence = {}

    @property
    def total(self) -> ShadowCounts:
        return self.earlier.plus(self.current)

    def anew(self) -> Shadowed:
        """The memory after another shadow began, which counts from 0."""
        return msgspec.structs.replace(self, earlier=self.total, current=ShadowCounts())

    def ended(self, verdict: Literal["passed", "skipped"], message: str) -> Shadowed:
        return msgspec.structs.replace(self, verdict=verdict, message=message, evidence=evidence_of(self))


def judge(shadowed: Shadowed, rules: ShadowRules, given_up: str | None) -> Verdict:
    """`given_up`: why `serve` ended it by itself, if that is the release's fault."""
    watched, total, evidence = shadowed.watched, shadowed.total, evidence_of(shadowed)
    if watched.crashes > rules.max_crashes:
        times = "once" if watched.crashes == 1 else f"{watched.crashes} times"
        message = f"serve crashed {times} while it ran beside the active release, at most {rules.max_crashes} allowed"
        return RollBack(Reason.SERVE_CRASHED, message, evidence)
    if given_up is not None:
        slow = "has not ended" in given_up
        return RollBack(Reason.SHADOW_TOO_SLOW if slow else Reason.SHADOW_ERRORS, given_up, evidence)
    enough = total.tried >= rules.min_samples
    if enough and (broken := _broken(total, rules)) is not None:
        return RollBack(*broken, evidence)
    if watched.elapsed_s >= rules.max_duration_s and (wrong := _mostly_wrong(total, rules)) is not None:
        return RollBack(*wrong, evidence)
    if watched.elapsed_s >= rules.max_duration_s or (enough and watched.elapsed_s >= rules.duration_s):
        return Commit(f"{total.tried} requests run again in {watched.elapsed_s:.0f} s, {total.agreement:.1%} agree", evidence)
    return Keep()


def _broken(total: ShadowCounts, rules: ShadowRules) -> tuple[Reason, str] | None:
    if total.error_ratio > rules.max_error_ratio:
        message = (
            f"it failed {total.error_ratio:.1%} of {total.tried} copied requests, at most {rules.max_error_ratio:.1%} allowed"
        )
        return Reason.SHADOW_ERRORS, message
    if total.agreement < rules.min_agreement:
        message = f"{total.agreement:.1%} of {total.samples} answers agree, at least {rules.min_agreement:.1%} demanded"
        return Reason.SHADOW_DISAGREES, message
    if total.flip_ratio > rules.max_top1_flips:
        message = (
            f"{total.flip_ratio:.1%} of {total.rows} rows have another best class, at most {rules.max_top1_flips:.1%} allowed"
        )
        return Reason.SHADOW_DISAGREES, message
    ratio = total.latency_ratio
    if ratio is not None and ratio > rules.max_latency_ratio and total.run_mean_ms >= LATENCY_FLOOR_MS:
        message = f"it takes {ratio:.1f} times as long on the same inputs, at most {rules.max_latency_ratio:g} times allowed"
        return Reason.SHADOW_TOO_SLOW, message
    return None


def _mostly_wrong(total: ShadowCounts, rules: ShadowRules) -> tuple[Reason, str] | None:
    """Why it does not pass although there were too few samples for the rules; None when it may."""
    if total.tried == 0:
        return None
    if total.error_ratio > max(MOST, rules.max_error_ratio):
        return Reason.SHADOW_ERRORS, f"it failed {total.error_ratio:.1%} of only {total.tried} copied requests"
    if total.agreement < min(MOST, rules.min_agreement):
        return Reason.SHADOW_DISAGREES, f"{total.agreement:.1%} of only {total.samples} answers agree"
    return None


def evidence_of(shadowed: Shadowed) -> Evidence:
    total = shadowed.total
    evidence: Evidence = {
        "shadow_s": round(shadowed.watched.elapsed_s, 1),
        "samples": total.samples,
        "agreement": round(total.agreement, 4),
        "errors": total.errors,
        "dropped": total.dropped,
        "max_difference": round(total.max_difference, 6),
        "crashes": shadowed.watched.crashes,
    }
    if total.rows:
        evidence |= {"rows": total.rows, "top1_flips": round(total.flip_ratio, 4)}
    if (ratio := total.latency_ratio) is not None:
        evidence |= {"pairs": total.pairs, "latency_ratio": round(ratio, 3), "run_ms": round(total.run_mean_ms, 4)}
    if shadowed.throttled:
        evidence["throttled"] = shadowed.throttled
    return evidence
