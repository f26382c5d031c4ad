"""What this device should run, from a verified assignment and its own verified record. Pure."""

from __future__ import annotations

from agent.contract.assignment import Assignment, DeviceRecord, ModelAssignment, Wanted, wanted
from agent.contract.codec import FORMAT, Document, require_format


class Desired(Document, frozen=True, kw_only=True):
    """The last verified word of the fleet. `valid_until` is when the first signature behind it expires: from then on nothing new
    is installed, and what runs keeps running.
    """

    assignment: Assignment
    record: DeviceRecord
    verified_at: float
    valid_until: float
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "desired state")

    def fresh(self, now: float) -> bool:
        return now < self.valid_until

    def models(self) -> tuple[str, ...]:
        return tuple(sorted(self.assignment.models))

    def wanted(self, model: str) -> Wanted:
        """What to run of `model`; nothing when the assignment does not name it."""
        rules = self.assignment.models.get(model, ModelAssignment())
        return wanted(rules, self.record.device, self.record.groups)

    def withdrawn(self, model: str, release: int) -> bool:
        rules = self.assignment.models.get(model)
        return rules is not None and release in rules.withdrawn
