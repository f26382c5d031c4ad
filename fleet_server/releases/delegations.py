"""Who may sign which releases: the delegations of the top-level `targets`.

Each publisher is a delegated role with patterns of model names: a name, or a beginning and `*`. Every delegation ends the
search and no two patterns may meet, so each model has exactly one publisher. The one called `releases` has every name that no
other one has; it stands last.
"""

from __future__ import annotations

import fnmatch
import re

from tuf.api.metadata import DelegatedRole, Targets  # type: ignore[attr-defined]

from agent.contract import names
from fleet_server.errors import Conflict, Invalid

RELEASES, ASSIGNMENTS = "releases", "assignments"
EVERY_MODEL = "*"
RESERVED = frozenset({"root", "targets", "snapshot", "timestamp", ASSIGNMENTS, RELEASES})
PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\*?")


def roles(targets: Targets) -> dict[str, DelegatedRole]:
    """Publisher → its delegation, in the order of the search."""
    found = (targets.delegations.roles if targets.delegations else None) or {}
    return {name: role for name, role in found.items() if name != ASSIGNMENTS}


def patterns(role: DelegatedRole) -> list[str]:
    """The model names that the role may sign."""
    return [path.split("/")[1] for path in role.paths or []]


def of(targets: Targets, model: str) -> str | None:
    """The publisher of a model; None when nobody may sign it."""
    return next((name for name, role in roles(targets).items() if role.is_delegated_path(f"releases/{model}/1.json")), None)


def check_name(name: str) -> str:
    """`name` itself.  Raises: Invalid."""
    if name in RESERVED:
        raise Invalid(f"a publisher cannot be called {name!r}: the name is taken")
    try:
        return names.check(names.GROUP_NAME, name, "publisher")
    except ValueError as error:
        raise Invalid(str(error)) from error


def check_patterns(targets: Targets, wanted: list[str], *, published: list[str]) -> None:
    """Raises: Invalid (a spelling), Conflict (another publisher has such names, or published such models)."""
    if not wanted:
        raise Invalid("a publisher needs at least one pattern of model names, for example 'digits-*'")
    for pattern in wanted:
        if not PATTERN.fullmatch(pattern):
            raise Invalid(f"pattern {pattern!r} is not a model name, nor the beginning of one and *")
        for name, role in roles(targets).items():
            met = [other for other in patterns(role) if other != EVERY_MODEL and meet(pattern, other)]
            if met:
                raise Conflict(f"pattern {pattern!r} meets {met[0]!r} of publisher {name!r}", code="pattern_taken")
        known = [model for model in published if fnmatch.fnmatchcase(model, pattern)]
        if known:
            raise Conflict(
                f"pattern {pattern!r} takes model {known[0]!r} from the publisher that signed it: its releases would vanish; "
                "choose names that nobody published yet",
                code="model_taken",
            )


def meet(one: str, other: str) -> bool:
    """Whether a model name could match both patterns."""
    a, b = one.rstrip("*"), other.rstrip("*")
    if one.endswith("*") and other.endswith("*"):
        return a.startswith(b) or b.startswith(a)
    if one.endswith("*"):
        return b.startswith(a)
    return a.startswith(b) if other.endswith("*") else a == b
