"""A release that answers a share of the requests, judged against the active one over the same time. Pure.

The rules are those of a watch (`watch.judge`); what differs is the baseline, which grows along.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from agent.contract.acceptance import CanaryRules, WatchRules
from agent.contract.codec import Document
from agent.contract.reasons import Reason
from agent.lives import Life
from agent.sync.gates import watch
from agent.sync.gates.watch import RollBack, Sample, Stats, Verdict, Watched


class Canaried(Document, frozen=True, kw_only=True):
    """The memory of a canary, persisted so that it survives a restart of `sync`.

    `begun` is what the active version had counted when the canary began in this life of `serve`, `latest` what it counts now;
    `earlier` adds up what it did in lives that ended.
    """

    watched: Watched
    begun: Stats = Stats()
    latest: Stats = Stats()
    earlier: Stats = Stats()

    @property
    def beside(self) -> Stats:
        """What the active version answered meanwhile."""
        return self.earlier.plus(less(self.latest, self.begun))


def less(stats: Stats, begun: Stats) -> Stats:
    """What was counted since `begun`, of the same version in the same life; all of it when that was another one."""
    same = stats.bounds_ms == begun.bounds_ms and len(stats.counts) == len(begun.counts)
    counts = tuple(a - b for a, b in zip(stats.counts, begun.counts, strict=True)) if same else stats.counts
    if stats.answered < begun.answered or any(count < 0 for count in counts):
        return stats
    return Stats(
        ok=stats.ok - begun.ok,
        invalid=stats.invalid - begun.invalid,
        run=stats.run - begun.run,
        unavailable=stats.unavailable - begun.unavailable,
        bounds_ms=stats.bounds_ms,
        counts=counts,
    )


def observe(
    canaried: Canaried,
    release: int,
    sample: Sample | None,
    active: Stats | None,
    passed_s: float,
    boot: str,
    lives: Sequence[Life] = (),
) -> Canaried:
    """`sample` is of the candidate, `active` what the active version has counted; both None when `serve` did not answer."""
    watched = watch.observe(canaried.watched, release, sample, passed_s, boot, lives)
    if active is None:
        return msgspec.structs.replace(canaried, watched=watched)
    if watched.instance != canaried.watched.instance:
        return msgspec.structs.replace(canaried, watched=watched, earlier=canaried.beside, begun=active, latest=active)
    return msgspec.structs.replace(canaried, watched=watched, latest=active)


def judge(canaried: Canaried, rules: CanaryRules, watched_by: WatchRules, in_place: bool) -> Verdict:
    """`in_place`: `serve` just answered, and the release has its share."""
    demanded = msgspec.structs.replace(
        watched_by, duration_s=rules.duration_s, max_duration_s=rules.max_duration_s, min_requests=rules.min_requests
    )
    watched = msgspec.structs.replace(canaried.watched, baseline=canaried.beside)
    verdict = watch.judge(watched, demanded, in_place)
    if isinstance(verdict, RollBack) and verdict.reason is Reason.ACTIVATION_FAILED:
        message = f"serve has not let it answer its share for {watched.elsewhere_s:.0f} s"
        return msgspec.structs.replace(verdict, message=message)
    return verdict


def evidence_of(canaried: Canaried) -> dict[str, float | str]:
    total, beside = canaried.watched.total, canaried.beside
    return {
        "canary_s": round(canaried.watched.elapsed_s, 1),
        "requests": total.answered,
        "failed": total.failed,
        "beside_requests": beside.answered,
        "beside_failed": beside.failed,
        "crashes": canaried.watched.crashes,
    }
