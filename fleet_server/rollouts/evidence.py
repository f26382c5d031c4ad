"""What a rollout was judged by, in the order in which it was known, and the same verdicts made of it once more.

Everything that a verdict depends on is in it: the rules as they were when the rollout began, the counts of standings, and the samples of the
devices' health with the number up to which each verdict had read them. So whoever has the evidence can judge again, anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.contract.codec import convert
from fleet_server.rollouts import gates, health, rows, teams, vitals
from fleet_server.rollouts.gates import Counts, Ruling, Verdict
from fleet_server.rollouts.health import Sample
from fleet_server.rollouts.vitals import Vitals
from fleet_server.storage.database import Database
from fleet_server.storage.models import VerdictRow
from fleet_server.storage.telemetry_models import HealthSampleRow


class RecordedSample(msgspec.Struct, frozen=True):
    """A sample, when it was taken, and its number: samples and verdicts are in the order of numbers."""

    number: int
    at: float
    sample: Sample


class RecordedVerdict(msgspec.Struct, frozen=True):
    """A verdict with the counts of standings behind it, and what was known of the devices' health."""

    seq: int
    wave: int
    at: float
    verdict: Ruling
    why: str
    counts: Counts
    health: Vitals | None


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """`rules`, `health`: what had to be kept; `health` is None for a rollout that began before it was judged by that. `members`: how many
    models switch together, each of which has evidence of its own. `samples` are those behind number `after`; `next`: what to give as
    `after` for more of them, None at the end.
    """

    rollout: str
    model: str
    release: int
    members: int
    rules: gates.Rules
    health: health.HealthRules | None
    verdicts: tuple[RecordedVerdict, ...]
    samples: tuple[RecordedSample, ...]
    next: int | None = None


class Difference(msgspec.Struct, frozen=True):
    """A verdict that comes out otherwise when it is made again."""

    seq: int
    recorded: str
    again: str


class Recorder:
    """Reads the database and changes nothing."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def evidence(self, rollout_id: str, *, after: int = 0, limit: int = 1000) -> Evidence:
        """Everything about how a rollout was judged.  Raises: NotFound."""
        with self._database.reading() as session:
            row = rows.find(session, rollout_id)
            recorded, more = _samples(session, row.id, after, limit)
            verdicts = session.scalars(select(VerdictRow).where(VerdictRow.rollout == row.id).order_by(VerdictRow.seq)).all()
            return Evidence(
                rollout=row.id, model=row.model, release=row.release, members=len(teams.of(session, row)), rules=rows.rules_of(row),
                health=convert(row.health, health.HealthRules) if row.health is not None else None, verdicts=tuple(map(_verdict, verdicts)),
                samples=recorded, next=more,
            )  # fmt: skip


def differences(evidence: Evidence) -> list[Difference]:
    """The verdicts that come out otherwise when they are made again from what is recorded; none, unless something was altered. Pure.

    Of a team each member's health is judged again; what its gates said together needs the counts of each member.
    """
    found = []
    for verdict in evidence.verdicts:
        again = _again(evidence, verdict)
        recorded = (verdict.verdict.value, _said(evidence, verdict.health))
        if again != recorded:
            found.append(Difference(verdict.seq, _text(recorded), _text(again)))
    return found


def _again(evidence: Evidence, verdict: RecordedVerdict) -> tuple[str, str]:
    known, ruling = verdict.health, verdict.verdict
    if known is not None and evidence.health is not None:
        up_to = known.changes[evidence.model]
        samples = [one.sample for one in evidence.samples if one.number <= up_to]
        judged = health.judge(samples, evidence.health, shares=evidence.members)
        known = msgspec.structs.replace(known, models={**known.models, evidence.model: judged})
    if evidence.members == 1 and verdict.counts.total:  # without devices it is not their counts that decided
        whole = known.whole if known is not None else verdict.verdict is not Ruling.WAIT
        gate = gates.judge(verdict.counts, (), evidence.rules, whole=whole)
        ruling = gate.ruling if known is None else vitals.combined(gate, known).ruling
    elif known is not None:
        ruling = vitals.combined(Verdict(known.outcome, "", verdict.counts), known).ruling
    return ruling.value, _said(evidence, known)


def _said(evidence: Evidence, known: Vitals | None) -> str:
    one = known.models[evidence.model] if known is not None else None
    return (
        f"{one.action.value}: {one.why} {[(each.test.value, each.log_e) for each in one.findings]}" if one is not None else ""
    )


def _text(said: tuple[str, str]) -> str:
    return "; ".join(filter(None, said))


def _samples(session: Session, rollout: str, after: int, limit: int) -> tuple[tuple[RecordedSample, ...], int | None]:
    """Those of one number stay together, so that the next page begins behind it."""
    query = select(HealthSampleRow).where(HealthSampleRow.rollout == rollout, HealthSampleRow.change > after)
    read: Sequence[HealthSampleRow] = session.scalars(
        query.order_by(HealthSampleRow.change, HealthSampleRow.seq).limit(limit)
    ).all()
    if len(read) < limit:
        return tuple(map(_recorded, read)), None
    last = read[-1].change
    whole = select(HealthSampleRow).where(HealthSampleRow.rollout == rollout, HealthSampleRow.change == last)
    of_last = session.scalars(whole.order_by(HealthSampleRow.seq)).all()
    return tuple(map(_recorded, [*(one for one in read if one.change < last), *of_last])), last


def _recorded(row: HealthSampleRow) -> RecordedSample:
    return RecordedSample(row.change, row.at, vitals.sample_of(row))


def _verdict(row: VerdictRow) -> RecordedVerdict:
    known = convert(row.health, Vitals) if row.health else None
    return RecordedVerdict(row.seq, row.wave, row.at, Ruling(row.verdict), row.why, convert(row.counts, Counts), known)
