"""Routes about who is trusted: roles and their keys, and changes of them."""

from __future__ import annotations

from typing import Protocol

import msgspec
from fastapi import Request

from fleet_server.access import Role
from fleet_server.api.operator.bodies import KeyWish, SignedChange
from fleet_server.api.operator.routes import Route, actor_of
from fleet_server.releases.trust import Trust, Trusted, Wish


class Parts(Protocol):
    trust: Trust


class ProposedChange(msgspec.Struct, frozen=True):
    """A change of keys as a file for the offline keys to sign, as text."""

    change: str


class AppliedChange(msgspec.Struct, frozen=True):
    """What a change of keys did, in sentences."""

    done: list[str]


def keys(parts: Parts) -> Trusted:
    """Who is trusted: every role with its keys, threshold, version and end."""
    return parts.trust.status()


def propose_change(parts: Parts, request: Request, body: KeyWish) -> ProposedChange:
    """Makes a change of keys for the offline keys to sign. Nothing changes by this alone."""
    add = tuple(key.model_dump() for key in body.add)
    wish = Wish(body.action, body.role, add, tuple(body.remove), body.threshold, tuple(body.patterns))
    return ProposedChange(parts.trust.propose(actor_of(request), wish).decode())


def apply_change(parts: Parts, request: Request, body: SignedChange) -> AppliedChange:
    """Makes a signed change of keys trusted, when it has every signature it needs."""
    return AppliedChange(parts.trust.apply(actor_of(request), body.change.encode()))


ROUTES = (
    Route("GET", "/keys", keys, Role.VIEWER),
    Route("POST", "/keys/changes", propose_change, Role.ADMIN),
    Route("POST", "/keys/apply", apply_change, Role.ADMIN),
)
