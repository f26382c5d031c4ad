"""Several machines with one identity: a card that was copied after its device had enrolled. Pure.

Nothing on a card tells them apart, so each agent makes up a word when it starts (`run`), and signs it with every report. One
device never says an earlier word again; two that report in turns do. A rightly signed report that is no newer than the last
one, of a process that was never heard of, is the other sign: its clock is behind, and whatever it says would be dropped unseen.
"""

from __future__ import annotations

from collections.abc import Sequence

KEPT = 8
"""Words remembered per device: more machines than that would still come back to one of them now and then."""

SHARED_S = 3600.0
"""How long after the last sign a device counts as several. Reports come every minute, so two that run show themselves much
sooner.
"""


def heard(runs: Sequence[str], run: str) -> tuple[list[str], bool]:
    """The words of a device after a report with `run`, newest last; whether an earlier one came back."""
    if not run or (runs and runs[-1] == run):
        return list(runs), False
    return [*(one for one in runs if one != run), run][-KEPT:], run in runs


def is_stranger(runs: Sequence[str], run: str) -> bool:
    """Whether a report that came too late is of a process that was never heard of, and so no late copy of an earlier message."""
    return bool(run) and bool(runs) and run not in runs


def are_several(shown_at: float | None, now: float) -> bool:
    """Whether the last sign (None: there was none) is fresh."""
    return shown_at is not None and now < shown_at + SHARED_S
