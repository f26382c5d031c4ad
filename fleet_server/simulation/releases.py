"""Releases for simulated devices: signed and published as any, with bytes that nobody runs."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence

from securesystemslib.signer import Signer  # type: ignore[attr-defined]

from agent.contract.manifest import File, ReleaseManifest, Variant
from agent.contract.names import ReleaseRef
from fleet_server.access import SERVER
from fleet_server.app import Fleet
from fleet_server.releases import publisher
from fleet_server.rollouts import steps

SIZE_BYTES = 64 * 1024
FILE = "model.onnx"


def publish(fleet: Fleet, refs: Sequence[ReleaseRef], signer: Signer) -> list[ReleaseManifest]:
    """Publishes releases, each of one file of SIZE_BYTES that its name decides. For a fleet that no server works on.  Raises:
    FleetError.
    """
    return [_publish(fleet, ref, signer) for ref in sorted(refs)]


def _publish(fleet: Fleet, ref: ReleaseRef, signer: Signer) -> ReleaseManifest:
    data = random.Random(str(ref)).randbytes(SIZE_BYTES)  # noqa: S311 - the same each time
    sha256 = hashlib.sha256(data).hexdigest()
    asyncio.run(fleet.blobs.receive(sha256, 0, _whole(data)))
    manifest = ReleaseManifest(
        model=ref.model, version=ref.version, files={FILE: File(sha256=sha256, size_bytes=len(data))},
        variants=(Variant(name="cpu", runtime="onnx", file=FILE),),
    )  # fmt: skip
    role = fleet.repository.releases(fleet.repository.publisher_of(ref.model))
    body, metadata = publisher.add(role, manifest, signer, time.time())
    fleet.catalogue.publish(SERVER, body, metadata)
    return manifest


async def _whole(data: bytes) -> AsyncIterator[bytes]:
    yield data


def assign(fleet: Fleet, releases: Mapping[str, int]) -> None:
    """Makes these what every device runs, as if rollouts of them had ended long ago. For a fleet that no server works on."""
    with fleet.database.session() as session:
        for model, release in releases.items():
            steps.model_row(session, model).release = release
        steps.next_version(session)
    fleet.assignment.publish()
