"""Rollouts whose releases switch together on every device: one decision for all of them, and what the assignment says of it.

Each member is a rollout of its own model; `together` is the id of the first. They have the same waves and reach the same devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet_server.rollouts.gates import EVIDENCE_KEPT, Counts, Ruling, Verdict
from fleet_server.rollouts.machine import ACTIVE, State
from fleet_server.storage.models import ModelRow, RolloutRow

ROWS_LOOKED_AT = 200
"""Members of the newest teams. Older ones were followed by other rollouts of their models."""


def of(session: Session, row: RolloutRow) -> list[RolloutRow]:
    """The rollout and those that go with it, in the order in which they were named."""
    if row.together is None:
        return [row]
    return list(session.scalars(select(RolloutRow).where(RolloutRow.together == row.together).order_by(RolloutRow.number)))


def groups(session: Session, models: Mapping[str, ModelRow]) -> dict[str, dict[str, int]]:
    """What the assignment says: name → model → release, for teams under way, teams that are what every device runs, and the releases
    that devices go back to together after a team was aborted.
    """
    query = select(RolloutRow).where(RolloutRow.together.is_not(None)).order_by(RolloutRow.number.desc()).limit(ROWS_LOOKED_AT)
    teams: dict[str, list[RolloutRow]] = {}
    for row in session.scalars(query):
        teams.setdefault(str(row.together), []).append(row)
    found: dict[str, dict[str, int]] = {}
    claimed: set[str] = set()
    for name, rows in teams.items():
        members = {row.model for row in rows}
        if members & claimed:
            continue
        claimed |= members
        states = {State(row.state) for row in rows}
        current = {row.model: models[row.model].release for row in rows if row.model in models}
        if states <= set(ACTIVE) or (states == {State.COMPLETED} and all(current.get(r.model) == r.release for r in rows)):
            found[name] = {row.model: row.release for row in sorted(rows, key=lambda row: row.model)}
        elif states == {State.ABORTED} and all(current.get(r.model) == r.previous is not None for r in rows):
            found[f"{name}-back"] = {row.model: row.previous for row in rows if row.previous is not None}
    return found


def joint(verdicts: Sequence[tuple[RolloutRow, Verdict]]) -> Verdict:
    """One verdict for all: it fails with the first that fails, and passes when all do. Pure."""
    if len(verdicts) == 1:
        return verdicts[0][1]
    order = (Ruling.FAIL, Ruling.WAIT, Ruling.PASS)
    ruling = min((verdict.ruling for _, verdict in verdicts), key=order.index)
    why = "; ".join(f"{row.model}:{row.release} {v.why}" for row, v in verdicts if v.ruling is ruling)
    evidence = tuple(witness for _, verdict in verdicts for witness in verdict.evidence)[:EVIDENCE_KEPT]
    return Verdict(ruling, why, _sum(verdict.counts for _, verdict in verdicts), evidence)


def _sum(counts: Iterable[Counts]) -> Counts:
    total = dict.fromkeys(Counts.__struct_fields__, 0)
    for one in counts:
        for name in total:
            total[name] += getattr(one, name)
    return Counts(**total)
