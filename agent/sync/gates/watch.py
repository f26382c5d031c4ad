"""The watch that follows an activation. Pure: samples of what `serve` says go in, one verdict comes out.

Rules, in the order they are judged:
 1. Crashes of `serve` count against the release: a life that did not end in order (see `agent.lives`), or no answer for
    SERVE_GONE_S. A reboot of the machine or another version of the agent explains a new instance and is not a crash; nor is one
    whose forerunner noted its end. While `serve` is stopped in order nothing is watched, and no time passes. Where nothing is
    known of its lives, another instance in the same boot is a crash.
 2. The share of failed requests may exceed the device's own baseline by `max_error_ratio_increase`, once enough were answered.
    Requests refused as invalid count, because a release that narrows what it accepts breaks its callers; without a baseline to
    compare with (a first release) they do not, because nobody knows then how callers behave.
 3. p95 may be `max_p95_ratio` times the baseline's, once enough were answered on both sides.
 4. `serve` saying for SERVE_GONE_S that another release is active means that this one is not there to be watched.
 5. It commits after `duration_s` with `min_requests` answered, or after `max_duration_s` however quiet it was; never while
    `serve` does not answer, and never while `serve` says that another release is active.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from agent.contract.acceptance import WatchRules
from agent.contract.codec import Document
from agent.contract.reasons import Reason
from agent.lives import Life, crashed, ended_with_its_boot, stopped

MOST = 0.5
"""Above this share of failures a release goes when its longest watch ends, even with too few requests to judge by its own
rules."""

SERVE_GONE_S = 30.0
"""No answer for this long is a crash even if the process is not seen to come back. systemd restarts it within 1 to 5 s; loading
a large engine takes up to 20 s more."""

LATENCY_FLOOR_MS = 1.0
"""Below this a p95 is never called slow: a cold cache makes a 20 µs model five times slower for its first hundred requests."""


class Stats(Document, frozen=True, kw_only=True):
    """Counts of one version since its load, as `serve` keeps them. `counts` has one more entry than `bounds_ms`."""

    ok: int = 0
    invalid: int = 0
    run: int = 0
    unavailable: int = 0
    bounds_ms: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()

    @property
    def broken(self) -> int:
        """Failures that are nobody's but ours."""
        return self.run + self.unavailable

    @property
    def failed(self) -> int:
        return self.invalid + self.broken

    @property
    def answered(self) -> int:
        return self.ok + self.failed

    def plus(self, other: Stats) -> Stats:
        """The sum of two lives of the same version."""
        same = self.bounds_ms == other.bounds_ms and len(self.counts) == len(other.counts)
        return Stats(
            ok=self.ok + other.ok,
            invalid=self.invalid + other.invalid,
            run=self.run + other.run,
            unavailable=self.unavailable + other.unavailable,
            bounds_ms=other.bounds_ms,
            counts=tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)) if same else other.counts,
        )


class Sample(msgspec.Struct, frozen=True):
    """What `serve` said just now. `stats` None: the watched version is not among those it has."""

    instance: str
    agent_version: str
    active: int | None
    stats: Stats | None


class Watched(Document, frozen=True, kw_only=True):
    """The memory of a watch, persisted so that it survives a restart of `sync`. `earlier` adds up lives of `serve` that
    ended.
    """

    baseline: Stats | None
    instance: str
    agent_version: str
    boot: str
    elapsed_s: float = 0.0
    away_s: float = 0.0
    elsewhere_s: float = 0.0
    """For how long `serve` has answered that another release is active."""
    gone: bool = False
    crashes: int = 0
    earlier: Stats = Stats()
    current: Stats = Stats()
    could_report: bool = False
    """Whether the device could be heard by the fleet when the release began to serve."""
    passed_s: float | None = None
    """At which `elapsed_s` it had passed, while the report that says so is still on its way."""

    @property
    def total(self) -> Stats:
        return self.earlier.plus(self.current)


class Keep(msgspec.Struct, frozen=True):
    """Go on watching."""


class Commit(msgspec.Struct, frozen=True):
    """It may stay."""

    message: str
    evidence: dict[str, float | str]


class RollBack(msgspec.Struct, frozen=True):
    """It must go."""

    reason: Reason
    message: str
    evidence: dict[str, float | str]


Verdict = Keep | Commit | RollBack


def observe(
    watched: Watched, release: int, sample: Sample | None, passed_s: float, boot: str, lives: Sequence[Life] = ()
) -> Watched:
    """The watch of `release` after `passed_s` more seconds and `sample` (None: `serve` did not answer)."""
    if boot != watched.boot:
        # The machine was restarted: whatever `serve` was before is gone without its fault.
        known = watched.instance if any(life.instance == watched.instance for life in lives) else ""
        watched = _new_life(msgspec.structs.replace(watched, boot=boot, away_s=0.0, gone=False), instance=known)
    if sample is None and stopped(lives, watched.instance):
        return watched
    watched = msgspec.structs.replace(watched, elapsed_s=watched.elapsed_s + passed_s)
    if sample is None:
        away_s = watched.away_s + passed_s
        crashed = away_s >= SERVE_GONE_S and not watched.gone
        return msgspec.structs.replace(
            watched, away_s=away_s, gone=watched.gone or crashed, crashes=watched.crashes + (1 if crashed else 0)
        )
    if sample.instance != watched.instance:
        crashes = watched.crashes + _crashes_before(sample, watched, lives)
        watched = _new_life(watched, sample.instance)
        watched = msgspec.structs.replace(watched, agent_version=sample.agent_version, crashes=crashes)
    elsewhere_s = 0.0 if sample.active == release else watched.elsewhere_s + passed_s
    return msgspec.structs.replace(
        watched, away_s=0.0, gone=False, elsewhere_s=elsewhere_s, current=sample.stats or watched.current
    )


