"""What a route is, and how a handler with types becomes an endpoint that FastAPI calls.

A handler is a function of the server's parts. What it returns is its answer's type in the OpenAPI document, so the two cannot
differ.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Protocol

import msgspec
from fastapi import Path as InPath
from fastapi import Query, Request
from starlette.responses import Response

from agent.contract.names import ReleaseRef
from fleet_server.access import BAD_TOKEN, Access, Actor, Role
from fleet_server.api.connections import address_of
from fleet_server.errors import Denied, Invalid, Refused
from fleet_server.sign_in import WrongTokens
from fleet_server.storage import once

API = "/api/v1"
COOKIE = "edge_fleet_session"
IDEMPOTENCY = "idempotency-key"
PROOF = "x-edge-fleet"  # a header no other site can make a browser send; asked of changes that a cookie authorises

Limit = Annotated[int, Query(ge=1, le=1000)]
Seq = Annotated[int | None, Query(ge=0, le=2**63 - 1)]
Number = Annotated[int, InPath(ge=1, le=2**53 - 1)]


class Done(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """It is done; there is nothing to say about it."""


class Raw(msgspec.Struct, frozen=True):
    """A body that is no JSON: its media type, and its schema."""

    media_type: str
    schema: dict[str, str]


class Route(msgspec.Struct, frozen=True):
    """One route of the API."""

    method: str
    path: str
    handler: Callable[..., Any]
    role: Role | None
    """The least role that may use it; None: the handler asks for a token itself."""
    answer: Any = None
    """The type of the answer, where the handler makes a response of its own."""
    body: Any = None
    """The type of the request's body, where the handler reads it by itself."""

    @property
    def name(self) -> str:
        return self.handler.__name__

    @property
    def answered(self) -> Any:
        """The type of the answer."""
        return self.answer if self.answer is not None else inspect.signature(self.handler, eval_str=True).return_annotation

    @property
    def summary(self) -> str:
        """What the handler's docstring says first; every handler has one."""
        assert self.handler.__doc__, f"{self.name} has no docstring"
        return self.handler.__doc__.strip().splitlines()[0].split(". ")[0].rstrip(".")


def endpoint(handler: Callable[..., Any], parts: Any) -> Callable[..., Any]:
    """The handler with its first parameter given, and its answer as a response."""
    signature = inspect.signature(handler, eval_str=True)
    if asyncio.iscoroutinefunction(handler):

        async def answering(**given: Any) -> Response:
            with _once(given.get("request")):
                return reply(await handler(parts, **given))
    else:

        def answering(**given: Any) -> Response:  # type: ignore[misc]
            with _once(given.get("request")):
                return reply(handler(parts, **given))

    parameters = list(signature.parameters.values())[1:]
    answering.__signature__ = signature.replace(parameters=parameters, return_annotation=Response)  # type: ignore[attr-defined]
    answering.__name__, answering.__doc__ = handler.__name__, handler.__doc__
    return answering


def _once(request: Request | None) -> AbstractContextManager[None]:
    """What the request changes is changed once for its Idempotency-Key, if it has one."""
    if request is None or request.method in {"GET", "HEAD"}:
        return nullcontext()
    whose = request.headers.get("authorization") or request.cookies.get(COOKIE, "")
    return once.only(request.headers.get(IDEMPOTENCY), f"{whose} {request.method} {request.url.path}")


def reply(value: Any) -> Response:
    """`value` as JSON; a response as it is."""
    return value if isinstance(value, Response) else Response(msgspec.json.encode(value), media_type="application/json")


# -- who asks --------------------------------------------------------------------------------------------------------------


class Door(Protocol):
    """What tells who asks."""

    access: Access
    wrong_tokens: WrongTokens


def guard(door: Door, role: Role) -> Callable[[Request], None]:
    """A dependency that lets nobody in below the role, and slows down who shows wrong access tokens."""

    def allowed(request: Request) -> None:
        try:
            actor = authenticate(door.access, request)
        except Denied as error:
            if error.code == BAD_TOKEN:
                door.wrong_tokens.note(client_of(request))
            raise
        if actor.by_cookie and request.method not in {"GET", "HEAD"} and PROOF not in request.headers:
            raise Refused(f"changes from a browser need the header {PROOF}", code="no_proof")
        if actor.role.rank < role.rank:
            raise Refused(
                f"this needs the role {role.value}; the token {actor.name!r} has {actor.role.value}", code="role_too_low"
            )
        request.state.actor = actor

    return allowed


def authenticate(access: Access, request: Request) -> Actor:
    """Raises: Denied."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return access.by_token(token.strip())
    if cookie := request.cookies.get(COOKIE):
        return access.by_session(cookie)
    raise Denied("send an access token as `Authorization: Bearer …`", code="no_token")


def client_of(request: Request) -> str:
    """The address that a request came from, as limits are kept for it."""
    return address_of(request.client.host if request.client else "")


def actor_of(request: Request) -> Actor:
    """Who asks, as the guard of the route found."""
    actor: Actor = request.state.actor
    return actor


def ref_of(text: str) -> ReleaseRef:
    """`digits:4`.  Raises: Invalid."""
    try:
        return ReleaseRef.parse(text)
    except ValueError as error:
        raise Invalid(str(error)) from error
