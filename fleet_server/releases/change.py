"""A change of who is trusted, as a file: proposed where the server is, signed where the offline keys are, applied by the server.

Nothing in the file is secret and nothing in it is believed: signers see the difference between the metadata that is in force and the new one,
computed from both, and the server applies it only when every document has the signatures it needs. Pure.
"""

from __future__ import annotations

import copy
import datetime as dt
from collections.abc import Iterator
from typing import Literal, TypeVar

import msgspec
from securesystemslib.signer import Key, Signer  # type: ignore[attr-defined]
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import DelegatedRole, Metadata, Root, Targets  # type: ignore[attr-defined]

from agent.contract.codec import FORMAT, ContractError, Document, decode, encode, require_format
from fleet_server.errors import Conflict, Invalid, NotFound, Refused
from fleet_server.releases import publishers
from fleet_server.releases.publishers import ASSIGNMENTS, EVERY_MODEL, RELEASES

OFFLINE_EXPIRY_S = 365 * 86400.0
MIN_VALIDITY_S = 86400.0
MAX_CHANGE_BYTES = 32 * 1024 * 1024
KEY_TYPES = frozenset({"ed25519", "ecdsa", "rsa"})
"""What every device can verify. A key of another type would make the metadata unreadable for them all."""

T = TypeVar("T", Root, Targets)


class Change(Document, frozen=True, kw_only=True):
    """Metadata as text. `base_*` is what was in force when the change was proposed; `roles` are publishers' roles to sign anew."""

    base_root: str
    base_targets: str
    root: str | None = None
    targets: str | None = None
    roles: dict[str, str] = {}
    kind: Literal["key-change"] = "key-change"
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "key change")


