"""The operators' application: REST under /api/v1, the page, and the two routes by which a device joins.

`SUBJECTS` is the whole API: what is in none of its tables does not exist, and each entry says the least role that may use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.responses import FileResponse, Response

from fleet_server.api import http
from fleet_server.api.health import Health
from fleet_server.api.operator import access, ca, devices, document, enrolment, events, groups, keys, releases, rollouts, server
from fleet_server.api.operator.routes import API, Route, endpoint, guard

HEALTH = "/health"
STATIC = Path(__file__).parents[2] / "web" / "static"

SUBJECTS: Mapping[str, tuple[Route, ...]] = {
    "server": server.ROUTES,
    "devices": devices.ROUTES,
    "groups": groups.ROUTES,
    "enrolment": enrolment.ROUTES,
    "ca": ca.ROUTES,
    "access": access.ROUTES,
    "releases": releases.ROUTES,
    "keys": keys.ROUTES,
    "rollouts": rollouts.ROUTES,
    "events": events.ROUTES,
}
ROUTES = tuple(route for routes in SUBJECTS.values() for route in routes)

RENAMED = {f"{API}/stopped-classes": f"{API}/exclusions"}
"""Paths that were called otherwise → what they are called now."""

KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


class Parts(
    server.Parts,
    devices.Parts,
    groups.Parts,
    enrolment.Parts,
    ca.Parts,
    access.Parts,
    releases.Parts,
    keys.Parts,
    rollouts.Parts,
    events.Parts,
    Protocol,
):
    """What this application needs of the server."""

    def health(self) -> Health: ...


def build(parts: Parts, *, title: str = "edge-fleet", version: str = "0") -> FastAPI:
    """The application of the operator and loopback listeners."""
    app = FastAPI(
        title=title, version=version, docs_url=None, redoc_url=None, openapi_url=f"{API}/openapi.json",
        description="Devices, releases and rollouts of one fleet. Errors are `{error, code}`.",
    )  # fmt: skip
    bearer = HTTPBearer(auto_error=False, description="an access token")
    described: list[tuple[str, str, Route]] = []

    def add(path: str, route: Route, tag: str) -> None:
        needed = [Depends(bearer), Depends(guard(parts, route.role))] if route.role else []
        for method in ["GET", "HEAD"] if path.startswith(f"{API}/blobs") and route.method == "GET" else [route.method]:
            name = route.name if method != "HEAD" else f"{route.name}_head"
            app.add_api_route(
                path, endpoint(route.handler, parts), methods=[method], dependencies=needed, tags=[tag], operation_id=name, name=name,
                summary=route.summary, response_model=None, openapi_extra={"x-role": route.role.value if route.role else ""},
            )  # fmt: skip
            described.append((path, method.lower(), route))

    for tag, routes in SUBJECTS.items():
        for route in routes:
            add(API + route.path, route, tag)
    for route in enrolment.JOINING:
        add(route.path, route, "enrolment")
    app.add_api_route(HEALTH, _health(parts), methods=["GET"], include_in_schema=False, response_model=None)
    _add_page(app)
    http.install(app, unlimited=f"{API}/blobs/", renamed=RENAMED)
    document.install(app, described)
    return app


def described_api() -> dict[str, Any]:
    """What `edge-fleet openapi` prints and the server serves; made without a server, as no route is called. `x-role` of an
    operation is the least role that may use it.
    """

    class NoParts:
        access = None

    return build(NoParts()).openapi()  # type: ignore[arg-type]


def _health(parts: Parts) -> Callable[[], Response]:
    """Whether requests may be sent here, for balancers: anybody may ask."""

    def health() -> Response:
        found = parts.health()
        return Response(msgspec.json.encode(found), 200 if found.ready else 503, media_type="application/json")

    return health


def _add_page(app: FastAPI) -> None:
    def serve(path: Path) -> Callable[[], FileResponse]:
        def page() -> FileResponse:
            return FileResponse(path, media_type=KINDS[path.suffix], headers={"Cache-Control": "no-cache"})

        return page

    for path in sorted(STATIC.iterdir()):
        if path.suffix in KINDS:
            where = "/" if path.name == "index.html" else f"/static/{path.name}"
            app.add_api_route(where, serve(path), methods=["GET"], include_in_schema=False, response_model=None)
