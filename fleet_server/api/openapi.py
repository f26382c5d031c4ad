"""The OpenAPI description, made without a server."""

from __future__ import annotations

from typing import Any

from fleet_server.api import operator


def document() -> dict[str, Any]:
    """What `edge-fleet openapi` prints and the server serves. `x-role` of an operation is the least role that may use it."""
    return operator.build(None).openapi()  # type: ignore[arg-type]  # no route is called
