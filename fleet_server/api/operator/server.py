"""Routes about the server and the caller: status, who asks, the browser's session."""

from __future__ import annotations

from typing import Protocol

import msgspec
from fastapi import Request
from starlette.responses import Response

from fleet_server.access import Access, Role
from fleet_server.api.operator.bodies import SignIn
from fleet_server.api.operator.routes import COOKIE, Done, Raw, Route, actor_of, client_of, reply
from fleet_server.metrics import TEXT, Metrics
from fleet_server.sign_in import SignIns, WrongTokens
from fleet_server.status import Status, StatusView


class Parts(Protocol):
    access: Access
    metrics: Metrics
    sign_ins: SignIns
    wrong_tokens: WrongTokens
    status: Status


class Caller(msgspec.Struct, frozen=True):
    """Whose access token or session it is, and what it may do."""

    name: str
    role: Role


def status(parts: Parts) -> StatusView:
    """How the server is: devices, broker, when what is signed ends, and what a person should see to."""
    return parts.status.view()


def metrics(parts: Parts) -> Response:
    """What the server counts, as Prometheus reads it."""
    return Response(parts.metrics.text(), media_type=TEXT)


def me(_parts: Parts, request: Request) -> Caller:
    """Whose access token or session this is, and its role."""
    actor = actor_of(request)
    return Caller(actor.name, actor.role)


def sign_in(parts: Parts, request: Request, body: SignIn) -> Response:
    """Opens a browser session for whoever shows an access token."""
    actor, cookie = parts.sign_ins.open(body.token, client_of(request))
    response = reply(Caller(actor.name, actor.role))
    response.set_cookie(COOKIE, cookie, httponly=True, samesite="strict", secure=request.url.scheme == "https", path="/")
    return response


def sign_out(parts: Parts, request: Request) -> Response:
    """Ends the browser session."""
    parts.access.close_session(request.cookies.get(COOKIE, ""))
    response = reply(Done())
    response.delete_cookie(COOKIE, path="/")
    return response


ROUTES = (
    Route("GET", "/status", status, Role.VIEWER),
    Route("GET", "/metrics", metrics, Role.VIEWER, answer=Raw("text/plain", {"type": "string"})),
    Route("GET", "/me", me, Role.VIEWER),
    Route("POST", "/session", sign_in, None, answer=Caller),
    Route("DELETE", "/session", sign_out, None, answer=Done),
)
