"""The devices' application, behind mutual TLS: metadata, targets, blobs, the caller's own record, a new certificate.

Who asks is what the certificate of the connection says; a revoked or unknown one gets 403 before anything else. What is asked for
most is answered before this (`documents`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
from fastapi import Depends, FastAPI, Request
from starlette.responses import FileResponse, Response
from starlette.types import ASGIApp

from agent.contract.codec import decode
from agent.contract.enrolment import BLOBS_PATH, METADATA_PATH, RECORD_PATH, RENEW_PATH, TARGETS_PATH, RenewalRequest
from fleet_server.api import admission, documents, http, ranges
from fleet_server.devices.enrolment import Enrolment
from fleet_server.devices.inventory import Inventory
from fleet_server.errors import NotFound
from fleet_server.releases.repository import Repository
from fleet_server.storage.blobs import Blobs

MAX_RENEWAL_BYTES = 64 * 1024


class _File(FileResponse):
    """Sent in chunks of half a MiB: with TLS in Python a chunk costs about as much as sending 200 KB, and 400 connections may
    each have one or two in memory.
    """

    chunk_size = 512 * 1024


class Parts(Protocol):
    """What this application needs of the server."""

    blobs: Blobs
    enrolment: Enrolment
    inventory: Inventory
    repository: Repository


def caller(request: Request) -> str:
    """The device whose certificate this connection was made with.  Raises: Refused."""
    inventory = _fleet(request).inventory
    return admission.known(request.scope["state"], inventory) or admission.look_up(request.scope["state"], inventory)


def late_caller(request: Request) -> str:
    """The device whose certificate this connection was made with, also when it has ended, while an operator allows a late
    renewal. The handshake proved that the device has the key of the certificate.  Raises: Refused.
    """
    return _fleet(request).inventory.authenticate(admission.presented(request.scope["state"]), to_renew=True)


Caller = Annotated[str, Depends(caller)]
LateCaller = Annotated[str, Depends(late_caller)]


def metadata(request: Request, name: str, _caller: Caller) -> Response:
    return _document(request, _fleet(request).repository.metadata.served(name), f"metadata {name!r}")


def target(request: Request, name: str, _caller: Caller) -> Response:
    return _document(request, _fleet(request).repository.targets.served(name), f"target {name!r}")


def blob(request: Request, sha256: str, _caller: Caller) -> Response:
    """A file of a release: the whole of it, or the stretch that a Range header asks for; or where to fetch it instead."""
    blobs = _fleet(request).blobs
    headers = {"ETag": f'"{sha256}"', "Cache-Control": documents.IMMUTABLE}
    path = blobs.local(sha256)
    if path is None and (link := blobs.link(sha256)) is not None:
        return Response(status_code=307, headers={"Location": link, "Cache-Control": "no-store"})
    if documents.is_known(request.scope, headers["ETag"]) and (path is not None or blobs.size(sha256) is not None):
        return Response(status_code=304, headers=headers)
    if path is None and (opened := blobs.open(sha256)) is not None:
        return ranges.answer(request, opened, headers)
    return _file(path, f"blob {sha256}", "application/octet-stream", headers)


def record(request: Request, device: Caller) -> Response:
    return Response(_fleet(request).inventory.record(device), media_type="application/json")


async def renew(request: Request, device: LateCaller) -> Response:
    wanted = decode(await request.body(), RenewalRequest, limit_bytes=MAX_RENEWAL_BYTES)
    given = await asyncio.to_thread(_fleet(request).enrolment.renew, device, wanted)
    return Response(msgspec.json.encode(given), media_type="application/json")


ROUTES: tuple[tuple[list[str], str, Callable[..., Any]], ...] = (
    (["GET", "HEAD"], METADATA_PATH + "{name}", metadata),
    (["GET", "HEAD"], TARGETS_PATH + "{name:path}", target),
    (["GET", "HEAD"], BLOBS_PATH + "{sha256}", blob),
    (["GET"], RECORD_PATH, record),
    (["POST"], RENEW_PATH, renew),
)


def build(fleet: Parts) -> ASGIApp:
    """The application of the device listener."""
    app = FastAPI(title="edge-fleet devices", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.fleet = fleet
    for methods, path, handler in ROUTES:
        app.add_api_route(path, handler, methods=methods, response_model=None)
    http.install(app)
    return documents.Documents(fleet, app)


def _fleet(request: Request) -> Parts:
    fleet: Parts = request.app.state.fleet
    return fleet


def _document(request: Request, name: str | None, what: str) -> Response:
    """What is too large to be answered by `documents`, or was not to be had there."""
    stored, kind = _fleet(request).repository.documents, "application/json"
    if name is None:
        raise NotFound(f"there is no {what}")
    headers = {"Cache-Control": documents.cache_of(name)}
    if (path := stored.local(name)) is not None:
        return _file(path, what, kind, headers)
    if (data := stored.read(name)) is None:
        raise NotFound(f"there is no {what}")
    return Response(data, media_type=kind, headers={**headers, "ETag": documents.of(data, "").etag})


def _file(path: Path | None, what: str, kind: str, headers: dict[str, str] | None = None) -> Response:
    if path is None:
        raise NotFound(f"there is no {what}")
    return _File(path, media_type=kind, headers=headers)
