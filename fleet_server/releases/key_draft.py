"""The metadata in force, being changed into the next version of it: other keys, other publishers, another year. Pure."""

from __future__ import annotations

import copy
import datetime as dt
from typing import TypeVar

from securesystemslib.signer import Key  # type: ignore[attr-defined]
from tuf.api.metadata import DelegatedRole, Metadata, Root, Targets  # type: ignore[attr-defined]

from fleet_server.errors import Conflict, Invalid, NotFound
from fleet_server.releases import delegations
from fleet_server.releases.delegations import ASSIGNMENTS, RELEASES
from fleet_server.releases.key_change import OFFLINE_EXPIRY_S, Change, short
from fleet_server.releases.key_rules import check_key, reachable

T = TypeVar("T", Root, Targets)


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
        """Other keys for root, targets or a publisher. A change of `root` changes `targets` too where both have the same keys.

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
        delegated.threshold = reachable(delegated.threshold if threshold is None else threshold, delegated.keyids, role)
        self._touched.add("targets")
        if role in self._roles:
            self._touched.add(role)

    def add_publisher(self, name: str, patterns: list[str], keys: list[Key], threshold: int, *, published: list[str]) -> None:
        """Lets a publisher sign releases of the models that the patterns match.  Raises: Invalid, Conflict."""
        delegations.check_name(name)
        roles = delegations.roles(self.targets)
        if name in roles or name in self._roles:
            raise Conflict(f"there is, or was, a publisher {name!r} already; choose another name", code="exists")
        delegations.check_patterns(self.targets, patterns, published=published)
        for key in keys:
            check_key(key)
        threshold = reachable(threshold, [key.keyid for key in keys], name)
        delegated = self.targets.delegations
        assert delegated is not None
        assert delegated.roles is not None
        role = DelegatedRole(name, [], threshold, terminating=True, paths=[f"releases/{pattern}/*" for pattern in patterns])
        last = {RELEASES: delegated.roles.pop(RELEASES)} if RELEASES in delegated.roles else {}
        delegated.roles.update({name: role, **last})
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
        top.threshold = reachable(top.threshold if threshold is None else threshold, top.keyids, role)

    def _delegation(self, name: str) -> DelegatedRole:
        found = (self.targets.delegations.roles if self.targets.delegations else None) or {}
        if name not in found:
            raise NotFound(f"there is no role or publisher {name!r}; `edge-fleet keys status` lists them")
        return found[name]

    def _next(self, metadata: Metadata[T]) -> None:
        metadata.signed.version += 1
        metadata.signed.expires = self._ends
        metadata.signatures.clear()


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