class Draft:
    """The metadata in force, being changed."""

    def __init__(
        self, root: Metadata[Root], targets: Metadata[Targets], roles: dict[str, Metadata[Targets]], now: float
    ) -> None:
        self._base = (root.to_bytes().decode(), targets.to_bytes().decode())
        self._root, self._targets, self._roles = copy.deepcopy(root), copy.deepcopy(targets), copy.deepcopy(roles)
        self._ends = dt.datetime.fromtimestamp(now + OFFLINE_EXPIRY_S, tz=dt.timezone.utc).replace(microsecond=0)
        self._touched: set[str] = set()

    @property
    def root(self) -> Root:
        return self._root.signed

    @property
    def targets(self) -> Targets:
        return self._targets.signed

    def change(self) -> Change:
        """The next version of everything that was touched, without signatures.  Raises: Invalid when nothing was."""
        if not self._touched:
            raise Invalid("this changes nothing")
        for name in self._touched:
            if name == "root":
                self._next(self._root)
            else:
                self._next(self._targets if name == "targets" else self._roles[name])
        texts = {name: self._roles[name].to_bytes().decode() for name in self._touched if name in self._roles}
        return Change(
            base_root=self._base[0],
            base_targets=self._base[1],
            root=self._root.to_bytes().decode() if "root" in self._touched else None,
            targets=self._targets.to_bytes().decode() if "targets" in self._touched else None,
            roles=texts,
        )

    def renew(self, role: str) -> None:
        """The same content for another year.  Raises: NotFound."""
        if role not in {"root", "targets"} and role not in self._roles:
            raise NotFound(f"there is no offline role {role!r} with metadata to renew; `edge-fleet keys status` lists them")
        self._touched.add(role)

    def use_online(self, new: dict[str, Key]) -> None:
        """One new key in the place of all that an online role had."""
        for role, key in new.items():
            if role == ASSIGNMENTS:
                self._touched.add("targets")
                for keyid in list(self._delegation(role).keyids):
                    self.targets.revoke_key(keyid, role)
                self.targets.add_key(key, role)
                continue
            self._touched.add("root")
            for keyid in list(self.root.roles[role].keyids):
                self.root.revoke_key(keyid, role)
            self.root.add_key(key, role)

    def use_offline(self, role: str, add: list[Key], remove: list[str], threshold: int | None) -> None:
        """Other keys for root, targets or a publisher. `root` takes `targets` along where both have the same keys.

        Raises: NotFound, Invalid, Conflict (a threshold that the keys cannot reach).
        """
        for key in add:
            check_key(key)
        same = sorted(self.root.roles["root"].keyids) == sorted(self.root.roles["targets"].keyids)
        if role in {"root", "targets"}:
            for name in ("root", "targets") if role == "root" and same else (role,):
                self._rekey_top(name, add, remove, threshold)
            self._touched.add("root")
            if role == "targets" or same:
                self._touched.add("targets")
            return
        delegated = self._delegation(role)
        for keyid in _known(delegated.keyids, remove, role):
            self.targets.revoke_key(keyid, role)
        for key in add:
            self.targets.add_key(key, role)
        delegated.threshold = _reachable(delegated.threshold if threshold is None else threshold, delegated.keyids, role)
        self._touched.add("targets")
        if role in self._roles:
            self._touched.add(role)

    def add_publisher(self, name: str, patterns: list[str], keys: list[Key], threshold: int, *, published: list[str]) -> None:
        """Raises: Invalid, Conflict."""
        publishers.check_name(name)
        roles = publishers.roles(self.targets)
        if name in roles or name in self._roles:
            raise Conflict(f"there is, or was, a publisher {name!r} already; choose another name", code="exists")
        publishers.check_patterns(self.targets, patterns, published=published)
        for key in keys:
            check_key(key)
        threshold = _reachable(threshold, [key.keyid for key in keys], name)
        delegations = self.targets.delegations
        assert delegations is not None
        assert delegations.roles is not None
        role = DelegatedRole(name, [], threshold, terminating=True, paths=[f"releases/{pattern}/*" for pattern in patterns])
        last = {RELEASES: delegations.roles.pop(RELEASES)} if RELEASES in delegations.roles else {}
        delegations.roles.update({name: role, **last})
        for key in keys:
            self.targets.add_key(key, name)
        self._touched.add("targets")

    def remove_publisher(self, name: str) -> None:
        """What it signed is no longer trusted; devices keep what they run.  Raises: NotFound."""
        role = self._delegation(name)
        if name == ASSIGNMENTS:
            raise Invalid("assignments is the server's own role, not a publisher")
        for keyid in list(role.keyids):
            self.targets.revoke_key(keyid, name)
        assert self.targets.delegations is not None
        assert self.targets.delegations.roles is not None
        del self.targets.delegations.roles[name]
        self._touched.add("targets")

    def _rekey_top(self, role: str, add: list[Key], remove: list[str], threshold: int | None) -> None:
        top = self.root.roles[role]
        for keyid in _known(top.keyids, remove, role):
            self.root.revoke_key(keyid, role)
        for key in add:
            self.root.add_key(key, role)
        top.threshold = _reachable(top.threshold if threshold is None else threshold, top.keyids, role)

    def _delegation(self, name: str) -> DelegatedRole:
        found = (self.targets.delegations.roles if self.targets.delegations else None) or {}
        if name not in found:
            raise NotFound(f"there is no role or publisher {name!r}; `edge-fleet keys status` lists them")
        return found[name]

    def _next(self, metadata: Metadata[T]) -> None:
        metadata.signed.version += 1
        metadata.signed.expires = self._ends
        metadata.signatures.clear()


class Need(msgspec.Struct, frozen=True):
    """`document` still needs `missing` signatures of `keyids` (the keys that have not signed yet)."""

    document: str
    role: str
    missing: int
    keyids: tuple[str, ...]


