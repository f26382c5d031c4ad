"""The rules that a change of keys must keep, so that devices follow it and a mistake in it cannot end the fleet's updates.
Pure.
"""

from __future__ import annotations

import datetime as dt

from securesystemslib.signer import Key  # type: ignore[attr-defined]
from tuf.api.metadata import Metadata, Root, Targets  # type: ignore[attr-defined]

from fleet_server.errors import Conflict, Invalid, Refused
from fleet_server.releases import delegations
from fleet_server.releases.delegations import ASSIGNMENTS, EVERY_MODEL, RELEASES
from fleet_server.releases.key_change import Change, Opened, say

MIN_VALIDITY_S = 86400.0
"""A signature that ends within a day was made too long ago to be applied."""

KEY_TYPES = frozenset({"ed25519", "ecdsa", "rsa"})
"""What every device can verify. A key of another type would make the metadata unreadable for them all."""


def check(
    change: Change, root: Metadata[Root], targets: Metadata[Targets], roles: dict[str, Metadata[Targets]], now: float
) -> Opened:
    """The change, when it follows from what is in force (`root`, `targets`, publishers' `roles`) and devices would accept it.

    Raises: Invalid (breaks a rule), Conflict (made from older metadata), Refused (signatures are missing).
    """
    opened = Opened(change)
    if opened.root is None and opened.targets is None and not opened.roles:
        raise Invalid("this changes nothing")
    for what, new, old in (("root", opened.root, root), ("targets", opened.targets, targets)):
        if new is not None:
            _follows(what, new.signed.version, old.signed.version)
            _lasts(what, new.signed.expires, now)
    if opened.base_root.signed != root.signed or opened.base_targets.signed != targets.signed:
        raise Conflict("the metadata changed since this was proposed; propose it anew", code="stale_change")
    _check_root(opened.next_root)
    _check_delegations(opened.next_targets)
    for name, role in opened.roles.items():
        _check_role(name, role, roles, now)
    if needs := opened.needs():
        raise Refused("; ".join(say(need) for need in needs), code="signatures_missing")
    _check_standing(opened, targets, roles)
    return opened


def check_key(key: Key) -> None:
    """Raises: Invalid when some device could not verify with it."""
    if key.keytype not in KEY_TYPES:
        raise Invalid(
            f"keys of type {key.keytype!r} cannot be trusted: devices verify {', '.join(sorted(KEY_TYPES))}", code="key_type"
        )


def reachable(threshold: int, keyids: list[str], role: str) -> int:
    """`threshold` itself.  Raises: Conflict when the keys cannot reach it."""
    if not 1 <= threshold <= len(set(keyids)):
        raise Conflict(f"role {role!r} would need {threshold} signatures and have {len(set(keyids))} keys", code="threshold")
    return threshold


def _check_root(root: Root) -> None:
    if not root.consistent_snapshot:
        raise Invalid("root must keep consistent_snapshot: devices ask for versions", code="bad_change")
    for role in root.roles:
        reachable(root.roles[role].threshold, root.roles[role].keyids, role)
    for key in root.keys.values():
        check_key(key)


def _check_delegations(targets: Targets) -> None:
    """So that a mistake in a hand-made change cannot end the fleet's updates."""
    delegated = targets.delegations
    if delegated is None or not delegated.roles or ASSIGNMENTS not in delegated.roles or targets.targets:
        raise Invalid("targets must delegate to assignments and list no target of its own", code="bad_change")
    for key in delegated.keys.values():
        check_key(key)
    names = list(delegations.roles(targets))
    if RELEASES in names and names[-1] != RELEASES:
        raise Invalid(f"publisher {RELEASES!r} must stand last: it has every name", code="bad_change")
    for name, role in delegated.roles.items():
        reachable(role.threshold, role.keyids, name)
        folder = "assignments" if name == ASSIGNMENTS else "releases"
        if not role.terminating or not role.paths or any(not path.startswith(f"{folder}/") for path in role.paths):
            raise Invalid(f"role {name!r} must end the search and have only paths below {folder}/", code="bad_change")
    seen: list[str] = []
    for name in names:
        for pattern in delegations.patterns(delegated.roles[name]):
            if pattern != EVERY_MODEL and any(delegations.meet(pattern, other) for other in seen):
                raise Invalid(f"two publishers have names like {pattern!r}", code="bad_change")
            seen += [pattern] if pattern != EVERY_MODEL else []


def _check_role(name: str, role: Metadata[Targets], roles: dict[str, Metadata[Targets]], now: float) -> None:
    if name not in roles:
        raise Invalid(f"{name!r} has published nothing that could be signed anew", code="bad_change")
    _follows(name, role.signed.version, roles[name].signed.version)
    _lasts(name, role.signed.expires, now)
    if role.signed.targets != roles[name].signed.targets or role.signed.delegations is not None:
        raise Refused(f"a key change must not change what {name!r} published", code="changes_published")


def _check_standing(opened: Opened, targets: Metadata[Targets], roles: dict[str, Metadata[Targets]]) -> None:
    """What stays as it is must verify with the new keys too, or devices would refuse it."""
    if (
        opened.targets is None
        and not opened.next_root.get_verification_result("targets", targets.signed_bytes, targets.signatures).verified
    ):
        raise Invalid("the keys of targets change, so targets must be signed anew in the same change", code="bad_change")
    for name, role in roles.items():
        if name in opened.roles or name not in delegations.roles(opened.next_targets):
            continue
        if not opened.next_targets.get_verification_result(name, role.signed_bytes, role.signatures).verified:
            raise Invalid(f"the keys of {name!r} change, so it must be signed anew in the same change", code="bad_change")


def _follows(what: str, new: int, old: int) -> None:
    if new != old + 1:
        raise Conflict(
            f"{what} has version {new}, expected {old + 1}: it changed since this was proposed; propose it anew",
            code="stale_change",
        )


def _lasts(what: str, expires: dt.datetime, now: float) -> None:
    if expires.timestamp() < now + MIN_VALIDITY_S:
        raise Refused(f"{what} ends within a day; propose the change anew", code="expires_soon")
