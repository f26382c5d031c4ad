"""Routes about access tokens."""

from __future__ import annotations

from typing import Protocol

from fastapi import Request

from fleet_server.access import Access, AccessTokenMade, AccessTokenView, Role
from fleet_server.api.operator.bodies import NewAccessToken
from fleet_server.api.operator.routes import Route, actor_of
from fleet_server.journal import Journal
from fleet_server.storage.database import Database


class Parts(Protocol):
    access: Access
    database: Database
    journal: Journal


def create_access_token(parts: Parts, request: Request, body: NewAccessToken) -> AccessTokenMade:
    """Makes an access token with a role. `token` is shown this once."""
    made = parts.access.create(body.name, body.role)
    with parts.database.session() as session:
        parts.journal.audit(session, actor_of(request), "access.create", made.id, name=body.name, of=body.role.value)
    return made


def access_tokens(parts: Parts) -> list[AccessTokenView]:
    """Lists access tokens, without the tokens themselves."""
    return parts.access.tokens()


def revoke_access_token(parts: Parts, request: Request, token: str) -> AccessTokenView:
    """Makes an access token useless and ends its browser sessions."""
    view = parts.access.revoke(token)
    with parts.database.session() as session:
        parts.journal.audit(session, actor_of(request), "access.revoke", token)
    return view


ROUTES = (
    Route("POST", "/access-tokens", create_access_token, Role.ADMIN),
    Route("GET", "/access-tokens", access_tokens, Role.ADMIN),
    Route("DELETE", "/access-tokens/{token}", revoke_access_token, Role.ADMIN),
)
