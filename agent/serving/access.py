"""What a peer may do: from its kernel-given uid and groups to a class of access. A larger class includes the smaller."""

from __future__ import annotations

import grp
import ipaddress
import pwd
from collections.abc import Iterable, Mapping
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
class WebRules:
    """What a request on the loopback port must say besides, because a browser on this machine can be made to send there.

    A page from elsewhere that has its own name resolved to 127.0.0.1 says that name as the host; any other page says its
    origin.
    """

    origins: frozenset[str] = frozenset()

    def check(self, fields: Mapping[bytes, bytes]) -> Refusal | None:
        """The refusal of a request with these headers (lower-case names), None when it may pass."""
        host = fields.get(b"host")
        if host is not None and not _is_loopback_name(host):
            return Refusal(403, f"host {_text(host)} is not this machine's loopback: ask for localhost or 127.0.0.1")
        origin = fields.get(b"origin")
        if origin is not None and origin.decode("latin-1") not in self.origins:
            return Refusal(403, f"pages of {_text(origin)} may not ask here: name it in serve.http_origins in agent.yaml")
        return None


def _is_loopback_name(host: bytes) -> bool:
    text = host.decode("latin-1").lower()
    name, _, port = text.rpartition(":") if ":" in text and not text.endswith("]") else (text, "", "")
    if port and not port.isdecimal():
        return False
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name).is_loopback
    except ValueError:
        return False


def _text(value: bytes) -> str:
    return repr(value[:64].decode("ascii", "replace"))


@dataclass(frozen=True, slots=True)
class Grant:
    """What one peer may do. `models` names the only models it may ask for predictions; None is all of them.

    `uid` is the peer's, None where nobody vouches for it. `web` is set on the loopback port.
    """

    access: Access
    who: str
    models: frozenset[str] | None = None
    uid: int | None = None
    web: WebRules | None = None

    def check(self, needed: Access, model: str | None = None) -> None:
        """Raises: Refusal (403) saying which class is missing and where it is granted."""
        if self.access < needed:
            raise Refusal(
                403,
                f"this needs access class '{needed}', {self.who} has '{self.access}': "
                + (
                    "grant it as serve.http_access in agent.yaml, or ask on the Unix socket"
                    if self.web
                    else "grant it under serve.access in agent.yaml (a rule with uids or gids)"
                ),
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
        self.http = Grant(
            Access[settings.http_access.upper()], "the loopback port", web=WebRules(frozenset(settings.http_origins))
        )

    def grant(self, peer: Peer) -> Grant:
        """A peer has the largest class of `everyone` and the rules that match it. If each of those rules names models, it may
        use only these.
        """
        who = f"uid {peer.uid}"
        if peer.uid in self._masters:
            return Grant(Access.CONTROL, who, uid=peer.uid)
        matching = [rule for rule in self._rules if peer.uid in rule.uids or peer.gids & rule.gids]
        access = max([self._everyone, *(rule.access for rule in matching)])
        if matching and all(rule.models for rule in matching):
            return Grant(access, who, frozenset().union(*(rule.models for rule in matching)), peer.uid)
        return Grant(access, who, uid=peer.uid)


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
