"""The rules of a model: which scopes have a release of their own, and in which order devices look at them.

A rule comes to be when a rollout with a scope completes. Until then the rollout stands in the assignment as a rule without a release:
its devices that are not reached follow the next rule. Two rollouts of a model are under way at once only where no device is in both:
by what the scopes say, by what the more specific one has for good, or by the devices that there are. A device that comes into both later
follows the more specific rule, and that one alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.contract.assignment import MAX_RULES, Rule, reaches
from agent.contract.codec import decode, encode
from agent.contract.scopes import EVERYBODY, Identity, Scope, is_within, meets, never_meet, rank, text_of
from fleet_server.errors import Conflict, Invalid, NotFound
from fleet_server.rollouts import rows
from fleet_server.storage.models import Device, ModelRow, RolloutRow, RuleRow

MAX_SCOPE_BYTES = 256 * 1024
NAMED = 20


def stored(scope: Scope) -> str:
    """The scope as the database has it; the empty text is everyone."""
    return encode(scope).decode() if scope else ""


def scope_of(row: RolloutRow | RuleRow) -> Scope:
    """Whom the rollout, or the rule, is for."""
    return decode(row.scope, Scope, limit_bytes=MAX_SCOPE_BYTES) if row.scope else EVERYBODY


def find(session: Session, model: str, scope: Scope) -> RuleRow | None:
    return session.scalar(select(RuleRow).where(RuleRow.model == model, RuleRow.scope == stored(scope)))


def base_of(session: Session, model: str, scope: Scope) -> ModelRow | RuleRow | None:
    """What the devices of the scope run of the model by a rule of exactly this scope."""
    return find(session, model, scope) if scope else session.get(ModelRow, model)


def settle(session: Session, row: RolloutRow) -> None:
    """The rollout is complete: what it brought is from now on what its scope runs."""
    base = base_of(session, row.model, scope_of(row))
    if base is None:
        base = RuleRow(model=row.model, scope=row.scope, release=None, previous=None)
        session.add(base)
    base.release, base.previous = row.release, base.release


def remove(session: Session, model: str, scope: Scope) -> RuleRow:
    """Ends the rule: its devices follow the next one.  Raises: NotFound; Conflict while a rollout changes it."""
    row = find(session, model, scope)
    if row is None:
        raise NotFound(f"{model} has no rule for {text_of(scope)}; `edge-fleet rule list` shows them")
    if (active := rows.active_of(session, model, row.scope)) is not None:
        raise Conflict(f"rollout {active.id} changes this rule; complete it or abort it first", code="under_way")
    session.delete(row)
    return row


# -- what devices read ---------------------------------------------------------------------------------------------------------


def of_models(session: Session) -> dict[str, tuple[Rule, ...]]:
    """Model → its rules for others than everyone, the most specific first."""
    found: dict[str, dict[Scope, Rule]] = {}
    for row in session.scalars(select(RuleRow)):
        scope = scope_of(row)
        found.setdefault(row.model, {})[scope] = Rule(scope=scope, release=row.release)
    query = select(RolloutRow).where(RolloutRow.state.in_(rows.BEGUN), RolloutRow.scope != "")
    for rollout in session.scalars(query):
        scope = scope_of(rollout)
        known = found.setdefault(rollout.model, {}).get(scope)
        release = known.release if known is not None else None
        found[rollout.model][scope] = Rule(scope=scope, release=release, rollout=rows.as_assigned(rollout))
    return {model: tuple(sorted(rules.values(), key=lambda rule: rank(rule.scope))) for model, rules in found.items()}


def ahead_of(session: Session, row: RolloutRow) -> tuple[Rule, ...]:
    """The rules that devices in the scope of the rollout look at before its own. Their releases do not matter: 0 stands for any."""
    mine = scope_of(row)
    found = []
    for rule in of_models(session).get(row.model, ()):
        if mine and rank(rule.scope) >= rank(mine):
            break
        if not never_meet(rule.scope, mine):
            found.append(Rule(scope=rule.scope, release=None if rule.release is None else 0, rollout=rule.rollout))
    return tuple(found)


def follows(scope: Scope, ahead: Iterable[Rule], identity: Identity) -> bool:
    """Whether a device follows the rule with this scope, which it looks at after those `ahead`."""
    if not meets(scope, identity):
        return False
    for rule in ahead:
        if meets(rule.scope, identity) and (
            rule.release is not None or (rule.rollout is not None and reaches(rule.rollout, identity.device, identity.groups))
        ):
            return False
    return True


# -- what may begin ------------------------------------------------------------------------------------------------------------


def refuse_nobody(session: Session, model: str, scope: Scope) -> None:
    """Raises: Invalid when the scope names something that no device has, or when no device would follow its rule."""
    if not scope:
        return
    devices = identities(session)
    for condition in scope:
        for value in condition.values:
            one = (type(condition)(kind=condition.kind, values=(value,)),)
            if not any(meets(one, device) for device in devices):
                raise Invalid(f"no device is in {text_of(one)}{_hint(condition.kind, value, devices)}", code="nobody")
    if not any(meets(scope, device) for device in devices):
        raise Invalid(f"no device is in {text_of(scope)}: each of its conditions has devices, and none has all", code="nobody")
    ahead = [rule for rule in of_models(session).get(model, ()) if rule.release is not None and rank(rule.scope) < rank(scope)]
    if all(any(meets(rule.scope, device) for rule in ahead) for device in devices if meets(scope, device)):
        raise Invalid(
            f"every device in {text_of(scope)} follows a more specific rule of {model}; `edge-fleet rule list` shows them, and `edge-fleet rule "
            "remove` ends one",
            code="nobody",
        )


def _hint(kind: str, value: str, devices: Iterable[Identity]) -> str:
    if kind == "class" and "*" in value:
        return f"; only the scope of a group may have *: `edge-fleet group set GROUP 'class:{value}'`, and then --scope group:GROUP"
    return _known(kind, devices)


def _known(kind: str, devices: Iterable[Identity]) -> str:
    found: set[str] = set()
    for device in devices:
        match kind:
            case "group":
                found |= set(device.groups)
            case "label":
                found |= {f"{name}={value}" for name, value in device.labels.items()}
            case "class":
                found |= {device.hardware} - {""}
    return f"; devices have: {', '.join(sorted(found)[:NAMED])}" if found else ""


def refuse_meeting(session: Session, model: str, scope: Scope) -> None:
    """Raises: Conflict when a device could be in the scope and in that of a rollout of the model that is under way."""
    active = session.scalars(select(RolloutRow).where(RolloutRow.model == model, RolloutRow.state.in_(rows.ACTIVE)))
    others = [(row, scope_of(row)) for row in active if row.scope != stored(scope)]
    devices = identities(session) if others else []
    for row, other in others:
        if never_meet(scope, other) or _has_rule(session, model, min(scope, other, key=_specific)):
            continue
        both = [device.device for device in devices if meets(scope, device) and meets(other, device)]
        if both or is_within(scope, other) or is_within(other, scope):
            who = (
                f"{len(both)} device{'s' if len(both) != 1 else ''} (such as {both[0]})" if both else "devices that join later"
            )
            raise Conflict(
                f"{who} would be in two rollouts of {model}: {row.id} ({row.model}:{row.release}) is for {text_of(other)}, this one for "
                f"{text_of(scope)}; wait for its end, complete it or abort it (`edge-fleet rollout abort {row.id}`), or name a scope that "
                "has nobody in common with it",
                code="overlap",
            )


def refuse_too_many(session: Session, model: str, scope: Scope) -> None:
    """Raises: Conflict when the model would have more rules than devices read."""
    known = {rule.scope for rule in of_models(session).get(model, ())}
    if scope and scope not in known and len(known) >= MAX_RULES:
        raise Conflict(f"{model} has {MAX_RULES} rules already; end one with `edge-fleet rule remove`", code="too_many")


def _specific(scope: Scope) -> tuple[bool, object]:
    return (not scope, rank(scope))


def _has_rule(session: Session, model: str, scope: Scope) -> bool:
    """Whether devices in the scope have a release of their own already, so that they follow no other rule whatever becomes of a rollout."""
    return bool(scope) and find(session, model, scope) is not None


def identities(session: Session) -> list[Identity]:
    """What decides of each device which rules it follows; of those that are not shut out."""
    query = select(Device.id, Device.groups, Device.labels, Device.hardware_class).where(Device.revoked.is_(False))
    return [identity_of(row) for row in session.execute(query)]


def identity_of(row: Any) -> Identity:
    """Of a row with the id, the groups, the labels and the hardware class of a device."""
    return Identity(row.id, frozenset(row.groups), row.labels or {}, row.hardware_class or "")