def _crashes_before(sample: Sample, watched: Watched, lives: Sequence[Life]) -> int:
    """How many crashes lie between the instance that was watched and the one that answers now, those counted already left
    out.
    """
    found = crashed(lives, watched.instance, sample.instance)
    if found is None:
        found = (watched.instance,) if watched.instance else ()
    if sample.agent_version != watched.agent_version:
        found = tuple(instance for instance in found if instance != watched.instance)
    return max(0, len(found) - watched.gone)


def torn_away(watched: Watched, boot: str, lives: Sequence[Life]) -> bool:
    """Whether the machine went down since `serve` was last asked without ending `serve` in order: the supply, a kernel, or what
    the release did.
    """
    return boot != watched.boot and not ended_with_its_boot(lives, watched.instance)


def _new_life(watched: Watched, instance: str) -> Watched:
    return msgspec.structs.replace(watched, instance=instance, earlier=watched.total, current=Stats())


def judge(watched: Watched, rules: WatchRules, serving_it: bool) -> Verdict:
    """`serving_it`: `serve` just answered, and says that the watched version is active."""
    total, baseline = watched.total, watched.baseline
    evidence = _evidence(watched)
    if watched.crashes > rules.max_crashes:
        times = "once" if watched.crashes == 1 else f"{watched.crashes} times"
        return RollBack(
            Reason.SERVE_CRASHED,
            f"serve crashed {times} in {watched.elapsed_s:.0f} s, at most {rules.max_crashes} allowed",
            evidence,
        )
    if watched.elsewhere_s >= SERVE_GONE_S:
        message = f"serve has not had it active for {watched.elsewhere_s:.0f} s: it could not load it again, or somebody rolled back by hand"
        return RollBack(Reason.ACTIVATION_FAILED, message, evidence)
    ratio, allowed, enough = _error_ratio(total, baseline, rules)
    if enough and ratio > allowed:
        return RollBack(
            Reason.ERROR_RATIO,
            f"{ratio:.1%} of the requests failed, at most {allowed:.1%} allowed (baseline plus {rules.max_error_ratio_increase:.1%})",
            evidence,
        )
    slow = _too_slow(total, baseline, rules)
    if slow:
        return RollBack(Reason.LATENCY_RATIO, slow, evidence)
    last_chance = watched.elapsed_s >= rules.max_duration_s
    if last_chance and ratio > max(allowed, MOST):
        message = f"{ratio:.1%} of only {total.answered} requests failed in {watched.elapsed_s:.0f} s"
        return RollBack(Reason.ERROR_RATIO, message, evidence)
    # A release that fails its few callers does not become good because time passed: it is watched until there are enough.
    enough_time = watched.elapsed_s >= rules.duration_s and total.answered >= rules.min_requests and ratio <= allowed
    if serving_it and (enough_time or last_chance):
        return Commit(f"watched {watched.elapsed_s:.0f} s and {total.answered} requests", evidence)
    return Keep()


def _error_ratio(total: Stats, baseline: Stats | None, rules: WatchRules) -> tuple[float, float, bool]:
    """The share of failures, the share allowed, and whether there were enough requests to judge."""
    if baseline is None or baseline.answered == 0:
        failed, answered, usual = total.broken, total.ok + total.broken, 0.0
    else:
        failed, answered, usual = total.failed, total.answered, baseline.failed / baseline.answered
    ratio = failed / answered if answered else 0.0
    return ratio, usual + rules.max_error_ratio_increase, answered >= rules.min_requests_to_judge


def _too_slow(total: Stats, baseline: Stats | None, rules: WatchRules) -> str | None:
    if baseline is None or min(sum(total.counts), sum(baseline.counts)) < rules.min_requests_to_judge:
        return None
    now, before = p95_ms(total), p95_ms(baseline)
    if now is None or before is None or now < LATENCY_FLOOR_MS or now <= before * rules.max_p95_ratio:
        return None
    return f"p95 is {now:.3g} ms, {now / before:.1f} times the {before:.3g} ms of the release before; at most {rules.max_p95_ratio:g} times allowed"


def p95_ms(stats: Stats) -> float | None:
    """The 95th percentile, by straight line inside its histogram bucket; None without requests. Beyond the last bound: that
    bound.
    """
    return percentile(stats.bounds_ms, stats.counts, 0.95)


def percentile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    total = sum(counts)
    if not total or len(counts) != len(bounds) + 1:
        return None
    rank, below = share * total, 0
    for index, count in enumerate(counts):
        if count and below + count >= rank:
            if index == len(bounds):
                break
            low = bounds[index - 1] if index else 0.0
            return low + (bounds[index] - low) * (rank - below) / count
        below += count
    return bounds[-1] if bounds else None


def _evidence(watched: Watched) -> dict[str, float | str]:
    total = watched.total
    evidence: dict[str, float | str] = {
        "watched_s": round(watched.elapsed_s, 1),
        "requests": total.answered,
        "failed": total.failed,
        "crashes": watched.crashes,
    }
    for name, stats in (("p95_ms", total), ("baseline_p95_ms", watched.baseline)):
        if stats is not None and (value := p95_ms(stats)) is not None:
            evidence[name] = round(value, 4)
    if watched.baseline is not None:
        evidence["baseline_requests"] = watched.baseline.answered
        evidence["baseline_failed"] = watched.baseline.failed
    return evidence
