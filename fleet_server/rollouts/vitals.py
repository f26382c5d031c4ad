"""The health of the devices that run a rollout's release, kept up with their samples, and what it makes of a gate's verdict.

Samples are numbered as changes are, so whoever reads up to a number has missed none below it. Only new ones are read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.contract.assignment import EVERYONE
from agent.contract.codec import convert
from fleet_server.rollouts import health, rows
from fleet_server.rollouts.gates import Ruling, Verdict
from fleet_server.rollouts.health import Action, Health, HealthTest, HealthVerdict, Sample
from fleet_server.storage import changes
from fleet_server.storage.models import ModelRow, RolloutRow, VerdictRow
from fleet_server.storage.telemetry_models import HealthSampleRow

WORST_FIRST = (Action.ABORT, Action.PAUSE, Action.HOLD, Action.PROMOTE)


class Vitals(msgspec.Struct, frozen=True):
    """What a verdict knew of the devices' health. `models`: what the samples of each model said, with those of `changes`, model → the
    number up to which they were read; `outcome`: what the gate said without it; `whole`: all devices of the wave might be told by then; `paused`: the tests for which the rollout was paused: not
    again when somebody let it go on.
    """

    models: dict[str, HealthVerdict]
    changes: dict[str, int]
    outcome: Ruling
    whole: bool = True
    paused: tuple[HealthTest, ...] = ()

    @property
    def action(self) -> Action:
        return min((one.action for one in self.models.values()), key=WORST_FIRST.index)

    @property
    def why(self) -> str:
        worst = [(model, one.why) for model, one in self.models.items() if one.action is self.action]
        return "; ".join(why if len(self.models) == 1 else f"{model}: {why}" for model, why in worst)


class VitalsLedgers:
    """The health of each rollout that is judged. One thread at a time: whoever has the lock of the decisions."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Health, int]] = {}

    def judge(self, session: Session, team: Sequence[RolloutRow], verdict: Verdict) -> tuple[Verdict, Vitals | None]:
        """The verdict with what is known of the devices' health; None where the rollout began before that was kept, and of a first release,
        which there is nothing to compare with.
        """
        judged = [row for row in team if row.health is not None and _has_past(session, row)]
        known = {row.model: self._follow(session, row, len(team)) for row in judged}
        if not known:
            return verdict, None
        models = {model: one.verdict() for model, (one, _) in known.items()}
        numbers = {model: number for model, (_, number) in known.items()}
        whole = rows.reach_of(team[0]) >= EVERYONE
        vitals = Vitals(models, numbers, verdict.ruling, whole, paused(session, team[0]))
        return combined(verdict, vitals), vitals

    def keep(self, rollouts: Collection[str]) -> None:
        """Drops what is known of all other rollouts."""
        self._known = {name: one for name, one in self._known.items() if name in rollouts}

    def _follow(self, session: Session, row: RolloutRow, shares: int) -> tuple[Health, int]:
        found = self._known.get(row.id)
        if found is None or found[1] > changes.last(session):
            found = Health(convert(row.health, health.HealthRules), shares=shares), 0
        one, number = found
        for sample in samples(session, row.id, number):
            one.add(sample_of(sample))
            number = sample.change
        self._known[row.id] = one, number
        return one, number


def _has_past(session: Session, row: RolloutRow) -> bool:
    """Whether its devices may have run another release before: that of their scope, or what everyone runs."""
    if row.previous is not None:
        return True
    model = session.get(ModelRow, row.model) if row.scope else None
    return model is not None and model.release is not None


def samples(session: Session, rollout: str, after: int = 0) -> Sequence[HealthSampleRow]:
    """The samples with a number above `after`, in their order."""
    query = select(HealthSampleRow).where(HealthSampleRow.rollout == rollout, HealthSampleRow.change > after)
    return session.scalars(query.order_by(HealthSampleRow.change, HealthSampleRow.seq)).all()


def sample_of(row: HealthSampleRow) -> Sample:
    return Sample(row.device, HealthTest(row.test), row.before, row.now, row.of_before, row.of_now)


def paused(session: Session, row: RolloutRow) -> tuple[HealthTest, ...]:
    """The tests for which the rollout was paused already."""
    query = select(VerdictRow.health).where(VerdictRow.rollout == row.id, VerdictRow.health.is_not(None))
    last = session.scalar(query.order_by(VerdictRow.seq.desc()).limit(1))
    return convert(last, Vitals).paused if last else ()


def combined(verdict: Verdict, vitals: Vitals) -> Verdict:
    """What the gate says when it is told of the devices' health. Pure."""
    if vitals.action is Action.ABORT and verdict.ruling is not Ruling.FAIL:
        return msgspec.structs.replace(verdict, ruling=Ruling.FAIL, why=f"{vitals.why} ({verdict.why})")
    if vitals.action is Action.HOLD and verdict.ruling is Ruling.PASS:
        return msgspec.structs.replace(verdict, ruling=Ruling.WAIT, why=f"{verdict.why}; {vitals.why}")
    return verdict


def to_pause(vitals: Vitals | None, tests: Mapping[str, Collection[HealthTest]]) -> tuple[HealthTest, ...]:
    """The tests that have found something for which the rollout is to be paused, and was not yet. `tests`: model → those that pause."""
    if vitals is None or vitals.action is not Action.PAUSE:
        return ()
    found = {
        one.test
        for model, verdict in vitals.models.items()
        for one in verdict.findings
        if one.found and one.test in tests[model]
    }
    return tuple(test for test in HealthTest if test in found and test not in vitals.paused)
