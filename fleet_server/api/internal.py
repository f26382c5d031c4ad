"""The leader's application, for the server's other processes alone: everything of the operators' application, and what devices want
that needs a key.

Who connects shows the server's own client certificate (no device can have its name). That lets nobody do what an operator may: each
request bears the operator's token, which is looked at here. For a device it vouches for nothing either: what a device wants of a key
it signed, or the document is no secret.
"""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
from typing import Protocol

import msgspec
from cryptography import x509
from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from agent.contract.codec import decode
from agent.contract.enrolment import RenewalRequest
from agent.contract.transfers import MAX_ASK_BYTES
from fleet_server.api import admission, http
from fleet_server.devices import pki
from fleet_server.devices.enrolment import Enrolment
from fleet_server.devices.inventory import Inventory
from fleet_server.devices.renewals import Renewals
from fleet_server.errors import Invalid, Refused

PREFIX = "/internal/"
RECORD, RENEWAL, SIGNED_RENEWAL = f"{PREFIX}records/", f"{PREFIX}renewal", f"{PREFIX}signed-renewals/"
CERTIFICATE = "x-device-certificate"
"""A header with the certificate that a device showed, DER in base64."""
MAX_RENEWAL_BYTES = 64 * 1024


class Parts(Protocol):
    """What this application needs of the server."""

    enrolment: Enrolment
    inventory: Inventory


class Internal:
    """An ASGI application: lets in only the server's own processes, and knows which application answers what."""

    def __init__(self, parts: Parts, operators: ASGIApp) -> None:
        self._operators, self._own = operators, _application(parts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            _check_own(admission.presented(scope["state"]))
        except Refused as refused:
            await http.answer(403, str(refused), refused.code)(scope, receive, send)
            return
        await (self._own if scope["path"].startswith(PREFIX) else self._operators)(scope, receive, send)


def _check_own(certificate: x509.Certificate) -> None:
    """Raises: Refused when it is not the server's own client certificate, or has ended."""
    if pki.common_name(certificate) != pki.SERVER_CN:
        raise Refused("only the server's own processes are answered here", code="not_ours")
    if certificate.not_valid_after_utc <= dt.datetime.now(dt.timezone.utc):
        raise Refused("the certificate pki/client.crt of this process has ended; copy the leader's anew", code="expired")


def _application(parts: Parts) -> FastAPI:
    app = FastAPI(title="edge-fleet leader", docs_url=None, redoc_url=None, openapi_url=None)
    renewals = Renewals(parts.inventory, parts.enrolment)

    def record(device: str) -> Response:
        return Response(parts.inventory.record(device), media_type="application/json")

    async def renewal(request: Request) -> Response:
        wanted = decode(await request.body(), RenewalRequest, limit_bytes=MAX_RENEWAL_BYTES)
        shown = _certificate(request.headers.get(CERTIFICATE, ""))
        given = await asyncio.to_thread(_renewed, parts, shown, wanted)
        return Response(msgspec.json.encode(given), media_type="application/json")

    async def signed_renewal(request: Request, device: str) -> Response:
        asked = (await request.body())[: MAX_ASK_BYTES + 1].decode("utf-8", "replace")
        pem = await asyncio.to_thread(renewals.certificate, device, asked)
        return Response(pem, media_type="application/x-pem-file")

    app.add_api_route(RECORD + "{device}", record, methods=["GET"], response_model=None)
    app.add_api_route(RENEWAL, renewal, methods=["POST"], response_model=None)
    app.add_api_route(SIGNED_RENEWAL + "{device}", signed_renewal, methods=["POST"], response_model=None)
    http.install(app)
    return app


def _certificate(text: str) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(base64.b64decode(text, validate=True))
    except ValueError as error:
        raise Invalid(f"{CERTIFICATE} is no certificate: {error}") from error


def _renewed(parts: Parts, shown: x509.Certificate, wanted: RenewalRequest) -> msgspec.Struct:
    """A new certificate for the device that showed this one. Whoever hands the request on cannot ask for a key of its own: it must be
    for the key of the certificate, and is signed by it.  Raises: Refused, Invalid.
    """
    device = parts.inventory.authenticate(shown, to_renew=True)
    if parts.inventory.issued(pki.serial_hex(shown)) != shown:
        raise Refused("this certificate was not issued by this fleet", code="unknown_device")
    csr = pki.read_csr(wanted.csr_pem)
    if csr.public_key() != shown.public_key():
        raise Refused(f"the request of {device!r} is for another key than it has", code="wrong_key")
    return parts.enrolment.renew(device, wanted)
