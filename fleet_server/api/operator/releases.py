"""Routes about releases: listing them, publishing one, and the files they consist of."""

from __future__ import annotations

from typing import Protocol

import msgspec
from fastapi import Request
from starlette.responses import Response

from fleet_server.access import Role
from fleet_server.api import http
from fleet_server.api.operator.bodies import Metadata, Publication
from fleet_server.api.operator.routes import Number, Raw, Route, actor_of, ref_of, reply
from fleet_server.config import FleetConfig
from fleet_server.errors import Invalid
from fleet_server.releases.catalogue import Catalogue, ReleaseDetail, ReleaseView
from fleet_server.releases.delegations import RELEASES
from fleet_server.releases.repository import Repository
from fleet_server.releases.trust import Trust
from fleet_server.rollouts.commands import Rollouts
from fleet_server.rollouts.moves import ChangePreview
from fleet_server.rollouts.retention import Deletion, Retention
from fleet_server.rollouts.what_runs import Withdrawal
from fleet_server.storage.blobs import Blobs


class Parts(Protocol):
    blobs: Blobs
    catalogue: Catalogue
    config: FleetConfig
    repository: Repository
    retention: Retention
    rollouts: Rollouts
    trust: Trust


class Publishing(msgspec.Struct, frozen=True):
    """The trusted metadata that a publisher adds to, as text. `releases` is None before the publisher's first release."""

    root: str
    targets: str
    publisher: str
    releases: str | None


class MetadataTrusted(msgspec.Struct, frozen=True):
    """A publisher's metadata that is trusted now. `reinstated`: the release whose withdrawal it ends."""

    publisher: str
    version: int
    signers: list[str]
    reinstated: str | None


class BlobView(msgspec.Struct, frozen=True):
    """A file of a release that is on the server, whole."""

    sha256: str
    size_bytes: int


def releases(parts: Parts, model: str | None = None) -> list[ReleaseView]:
    """Lists published releases, the newest of each model first."""
    return parts.catalogue.published(model)


def release(parts: Parts, model: str, version: Number) -> ReleaseDetail:
    """One release with its signed manifest."""
    return parts.catalogue.get(ref_of(f"{model}:{version}"))


def publishing(parts: Parts, model: str | None = None, publisher: str | None = None) -> Publishing:
    """What a publisher adds to and signs: the trusted metadata, as text. Which publisher: the one who signs `model`."""
    repository = parts.repository
    if publisher is None:
        publisher = repository.publisher_of(model) if model is not None else RELEASES
    role = repository.releases(publisher)
    return Publishing(
        root=repository.root_bytes().decode(),
        targets=repository.role_bytes("targets").decode(),
        publisher=publisher,
        releases=repository.role_bytes(publisher).decode() if role is not None else None,
    )


def resign(parts: Parts, request: Request, publisher: str, body: Metadata) -> MetadataTrusted:
    """Makes a publisher's metadata trusted that adds no release: renewed, or ending the withdrawal of one release."""
    actor = actor_of(request)
    done = parts.trust.resign(actor, publisher, body.metadata.encode())
    if done.reinstated is not None:
        parts.rollouts.reinstate(actor, done.reinstated)
    reinstated = str(done.reinstated) if done.reinstated is not None else None
    return MetadataTrusted(publisher, done.version, list(done.signers), reinstated)


def publish(parts: Parts, request: Request, body: Publication) -> ReleaseView:
    """Publishes a signed release, when everything about it holds."""
    return parts.catalogue.publish(actor_of(request), body.manifest.encode(), body.metadata.encode())


def withdraw(parts: Parts, request: Request, model: str, version: Number) -> Withdrawal:
    """Forbids a release: no device may run it any more, unless its publisher signs otherwise."""
    return parts.rollouts.withdraw(actor_of(request), ref_of(f"{model}:{version}"))


def plan_withdraw(parts: Parts, request: Request, model: str, version: Number) -> ChangePreview:
    """What a withdrawal would do: where the devices go that run the release, how many are there now, how much they fetch. Nothing is changed."""
    return parts.rollouts.preview_withdraw(actor_of(request), ref_of(f"{model}:{version}"))


def delete_release(parts: Parts, request: Request, model: str, version: Number) -> Deletion:
    """Deletes the files of a release that nobody needs: not assigned, in no rollout, served by no device, not gone back to."""
    return parts.retention.delete(actor_of(request), ref_of(f"{model}:{version}"))


def undelete_release(parts: Parts, request: Request, model: str, version: Number) -> Deletion:
    """Lets a release be rolled out again whose files were deleted and uploaded again."""
    return parts.retention.undelete(actor_of(request), ref_of(f"{model}:{version}"))


def blob(parts: Parts, sha256: str) -> Response:
    """Whether a file is here: 200, or 404 with `Upload-Offset` saying how much of it is, and `Upload-Under-Way` while somebody
    sends it.
    """
    size = parts.blobs.size(sha256)
    if size is not None:
        parts.blobs.pending.seen(sha256)
        response = reply(BlobView(sha256, size))
        response.headers["Upload-Offset"] = str(size)
        return response
    missing = http.answer(404, f"blob {sha256} is not here; upload it", "not_found")
    missing.headers["Upload-Offset"] = str(parts.blobs.partial_size(sha256))
    if parts.blobs.arrives(sha256):
        missing.headers["Upload-Under-Way"] = "true"
    return missing


async def upload(parts: Parts, request: Request, sha256: str) -> BlobView:
    """Stores a file's bytes from `Upload-Offset` (0 without one) on. An upload that broke off goes on where HEAD says."""
    offset = request.headers.get("upload-offset", "0")
    if not offset.isascii() or not offset.isdigit() or len(offset) > 16:
        raise Invalid("Upload-Offset must be a number of bytes")
    account, limit = actor_of(request).token or "", parts.config.keep.upload_bytes
    size = await parts.blobs.receive(sha256, int(offset), request.stream(), account, limit)
    return BlobView(sha256, size)


BYTES = Raw("application/octet-stream", {"type": "string", "format": "binary"})

ROUTES = (
    Route("GET", "/releases", releases, Role.VIEWER),
    Route("GET", "/releases/{model}/{version}", release, Role.VIEWER),
    Route("POST", "/releases", publish, Role.PUBLISHER),
    Route("POST", "/releases/{model}/{version}/withdraw", withdraw, Role.OPERATOR),
    Route("POST", "/releases/{model}/{version}/withdraw/plan", plan_withdraw, Role.VIEWER),
    Route("DELETE", "/releases/{model}/{version}", delete_release, Role.OPERATOR),
    Route("POST", "/releases/{model}/{version}/undelete", undelete_release, Role.PUBLISHER),
    Route("POST", "/publishers/{publisher}/metadata", resign, Role.PUBLISHER),
    Route("GET", "/publishing", publishing, Role.PUBLISHER),
    Route("GET", "/blobs/{sha256}", blob, Role.PUBLISHER, answer=BlobView),
    Route("PUT", "/blobs/{sha256}", upload, Role.PUBLISHER, body=BYTES),
)
