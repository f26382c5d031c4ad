"""What a peer may do: from its kernel-given uid and groups to a class of access. A larger class includes the smaller."""

from __future__ import annotations

import grp
import pwd
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from agent.config import AccessRule, ConfigError, ServeSettings
from agent.host.peer import Peer
from agent.serving.answers import Refusal


class Access(IntEnum):
    NONE = 0
    PREDICT = 1
    OBSERVE = 2
    CONTROL = 3

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Grant:
    """What one peer may do. `models` names the only models it may ask for predictions; None is all of them."""

    access: Access
    who: str
    models: frozenset[str] | None = None

    def check(self, needed: Access, model: str | None = None) -> None:
        """Raises: Refusal (403) saying which class is missing and where it is granted."""
        if self.access < needed:
            raise Refusal(
                403,
                f"this needs access class '{needed}', {self.who} has '{self.access}': "
                "grant it under serve.access in agent.yaml (a rule with uids or gids)",
                code="forbidden",
            )
        if model is not None and self.models is not None and model not in self.models:
            raise Refusal(
                403,
                f"{self.who} may use the models {', '.join(sorted(self.models))}, not '{model}': "
                "add it to the rule's models under serve.access in agent.yaml",
                code="forbidden",
            )


@dataclass(frozen=True, slots=True)
class _Rule:
    access: Access
    uids: frozenset[int]
    gids: frozenset[int]
    models: frozenset[str]


class AccessTable:
    """The rules of serve.access. uid 0 and the server's own uid have control whatever the rules say."""

    def __init__(self, settings: ServeSettings, own_uid: int) -> None:
        self._everyone = Access[settings.everyone.upper()]
        self._rules = tuple(_compiled(rule) for rule in settings.access)
        self._masters = frozenset({0, own_uid})

    def grant(self, peer: Peer) -> Grant:
        """A peer has the largest class of `everyone` and the rules that match it. If each of those rules names models, it may use only these."""
        who = f"uid {peer.uid}"
        if peer.uid in self._masters:
            return Grant(Access.CONTROL, who)
        matching = [rule for rule in self._rules if peer.uid in rule.uids or peer.gids & rule.gids]
        access = max([self._everyone, *(rule.access for rule in matching)])
        if matching and all(rule.models for rule in matching):
            return Grant(access, who, frozenset().union(*(rule.models for rule in matching)))
        return Grant(access, who)


def _compiled(rule: AccessRule) -> _Rule:
    return _Rule(
        Access[rule.allow.upper()],
        frozenset(_ids(rule.uids, "uids")),
        frozenset(_ids(rule.gids, "gids")),
        frozenset(rule.models),
    )


def _ids(names: Iterable[int | str], setting: str) -> Iterable[int]:
    for name in names:
        if isinstance(name, int):
            yield name
            continue
        try:
            yield pwd.getpwnam(name).pw_uid if setting == "uids" else grp.getgrnam(name).gr_gid
        except KeyError:
            kind = "user" if setting == "uids" else "group"
            raise ConfigError(f"serve.access: {setting} names {name!r}, but there is no such {kind} on this machine") from None
