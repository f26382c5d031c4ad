"""Routes about the fleet's certificate authority (CA), and its replacement."""

from __future__ import annotations

from typing import Protocol

from fastapi import Request

from fleet_server.access import Role
from fleet_server.api.operator.bodies import CaFinish, CaReplace
from fleet_server.api.operator.routes import Route, actor_of
from fleet_server.devices.ca_replacement import CaReplacement, CaView


class Parts(Protocol):
    ca_replacement: CaReplacement


def authorities(parts: Parts) -> CaView:
    """The fleet's CAs, how far the replacement is, and which devices have not followed."""
    return parts.ca_replacement.view()


def replace_ca(parts: Parts, request: Request, body: CaReplace) -> CaView:
    """Makes a new CA beside the present one. Devices are told of it, and renew their certificates under it."""
    return parts.ca_replacement.replace(actor_of(request), switch_after_s=body.switch_after_s, spread_s=body.spread_s)


def switch_ca(parts: Parts, request: Request) -> CaView:
    """Has the server show certificates of the new CA before its time."""
    return parts.ca_replacement.switch(actor_of(request))


def finish_ca(parts: Parts, request: Request, body: CaFinish) -> CaView:
    """Has the old CA believed no more. Devices that have not followed have to be enrolled anew."""
    return parts.ca_replacement.finish(actor_of(request), leave_behind=body.leave_behind)


ROUTES = (
    Route("GET", "/ca", authorities, Role.VIEWER),
    Route("POST", "/ca/replace", replace_ca, Role.ADMIN),
    Route("POST", "/ca/switch", switch_ca, Role.ADMIN),
    Route("POST", "/ca/finish", finish_ca, Role.ADMIN),
)
