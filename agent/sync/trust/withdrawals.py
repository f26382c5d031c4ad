"""What was withdrawn once stays withdrawn on this device, until the release's publisher signs otherwise with the offline key.

The assignment is the server's word, so a thief of the online keys could withdraw the withdrawal and offer a bad release again.
He cannot:
 1. every release that a verified assignment ever listed as withdrawn is remembered, if a publisher signed such a release at
    all, with the number of times its publisher had reinstated it by then (`reinstated`, in the signed list of
    releases);
 2. it is refused, whatever later assignments say, while that number has not grown;
 3. while the number cannot be learnt (the publisher's metadata has expired, or cannot be fetched), nothing is reinstated.
Pure but for what `count` asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from agent.contract.assignment import REINSTATED_FIELD, Assignment
from agent.contract.names import ReleaseRef

Count = Callable[[ReleaseRef], int | None]
"""How often the publisher reinstated a release; None when nobody signed such a one.  Raises: LookupError when it cannot be
learnt now."""

Withdrawn = Mapping[str, Mapping[str, int]]
"""Model → release (in decimal digits, as JSON has its keys) → the number of reinstatements when it was withdrawn."""

UNKNOWN = -1
MAX_PER_MODEL = 4096
"""Of each model the newest ones are remembered: a thief who lists a million numbers gains no more than time."""


def remember(known: Withdrawn, assignment: Assignment, count: Count) -> dict[str, dict[str, int]]:
    """`known` after this assignment. Call it for each new version of the assignment."""
    found = {model: {int(number): times for number, times in releases.items()} for model, releases in known.items()}
    for model, rules in assignment.models.items():
        releases = found.setdefault(model, {})
        for number in sorted(rules.withdrawn, reverse=True)[:MAX_PER_MODEL]:
            _listed(releases, ReleaseRef(model, number), count)
        for number in sorted(set(releases) - set(rules.withdrawn)):
            _no_longer_listed(releases, ReleaseRef(model, number), count)
    return {model: {str(number): times for number, times in releases.items()} for model, releases in found.items() if releases}


def refused(known: Withdrawn) -> dict[str, tuple[int, ...]]:
    """Model → the releases that are withdrawn here for good."""
    return {model: tuple(sorted(map(int, releases))) for model, releases in known.items()}


def reinstatements(custom: object) -> int:
    """The number in a signed target's custom part; 0 where there is none."""
    value = custom.get(REINSTATED_FIELD, 0) if isinstance(custom, Mapping) else 0
    return value if isinstance(value, int) and value >= 0 else 0


def _listed(releases: dict[int, int], ref: ReleaseRef, count: Count) -> None:
    try:
        number = count(ref)
    except LookupError:
        releases.setdefault(ref.version, UNKNOWN)
        return
    if number is not None:
        releases[ref.version] = max(number, releases.get(ref.version, UNKNOWN))


def _no_longer_listed(releases: dict[int, int], ref: ReleaseRef, count: Count) -> None:
    try:
        number = count(ref)
    except LookupError:
        return
    before = releases[ref.version]
    if number is None:
        return  # nobody signs it any more; who signed it once may come back
    if before == UNKNOWN:
        releases[ref.version] = number
    elif number > before:
        del releases[ref.version]
