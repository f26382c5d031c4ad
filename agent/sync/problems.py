"""What goes wrong in `sync`, named by its cause. Foreign exceptions become one of these where they enter."""

from __future__ import annotations

import errno
from collections.abc import Mapping

from agent.contract.reasons import RETRYABLE, Reason

MESSAGE_KEPT = 2000
EVIDENCE_KEPT = 100
"""Of what goes wrong: engines quote from models, in any length, and all of it is kept in states and sent in reports."""


class Problem(Exception):
    """Something that keeps a release from being installed. `reason` says whose fault it is, the message what to do."""

    def __init__(
        self, reason: Reason, message: str, evidence: Mapping[str, float | str] | None = None, *, wait_s: float = 0.0
    ) -> None:
        """`wait_s`: for how long a server that is busy asked not to be asked again."""
        super().__init__(message[:MESSAGE_KEPT])
        self.reason = reason
        self.wait_s = wait_s
        self.evidence = {name[:EVIDENCE_KEPT]: _short(value) for name, value in list((evidence or {}).items())[:EVIDENCE_KEPT]}

    @property
    def message(self) -> str:
        return str(self)

    @property
    def retryable(self) -> bool:
        """Whether the cause lies outside the release, so that trying again later makes sense."""
        return self.reason in RETRYABLE


class NoEngine(Problem):
    """None of the machine's engines works, or looking for them took too long: it says nothing about the release."""

    @property
    def retryable(self) -> bool:
        return True


class Stopped(Exception):
    """The work was given up because the process ends or because something newer is wanted. Nothing is wrong."""


def _short(value: float | str) -> float | str:
    return value[:EVIDENCE_KEPT] if isinstance(value, str) else value


def store_problem(error: OSError, doing: str) -> Problem:
    """What an OSError of the store's disk means."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Problem(Reason.NO_SPACE, f"no space left on the disk while {doing}: free some, or lower disk_reserve_bytes")
    where = f" {str(error.filename)!r}" if error.filename else ""
    return Problem(Reason.STORE_FAILED, f"the store's disk failed while {doing}: {error.strerror or error}{where}")
