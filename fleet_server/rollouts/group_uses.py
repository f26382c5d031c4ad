"""Which rollouts and rules name a group, so that it does not go while they do."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.contract.scopes import Scope, text_of
from fleet_server.rollouts import rows, rules
from fleet_server.storage.models import RolloutRow, RuleRow


def of(session: Session, group: str) -> list[str]:
    """In words, with what to do: the rollouts under way whose waves or scope name the group, then the rules for it."""
    active = select(RolloutRow).where(RolloutRow.state.in_(rows.ACTIVE)).order_by(RolloutRow.number)
    found = [_rollout(row) for row in session.scalars(active) if group in _groups_of(row)]
    bases = session.scalars(select(RuleRow).order_by(RuleRow.model, RuleRow.id))
    return found + [_rule(rule) for rule in bases if group in _named(rules.scope_of(rule))]


def _rollout(row: RolloutRow) -> str:
    return (
        f"rollout {row.id} ({row.model}:{row.release}), which is {row.state}: wait for its end, complete it or abort it (`edge-fleet rollout "
        f"abort {row.id}`)"
    )


def _rule(row: RuleRow) -> str:
    scope = rules.scope_of(row)
    words = " ".join(f"--scope {text_of((one,))}" for one in scope)
    return f"the rule of {row.model} for {text_of(scope)}: end it with `edge-fleet rule remove {row.model} {words}`"


def _groups_of(row: RolloutRow) -> set[str]:
    """Of all its waves, of those that the rollouts before it had reached, and of its scope."""
    waves = {group for wave in rows.plan_of(row).waves for group in wave.groups}
    return waves | {group for one in rows.as_assigned(row).kept for group in one.groups} | _named(rules.scope_of(row))


def _named(scope: Scope) -> set[str]:
    return {value for condition in scope if condition.kind == "group" for value in condition.values}
