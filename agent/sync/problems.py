"""What goes wrong in `sync`, named by its cause. Foreign exceptions become one of these where they enter."""

from __future__ import annotations

import errno
from collections.abc import Mapping

from agent.contract.reasons import RETRYABLE, Reason


class Problem(Exception):
    """Something that keeps a release from being installed. `reason` says whose fault it is, the message what to do."""

    def __init__(self, reason: Reason, message: str, evidence: Mapping[str, float | str] | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.evidence = dict(evidence or {})

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


def store_problem(error: OSError, doing: str) -> Problem:
    """What an OSError of the store's disk means."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Problem(Reason.NO_SPACE, f"no space left on the disk while {doing}: free some, or lower disk_reserve_bytes")
    where = f" {str(error.filename)!r}" if error.filename else ""
    return Problem(Reason.STORE_FAILED, f"the store's disk failed while {doing}: {error.strerror or error}{where}")
