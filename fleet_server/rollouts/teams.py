"""Teams: rollouts whose releases switch together on every device. One decision for all members, and what the assignment says of
them.

Each member is a rollout of a model of its own; the team's name is the id of the first one. They have the same waves and reach
the same devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet_server.rollouts.gates import Counts, Ruling, Verdict
from fleet_server.rollouts.machine import BEGUN, State
from fleet_server.storage.models import ModelRow, RolloutRow

EVIDENCE_KEPT = 100  # devices that a verdict of several members names
ROWS_READ = 200
"""Members of the newest teams. Older teams were followed by other rollouts of their models."""


def of(session: Session, row: RolloutRow) -> list[RolloutRow]:
    """The members of the rollout's team, itself among them, in the order in which they were named. A rollout without a team is
    alone.
    """
    if row.team is None:
        return [row]
    return list(session.scalars(select(RolloutRow).where(RolloutRow.team == row.team).order_by(RolloutRow.number)))


def of_model(session: Session, model: str) -> str | None:
    """The team that the model is of, by what the assignment has now."""
    models = {row.model: row for row in session.scalars(select(ModelRow))}
    return next((name for name, members in assigned(session, models).items() if model in members), None)


def assigned(session: Session, models: Mapping[str, ModelRow]) -> dict[str, dict[str, int]]:
    """Name → model → release of the teams that the assignment has: those under way, those that are what every device runs, and
    the releases that devices go back to as a team after theirs was aborted.
    """
    query = select(RolloutRow).where(RolloutRow.team.is_not(None)).order_by(RolloutRow.number.desc()).limit(ROWS_READ)
    teams: dict[str, list[RolloutRow]] = {}
    for row in session.scalars(query):
        teams.setdefault(str(row.team), []).append(row)
    found: dict[str, dict[str, int]] = {}
    claimed: set[str] = set()
    for name, rows in teams.items():
        members = {row.model for row in rows}
        if members & claimed or all(row.wave == 0 and row.reach == 0 for row in rows):  # nobody was told of it
            continue
        claimed |= members
        states = {State(row.state) for row in rows}
        current = {row.model: models[row.model].release for row in rows if row.model in models}
        if states <= set(BEGUN) or (states == {State.COMPLETED} and all(current.get(r.model) == r.release for r in rows)):
            found[name] = {row.model: row.release for row in sorted(rows, key=lambda row: row.model)}
        elif states == {State.ABORTED} and all(current.get(r.model) == r.previous is not None for r in rows):
            found[f"{name}-back"] = {row.model: row.previous for row in rows if row.previous is not None}
    return found


def verdict(verdicts: Sequence[tuple[RolloutRow, Verdict]]) -> Verdict:
    """One verdict from those of all members: it fails when one of them fails, and passes when all pass. Pure."""
    if len(verdicts) == 1:
        return verdicts[0][1]
    order = (Ruling.FAIL, Ruling.WAIT, Ruling.STALL, Ruling.PASS)
    ruling = min((one.ruling for _, one in verdicts), key=order.index)
    why = "; ".join(f"{row.model}:{row.release} {v.why}" for row, v in verdicts if v.ruling is ruling)
    evidence = tuple(witness for _, one in verdicts for witness in one.evidence)[:EVIDENCE_KEPT]
    return Verdict(ruling, why, _sum(one.counts for _, one in verdicts), evidence)


def _sum(counts: Iterable[Counts]) -> Counts:
    total = dict.fromkeys(Counts.__struct_fields__, 0)
    for one in counts:
        for name in total:
            total[name] += getattr(one, name)
    return Counts(**total)
