"""Who is trusted: showing it, proposing a change of it, and applying what the offline keys signed. What a change may be:
`key_rules.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec
from securesystemslib.signer import Key  # type: ignore[attr-defined]
from tuf.api.metadata import DelegatedRole, Role, Root, Targets  # type: ignore[attr-defined]

from fleet_server.access import Actor
from fleet_server.errors import Conflict, Invalid, NotFound
from fleet_server.journal import Happening, Journal
from fleet_server.releases import delegations, key_change, publication
from fleet_server.releases.delegations import ASSIGNMENTS
from fleet_server.releases.key_changes import KeyChanges
from fleet_server.releases.key_draft import Draft
from fleet_server.releases.key_rules import check_key
from fleet_server.releases.online_keys import ONLINE
from fleet_server.releases.repository import Repository
from fleet_server.storage.database import Database

WARN_BEFORE_S = 45 * 86400.0
"""How long before the end of offline metadata a person is told: several office months have holidays in them."""

EVERY_ONLINE = "online"


class Wish(msgspec.Struct, frozen=True):
    """A change that an operator asks for. `role`: root, targets, a publisher, an online role, or `online` for all three of
    those.
    """

    action: str
    role: str
    add: tuple[dict[str, Any], ...] = ()
    remove: tuple[str, ...] = ()
    threshold: int | None = None
    patterns: tuple[str, ...] = ()


class KeyView(msgspec.Struct, frozen=True):
    """A key of a role."""

    keyid: str
    type: str


class RoleView(msgspec.Struct, frozen=True, kw_only=True):
    """A role with its keys. `expires`: when what it signed ends, None when it signed nothing yet; `patterns`: of a publisher,
    the models that it may sign.
    """

    role: str
    kind: Literal["offline", "publisher", "online"]
    version: int
    threshold: int
    expires: float | None
    state: Literal["unused", "expired", "ends soon", "ok"]
    keys: list[KeyView]
    patterns: list[str] | msgspec.UnsetType = msgspec.UNSET


class Trusted(msgspec.Struct, frozen=True):
    """Who is trusted: every role."""

    roles: list[RoleView]


class Trust:
    """Shows and changes who is trusted."""

    def __init__(
        self, database: Database, repository: Repository, changes: KeyChanges, journal: Journal, clock: Callable[[], float]
    ) -> None:
        self._database, self._repository, self._changes = database, repository, changes
        self._journal, self._clock = journal, clock

    def status(self) -> Trusted:
        """Every role with its keys, threshold, version, end, and who may sign which models."""
        repository = self._repository
        root, targets = repository.root_role().signed, repository.targets_role().signed
        expires, versions = repository.expirations(), repository.versions()
        found = [self._role(name, "offline", root.roles[name], root, versions, expires) for name in ("root", "targets")]
        for name, delegated in delegations.roles(targets).items():
            row = self._role(name, "publisher", delegated, targets, versions, expires)
            found.append(msgspec.structs.replace(row, patterns=delegations.patterns(delegated)))
        for name in ONLINE:
            delegator: Root | Targets = targets if name == ASSIGNMENTS else root
            found.append(self._role(name, "online", delegator.get_delegated_role(name), delegator, versions, expires))
        return Trusted(found)

    def _role(
        self, name: str, kind: Literal["offline", "publisher", "online"], role: Role | DelegatedRole, delegator: Root | Targets,
        versions: dict[str, int], expires: dict[str, float],
    ) -> RoleView:  # fmt: skip
        ends = expires.get(name)
        return RoleView(
            role=name, kind=kind, version=versions.get(name, 0), threshold=role.threshold, expires=ends, state=self._state(kind, ends),
            keys=[KeyView(keyid, delegator.get_key(keyid).keytype) for keyid in role.keyids],
        )  # fmt: skip

    def _state(self, kind: str, ends: float | None) -> Literal["unused", "expired", "ends soon", "ok"]:
        if ends is None:
            return "unused"  # a publisher that signed nothing yet
        left = ends - self._clock()
        if left <= 0:
            return "expired"
        return "ends soon" if kind != "online" and left < WARN_BEFORE_S else "ok"

    def propose(self, actor: Actor, wish: Wish) -> bytes:
        """The change, for the offline keys to sign.  Raises: Invalid, NotFound, Conflict."""
        draft = self._changes.draft()
        published = sorted(
            {ref.model for role in self._repository.publishers().values() for ref in publication.published(role.signed)}
        )
        _ACTIONS[_known(wish.action)](self, draft, wish, published)
        data = key_change.write(draft.change())
        with self._database.session() as session:
            self._journal.audit(session, actor, "keys.propose", wish.role, what=wish.action)
        return data

    def apply(self, actor: Actor, data: bytes) -> list[str]:
        """Makes a signed change trusted; what it did, in sentences.  Raises: see key_rules.check."""
        opened = self._changes.apply(key_change.read(data))
        done = opened.differences()
        with self._database.session() as session:
            self._journal.audit(session, actor, "keys.apply", "root" if opened.root is not None else "targets", done=done)
            happening = Happening(name="keys_changed", message=f"who is trusted changed: {'; '.join(done)}")
            event = self._journal.record(session, happening)
        self._journal.announce([event])
        self._journal.changed("keys")
        return done

    def resign(self, actor: Actor, publisher: str, metadata: bytes) -> publication.Resigned:
        """Makes a publisher's role trusted that adds no release: renewed, or with one release reinstated.  Raises: see
        publication.
        """
        trusted = self._repository.releases(publisher)
        delegator = self._repository.targets_role().signed
        if trusted is None or publisher not in delegations.roles(delegator):
            raise NotFound(f"publisher {publisher!r} has signed nothing yet")
        checked = publication.check_resigned(trusted.signed, delegator, metadata, self._clock(), publisher)
        self._repository.publish_role(publisher, metadata, checked.version)
        with self._database.session() as session:
            what = "release.reinstate" if checked.reinstated else "keys.renew"
            self._journal.audit(session, actor, what, str(checked.reinstated or publisher), signers=list(checked.signers))
        return checked

    # -- what a wish does to a draft ---------------------------------------------------------------------------------------

    def _renew(self, draft: Draft, wish: Wish, _: list[str]) -> None:
        if wish.role in ONLINE or wish.role == EVERY_ONLINE:
            raise Conflict("the server renews what it signs itself; nothing is to be done", code="online_role")
        draft.renew(wish.role)

    def _rotate(self, draft: Draft, wish: Wish, _: list[str]) -> None:
        if wish.role in ONLINE or wish.role == EVERY_ONLINE:
            if wish.add or wish.remove or wish.threshold:
                raise Invalid("the server makes its own keys; name none, and no threshold")
            roles = list(ONLINE) if wish.role == EVERY_ONLINE else [wish.role]
            draft.use_online(self._changes.propose_online_keys(roles))
            return
        if not wish.add and not wish.remove and wish.threshold is None:
            raise Invalid("say which keys come (--add) and go (--remove), or another --threshold")
        draft.use_offline(wish.role, [parse_key(key) for key in wish.add], list(wish.remove), wish.threshold)

    def _add_publisher(self, draft: Draft, wish: Wish, published: list[str]) -> None:
        new = [parse_key(key) for key in wish.add]
        threshold = 1 if wish.threshold is None else wish.threshold
        draft.add_publisher(wish.role, list(wish.patterns), new, threshold, published=published)

    def _remove_publisher(self, draft: Draft, wish: Wish, _: list[str]) -> None:
        draft.remove_publisher(wish.role)


_ACTIONS: dict[str, Callable[[Trust, Draft, Wish, list[str]], None]] = {
    "renew": Trust._renew,  # noqa: SLF001
    "rotate": Trust._rotate,  # noqa: SLF001
    "add-publisher": Trust._add_publisher,  # noqa: SLF001
    "remove-publisher": Trust._remove_publisher,  # noqa: SLF001
}


def _known(action: str) -> str:
    if action not in _ACTIONS:
        raise Invalid(f"action {action!r} is not one of {', '.join(_ACTIONS)}")
    return action


def parse_key(key: dict[str, Any]) -> Key:
    """A public key as `edge-fleet keys public` prints it.  Raises: Invalid."""
    data = dict(key)
    try:
        parsed = Key.from_dict(str(data.pop("keyid")), data)
    except Exception as error:  # securesystemslib raises KeyError, ValueError, TypeError… for a malformed key
        raise Invalid(f"this is not a public key: {error}", code="bad_key") from error
    check_key(parsed)
    return parsed
