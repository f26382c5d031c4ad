"""What this device should run, from a verified assignment and its own verified record. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from agent.contract.assignment import (
    MAX_ASSIGNMENT_BYTES,
    Assignment,
    DeviceRecord,
    ModelAssignment,
    Rule,
    Wanted,
    has_former_keys,
    wanted,
    with_present_keys,
)
from agent.contract.codec import FORMAT, Document, decode, require_format
from agent.contract.names import ReleaseRef
from agent.contract.scopes import Identity, depends_on_hardware, meets


class Desired(Document, frozen=True, kw_only=True):
    """The last verified word of the fleet. `valid_until` is when the first signature behind it expires: from then on nothing
    new is installed, and what runs keeps running. `withdrawn_before` are the releases that earlier assignments withdrew and no
    publisher reinstated. `issued` is when the server signed its timestamp, `heard_at` when one of that moment was first
    verified here.
    """

    assignment: Assignment
    record: DeviceRecord
    verified_at: float
    valid_until: float
    withdrawn_before: dict[str, tuple[int, ...]] = {}
    issued: float = 0.0
    heard_at: float = 0.0
    metadata: str = ""
    """Which metadata that was: another word here means that something else was signed about releases, keys or publishers."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "desired state")

    def fresh(self, now: float) -> bool:
        return now < self.valid_until

    def models(self) -> tuple[str, ...]:
        return tuple(sorted(self.assignment.models))

    def wanted(self, model: str, hardware: str = "") -> Wanted:
        """What to run of `model` on this hardware class; nothing when the assignment does not name it."""
        found = wanted(self._rules(model), self.record.device, self.record.groups, hardware, self.record.labels)
        return msgspec.structs.replace(found, attempt=max(found.attempt, self.record.attempt(model, found.release)))

    def rule(self, model: str, hardware: str, found: Wanted) -> Rule:
        """The rule that `found` (what is wanted of the model) comes from: by its rollout, else the first one with its release."""
        identity = Identity(self.record.device, self.record.groups, self.record.labels, hardware)
        rules = [rule for rule in self._rules(model).all_rules() if meets(rule.scope, identity)]
        for rule in rules:
            told = {rule.rollout.id, *(kept.id for kept in rule.rollout.kept)} if rule.rollout is not None else set()
            if (found.rollout in told) if found.rollout is not None else (found.release == rule.release):
                return rule
        return rules[-1]

    def depends_on_hardware(self, model: str) -> bool:
        """Whether `wanted` has to know the hardware class: some class is left out of a release, or a rule is for one."""
        rules = self._rules(model)
        return bool(rules.excluded) or depends_on_hardware(rule.scope for rule in rules.rules)

    def team(self, model: str, release: int) -> dict[str, int] | None:
        """The releases, by model, that switch together with this one, itself among them; None when it switches alone."""
        for members in self.assignment.teams.values():
            if members.get(model) == release and len(members) > 1:
                return members
        return None

    def withdrawn(self, model: str, release: int) -> bool:
        return release in self._rules(model).withdrawn

    def contradicted(self) -> tuple[ReleaseRef, ...]:
        """Releases that the fleet wants although they were withdrawn and nobody who may has reinstated them: they are refused."""
        found = set()
        for model, rules in self.assignment.models.items():
            memory = set(self.withdrawn_before.get(model, ())) - set(rules.withdrawn)
            found |= {ReleaseRef(model, number) for number in rules.named() & memory}
        return tuple(sorted(found))

    def _rules(self, model: str) -> ModelAssignment:
        rules = self.assignment.models.get(model, ModelAssignment())
        return msgspec.structs.replace(rules, withdrawn=(*rules.withdrawn, *self.withdrawn_before.get(model, ())))


def read_desired(data: bytes) -> Desired:
    """The fleet's word as this device wrote it down, perhaps when teams had another key.  Raises: ContractError."""
    if has_former_keys(data):
        raw = decode(data, dict[str, Any], limit_bytes=2 * MAX_ASSIGNMENT_BYTES)
        if isinstance(raw.get("assignment"), dict):
            raw["assignment"] = with_present_keys(raw["assignment"])
        data = msgspec.json.encode(raw)
    return decode(data, Desired, limit_bytes=2 * MAX_ASSIGNMENT_BYTES)
