"""Health and metrics of processes that answer no operator: plain HTTP, for a monitor and for whoever starts them. It shows numbers only."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agent.contract import addresses
from fleet_server import listeners
from fleet_server.api.connections import Limits
from fleet_server.api.health import Health
from fleet_server.api.tls import Listener
from fleet_server.metrics import TEXT

CONNECTIONS = 32


def listener(place: str, metrics: Callable[[], str], why_not: Callable[[], str]) -> Listener:
    """A listener at HOST:PORT with `/metrics` and `/health`. `why_not`: what keeps the process from being of use; nothing when it is."""

    def health(_request: Request) -> Response:
        reason = why_not()
        said = Health(not reason, reason)
        return Response(msgspec.json.encode(said), 200 if said.ready else 503, media_type="application/json")

    def counted(_request: Request) -> Response:
        return Response(metrics(), media_type=TEXT)

    app = Starlette(routes=[Route("/health", health), Route("/metrics", counted)])
    host, port = addresses.split(place)
    limits = Limits(total=CONNECTIONS, per_address=CONNECTIONS, per_device=CONNECTIONS)
    return listeners.listener(app, host.strip("[]"), port, limits, "aside")
