"""Routes about enrolment: tokens for operators, and the two routes by which a device joins."""

from __future__ import annotations

import asyncio
from typing import Protocol

from fastapi import Request
from starlette.responses import Response

from agent.contract.codec import decode
from agent.contract.enrolment import CA_PATH, ENROL_PATH, EnrolmentRequest, EnrolmentResponse
from fleet_server.access import Role
from fleet_server.api.operator.bodies import NewEnrolmentToken
from fleet_server.api.operator.routes import Raw, Route, actor_of
from fleet_server.devices.enrolment import Enrolment, EnrolmentTokenMade, EnrolmentTokenView
from fleet_server.devices.pki import Authority

MAX_ENROLMENT_BYTES = 64 * 1024


class Parts(Protocol):
    authority: Authority
    enrolment: Enrolment


def create_enrolment_token(parts: Parts, request: Request, body: NewEnrolmentToken) -> EnrolmentTokenMade:
    """Makes an enrolment token. `string` is what the device is given; it is shown this once."""
    return parts.enrolment.create_token(
        actor_of(request), device=body.device, groups=list(body.groups), uses=body.uses, ttl_s=body.ttl_s, labels=body.labels
    )


def enrolment_tokens(parts: Parts) -> list[EnrolmentTokenView]:
    """Lists enrolment tokens, newest first, without what devices are given."""
    return parts.enrolment.tokens()


def revoke_enrolment_token(parts: Parts, request: Request, token: str) -> EnrolmentTokenView:
    """Makes an enrolment token useless."""
    return parts.enrolment.revoke_token(actor_of(request), token)


def ca(parts: Parts) -> Response:
    """The fleet's CA certificate. A device compares its hash with its enrolment string before it trusts it."""
    return Response(parts.authority.ca_pem, media_type="application/x-pem-file")


async def enrol(parts: Parts, request: Request) -> EnrolmentResponse:
    """A device joins: an EnrolmentRequest for an EnrolmentResponse (agent.contract.enrolment)."""
    wanted = decode(await request.body(), EnrolmentRequest, limit_bytes=MAX_ENROLMENT_BYTES)
    return await asyncio.to_thread(parts.enrolment.enrol, wanted)


ROUTES = (
    Route("POST", "/enrolment-tokens", create_enrolment_token, Role.OPERATOR),
    Route("GET", "/enrolment-tokens", enrolment_tokens, Role.OPERATOR),
    Route("DELETE", "/enrolment-tokens/{token}", revoke_enrolment_token, Role.OPERATOR),
)

JOINING = (
    Route("GET", CA_PATH, ca, None, answer=Raw("application/x-pem-file", {"type": "string"})),
    Route("POST", ENROL_PATH, enrol, None, body=EnrolmentRequest),
)
"""Not below the prefix of the API: devices have these paths built in."""