class Opened:
    """A change, parsed.  Raises: Invalid when it cannot be read."""

    def __init__(self, change: Change) -> None:
        self.change = change
        self.base_root, self.base_targets = _parse(change.base_root, Root), _parse(change.base_targets, Targets)
        self.root = _parse(change.root, Root) if change.root is not None else None
        self.targets = _parse(change.targets, Targets) if change.targets is not None else None
        self.roles = {name: _parse(text, Targets) for name, text in change.roles.items()}

    @property
    def next_root(self) -> Root:
        return (self.root or self.base_root).signed

    @property
    def next_targets(self) -> Targets:
        return (self.targets or self.base_targets).signed

    def authorities(self) -> Iterator[tuple[str, Metadata[Root] | Metadata[Targets], str, Root | Targets]]:
        """(document, its metadata, role, who delegates it): every signature that the change needs, one row per threshold."""
        if self.root is not None:
            yield "root", self.root, "root", self.base_root.signed
            yield "root", self.root, "root", self.root.signed
        if self.targets is not None:
            yield "targets", self.targets, "targets", self.next_root
        for name, role in self.roles.items():
            yield name, role, name, self.next_targets

    def needs(self) -> list[Need]:
        """What is still missing; empty when the change can be applied."""
        found = []
        for document, metadata, role, delegator in self.authorities():
            try:
                result = delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
            except ValueError as error:
                raise Invalid(f"{document} is delegated by nobody: {error}") from error
            if not result.verified:
                found.append(Need(document, role, result.missing, tuple(sorted(result.unsigned))))
        return found

    def candidates(self) -> dict[str, Key]:
        """Key id → public key of everybody whose signature counts."""
        found: dict[str, Key] = {}
        for _, _, role, delegator in self.authorities():
            try:
                delegated = delegator.get_delegated_role(role)
            except ValueError:
                continue
            found.update({keyid: delegator.get_key(keyid) for keyid in delegated.keyids})
        return found

    def sign(self, signer: Signer) -> list[str]:
        """Signs every document on which this key counts; which.  Raises: Refused when there is none."""
        keyid, signed = signer.public_key.keyid, []
        for document, metadata, role, delegator in self.authorities():
            if keyid in delegator.get_delegated_role(role).keyids and document not in signed:
                metadata.sign(signer, append=True)
                signed.append(document)
        if not signed:
            raise Refused(f"{short(keyid)} is not the key of anything that changes here", code="wrong_key")
        return signed

    def closed(self) -> Change:
        """The change with the signatures it has by now."""
        return msgspec.structs.replace(
            self.change,
            root=self.root.to_bytes().decode() if self.root is not None else None,
            targets=self.targets.to_bytes().decode() if self.targets is not None else None,
            roles={name: role.to_bytes().decode() for name, role in self.roles.items()},
        )

    def differences(self) -> list[str]:
        """What the change does, in sentences, computed from the old and the new metadata."""
        found = []
        if self.root is not None:
            found += [f"root version {self.root.signed.version}, good until {self.root.signed.expires:%Y-%m-%d}"]
            found += _rekeyed(self.base_root.signed, self.root.signed, list(self.root.signed.roles))
        if self.targets is not None:
            found += [f"targets version {self.targets.signed.version}, good until {self.targets.signed.expires:%Y-%m-%d}"]
            found += _redelegated(self.base_targets.signed, self.targets.signed)
        for name, role in self.roles.items():
            found.append(f"{name} version {role.signed.version}, {len(role.signed.targets)} releases")
        return found


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


def read(data: bytes) -> Change:
    """Raises: Invalid."""
    try:
        return decode(data, Change, limit_bytes=MAX_CHANGE_BYTES)
    except ContractError as error:
        raise Invalid(f"this is not a key change: {error}", code="bad_change") from error


def write(change: Change) -> bytes:
    return encode(change) + b"\n"


def say(need: Need) -> str:
    who = ", ".join(short(keyid) for keyid in need.keyids)
    return f"{need.document} needs {need.missing} more signature{'s' if need.missing > 1 else ''} of: {who}"


def short(keyid: str) -> str:
    """A key id as people read it."""
    return keyid[:12]


def check_key(key: Key) -> None:
    """Raises: Invalid when some device could not verify with it."""
    if key.keytype not in KEY_TYPES:
        raise Invalid(
            f"keys of type {key.keytype!r} cannot be trusted: devices verify {', '.join(sorted(KEY_TYPES))}", code="key_type"
        )


