"""Everything that is remembered of updates, each kind in a folder of its own below the store's private part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agent.sync.updating.approvals import Approvals
from agent.sync.updating.holds import Holds
from agent.sync.updating.journal import Journal
from agent.sync.updating.quarantine import Quarantine
from agent.sync.updating.states import States


@dataclass(frozen=True)
class Records:
    """What the device remembers of its models' updates, on disk."""

    states: States
    quarantine: Quarantine
    holds: Holds
    approvals: Approvals
    journal: Journal

    @classmethod
    def below(cls, private: Path) -> Records:
        """The records in `private` (`Store.private`). Nothing is read or made yet."""
        return cls(
            states=States(private / "updates"),
            quarantine=Quarantine(private / "quarantine"),
            holds=Holds(private / "holds"),
            approvals=Approvals(private / "approvals"),
            journal=Journal(private / "journal"),
        )
