"""Who is trusted: showing it, proposing a change, taking in what the offline keys signed. What a change may be: `change.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from securesystemslib.signer import Key  # type: ignore[attr-defined]
from tuf.api.metadata import DelegatedRole, Role, Root, Targets  # type: ignore[attr-defined]

from fleet_server.access import Actor
from fleet_server.errors import Conflict, Invalid, NotFound
from fleet_server.journal import Happening, Journal
from fleet_server.releases import change as changes
from fleet_server.releases import publication, publishers
from fleet_server.releases.change import Draft
from fleet_server.releases.online import ONLINE
from fleet_server.releases.publishers import ASSIGNMENTS
from fleet_server.releases.repository import Repository
from fleet_server.storage.database import Database

WARN_BEFORE_S = 45 * 86400.0
"""How long before the end of offline metadata a person is told: several office months have holidays in them."""

EVERY_ONLINE = "online"


class Wish(msgspec.Struct, frozen=True):
    """A change that an operator asks for. `role`: root, targets, a publisher, an online role, or `online` for all three of those."""

    action: str
    role: str
    add: tuple[dict[str, Any], ...] = ()
    remove: tuple[str, ...] = ()
    threshold: int | None = None
    patterns: tuple[str, ...] = ()


class Ceremonies:
    def __init__(self, database: Database, repository: Repository, journal: Journal, clock: Callable[[], float]) -> None:
        self._database, self._repository, self._journal, self._clock = database, repository, journal, clock

    def status(self) -> dict[str, Any]:
        """Every role with its keys, threshold, version, end, and who may sign which models."""
        repository = self._repository
        root, targets = repository.root_role().signed, repository.targets_role().signed
        expires, versions = repository.expirations(), repository.versions()
        found = [self._role(name, "offline", root.roles[name], root, versions, expires) for name in ("root", "targets")]
        for name, delegated in publishers.roles(targets).items():
            row = self._role(name, "publisher", delegated, targets, versions, expires)
            found.append({**row, "patterns": publishers.patterns(delegated)})
        for name in ONLINE:
            delegator: Root | Targets = targets if name == ASSIGNMENTS else root
            found.append(self._role(name, "online", delegator.get_delegated_role(name), delegator, versions, expires))
        return {"roles": found}

    def _role(
        self, name: str, kind: str, role: Role | DelegatedRole, delegator: Root | Targets, versions: dict[str, int],
        expires: dict[str, float],
    ) -> dict[str, Any]:  # fmt: skip
        ends = expires.get(name)
        return {
            "role": name, "kind": kind, "version": versions.get(name, 0), "threshold": role.threshold, "expires": ends,
            "state": self._state(kind, ends),
            "keys": [{"keyid": keyid, "type": delegator.get_key(keyid).keytype} for keyid in role.keyids],
        }  # fmt: skip

    def _state(self, kind: str, ends: float | None) -> str:
        if ends is None:
            return "unused"  # a publisher that signed nothing yet
        left = ends - self._clock()
        if left <= 0:
            return "expired"
        return "ends soon" if kind != "online" and left < WARN_BEFORE_S else "ok"

    def propose(self, actor: Actor, wish: Wish) -> bytes:
        """The change, for the offline keys to sign.  Raises: Invalid, NotFound, Conflict."""
        draft = self._repository.draft()
        published = sorted(
            {ref.model for role in self._repository.publishers().values() for ref in publication.published(role.signed)}
        )
        _ACTIONS[_known(wish.action)](self, draft, wish, published)
        data = changes.write(draft.change())
        with self._database.session() as session:
            self._journal.audit(session, actor, "keys.propose", wish.role, what=wish.action)
        return data

    def apply(self, actor: Actor, data: bytes) -> list[str]:
        """Makes a signed change trusted; what it did, in sentences.  Raises: see change.check."""
        opened = self._repository.apply(changes.read(data))
        done = opened.differences()
        with self._database.session() as session:
            self._journal.audit(session, actor, "keys.apply", "root" if opened.root is not None else "targets", done=done)
            happening = Happening(name="keys_changed", message=f"who is trusted changed: {'; '.join(done)}")
            event = self._journal.record(session, happening)
        self._journal.announce([event])
        self._journal.changed("keys")
        return done

    def resign(self, actor: Actor, publisher: str, metadata: bytes) -> publication.Resigned:
        """Takes in a publisher's role that adds no release: a renewal, or the lift of a withdrawal.  Raises: see publication."""
        trusted = self._repository.releases(publisher)
        delegator = self._repository.targets_role().signed
        if trusted is None or publisher not in publishers.roles(delegator):
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
            draft.use_online(self._repository.propose_online_keys(roles))
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


_ACTIONS: dict[str, Callable[[Ceremonies, Draft, Wish, list[str]], None]] = {
    "renew": Ceremonies._renew,  # noqa: SLF001
    "rotate": Ceremonies._rotate,  # noqa: SLF001
    "add-publisher": Ceremonies._add_publisher,  # noqa: SLF001
    "remove-publisher": Ceremonies._remove_publisher,  # noqa: SLF001
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
    changes.check_key(parsed)
    return parsed