def _check_root(root: Root) -> None:
    if not root.consistent_snapshot:
        raise Invalid("root must keep consistent_snapshot: devices ask for versions", code="bad_change")
    for role in root.roles:
        _reachable(root.roles[role].threshold, root.roles[role].keyids, role)
    for key in root.keys.values():
        check_key(key)


def _check_delegations(targets: Targets) -> None:
    """So that a mistake in a hand-made change cannot end the fleet's updates."""
    delegations = targets.delegations
    if delegations is None or not delegations.roles or ASSIGNMENTS not in delegations.roles or targets.targets:
        raise Invalid("targets must delegate to assignments and list no target of its own", code="bad_change")
    for key in delegations.keys.values():
        check_key(key)
    names = list(publishers.roles(targets))
    if RELEASES in names and names[-1] != RELEASES:
        raise Invalid(f"publisher {RELEASES!r} must stand last: it has every name", code="bad_change")
    for name, role in delegations.roles.items():
        _reachable(role.threshold, role.keyids, name)
        folder = "assignments" if name == ASSIGNMENTS else "releases"
        if not role.terminating or not role.paths or any(not path.startswith(f"{folder}/") for path in role.paths):
            raise Invalid(f"role {name!r} must end the search and have only paths below {folder}/", code="bad_change")
    seen: list[str] = []
    for name in names:
        for pattern in publishers.patterns(delegations.roles[name]):
            if pattern != EVERY_MODEL and any(publishers.meet(pattern, other) for other in seen):
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
        if name in opened.roles or name not in publishers.roles(opened.next_targets):
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


def _known(keyids: list[str], wanted: list[str], role: str) -> list[str]:
    """The full key ids for what people wrote: their beginnings do."""
    found = []
    for text in wanted:
        matches = [keyid for keyid in keyids if keyid.startswith(text)]
        if len(matches) != 1:
            has = ", ".join(short(keyid) for keyid in keyids)
            raise NotFound(f"role {role!r} has {'no' if not matches else 'more than one'} key {text!r}; it has {has}")
        found += matches
    return found


def _reachable(threshold: int, keyids: list[str], role: str) -> int:
    if not 1 <= threshold <= len(set(keyids)):
        raise Conflict(f"role {role!r} would need {threshold} signatures and have {len(set(keyids))} keys", code="threshold")
    return threshold


def _parse(text: str, kind: type[T]) -> Metadata[T]:
    try:
        metadata: Metadata[T] = Metadata.from_bytes(text.encode())
    except (RepositoryError, RecursionError) as error:
        raise Invalid(f"a document of this change cannot be read: {error}", code="bad_change") from error
    if not isinstance(metadata.signed, kind):
        raise Invalid(f"a document of this change is of type {metadata.signed.type!r}", code="bad_change")
    return metadata


def _rekeyed(old: Root | Targets, new: Root | Targets, roles: list[str]) -> list[str]:
    found = []
    for name in roles:
        before, after = old.get_delegated_role(name), new.get_delegated_role(name)
        found += [f"{name} trusts key {short(key)} from now on" for key in after.keyids if key not in before.keyids]
        found += [f"{name} no longer trusts key {short(key)}" for key in before.keyids if key not in after.keyids]
        if before.threshold != after.threshold:
            found.append(f"{name} needs {after.threshold} signatures instead of {before.threshold}")
    return found


def _redelegated(old: Targets, new: Targets) -> list[str]:
    before = (old.delegations.roles if old.delegations else None) or {}
    after = (new.delegations.roles if new.delegations else None) or {}
    found = [f"publisher {name} is removed: what it signed is no longer trusted" for name in before if name not in after]
    for name in after:
        if name not in before:
            role = after[name]
            who = ", ".join(short(keyid) for keyid in role.keyids)
            found.append(f"publisher {name} may sign {', '.join(publishers.patterns(role))}: {role.threshold} of {who}")
        elif before[name].paths != after[name].paths:
            found.append(f"publisher {name} may sign {', '.join(publishers.patterns(after[name]))} from now on")
    return found + _rekeyed(old, new, [name for name in after if name in before])
