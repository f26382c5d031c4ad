"""A change of who is trusted, as a file: proposed where the server is, signed where the offline keys are, applied by the
server.

Nothing in the file is secret and nothing in it is believed: signers see the difference between the metadata that is in force
and the new one, computed from both, and the server applies it only when every document has the signatures it needs. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeVar

import msgspec
from securesystemslib.signer import Key, Signer  # type: ignore[attr-defined]
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Targets  # type: ignore[attr-defined]

from agent.contract.codec import FORMAT, ContractError, Document, decode, encode, require_format
from fleet_server.errors import Invalid, Refused
from fleet_server.releases import delegations

OFFLINE_EXPIRY_S = 365 * 86400.0
"""What the offline keys sign is believed for a year."""

MAX_CHANGE_BYTES = 32 * 1024 * 1024

T = TypeVar("T", Root, Targets)


class Change(Document, frozen=True, kw_only=True):
    """Metadata as text. `base_*` is what was in force when the change was proposed; `roles` are publishers' roles to be signed."""

    base_root: str
    base_targets: str
    root: str | None = None
    targets: str | None = None
    roles: dict[str, str] = {}
    kind: Literal["key-change"] = "key-change"
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "key change")


class Need(msgspec.Struct, frozen=True):
    """`document` still needs `missing` signatures of `keyids` (the keys that have not signed yet)."""

    document: str
    role: str
    missing: int
    keyids: tuple[str, ...]


class Opened:
    """A change with its metadata parsed.  Raises: Invalid when it cannot be read."""

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
            found.append(f"publisher {name} may sign {', '.join(delegations.patterns(role))}: {role.threshold} of {who}")
        elif before[name].paths != after[name].paths:
            found.append(f"publisher {name} may sign {', '.join(delegations.patterns(after[name]))} from now on")
    return found + _rekeyed(old, new, [name for name in after if name in before])
