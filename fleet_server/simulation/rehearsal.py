"""A rehearsal from nothing to nothing: the server, the devices, the story, and all of it gone again."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from agent.contract.manifest import ReleaseManifest
from agent.contract.names import ReleaseRef
from fleet_server import descriptors
from fleet_server.client import Client, Profile
from fleet_server.simulation.borrowed import Borrowed
from fleet_server.simulation.crowd import Crowd
from fleet_server.simulation.members import most_run
from fleet_server.simulation.papers import Address, Papers
from fleet_server.simulation.report import Report
from fleet_server.simulation.story import Nobody, Order, Shown, Story
from fleet_server.simulation.throwaway import Throwaway


def rehearse(order: Order, shown: Shown | None = None) -> Report:
    """Rehearses on a server of its own, which is gone afterwards with all its files, however this ends. In the main thread.

    Raises: FleetError, OSError.
    """
    shown = shown or Nobody()
    descriptors.raise_limit()
    with tempfile.TemporaryDirectory(prefix="edge-fleet-simulation-") as name:
        server = Throwaway(Path(name), silence_s=order.silence_s)
        count = len(order.members)
        prepared = server.prepare(
            order.members, published(order), most_run(order.members),
            lambda done: shown.show("devices are enrolled", done, count),
        )  # fmt: skip
        try:
            server.start()
            with server.client() as client:
                return asyncio.run(
                    tell(
                        order, client, server.address(), prepared.papers, prepared.manifests, server.folder, shown, server.ended
                    )
                )
        finally:
            server.stop()


def rehearse_on(order: Order, profile: Profile, shown: Shown | None = None) -> Report:
    """Rehearses on a server that runs, with devices that are enrolled there for it and deleted afterwards, however this ends.

    Raises: FleetError, OSError.
    """
    shown = shown or Nobody()
    descriptors.raise_limit()
    client = Client(profile)
    with tempfile.TemporaryDirectory(prefix="edge-fleet-simulation-") as name:
        server = Borrowed(client, Path(name))
        try:
            papers = server.enrol(order.members, lambda done: shown.show("devices are enrolled", done, len(order.members)))
            story = tell(order, client, server.address(), papers, (), Path(name), shown, lambda: False, politely=True)
            return asyncio.run(story)
        finally:
            server.leave(lambda done, total: shown.show("devices are deleted", done, total))
            client.close()


def published(order: Order) -> list[ReleaseRef]:
    """Every release that a device runs, and the one that is to be brought out."""
    found = {ReleaseRef(model, release) for member in order.members for model, release in member.runs.items()}
    return sorted({*found, order.release})


async def tell(
    order: Order, client: Client, address: Address, papers: Mapping[str, Papers], manifests: Iterable[ReleaseManifest], folder: Path,
    shown: Shown, server_ended: Callable[[], bool], *, politely: bool = False,
) -> Report:  # fmt: skip
    """The story beside a server that runs."""
    known = [manifest for manifest in manifests if manifest.ref != order.release]
    crowd = Crowd(
        address, order.members, papers, folder, realism=order.realism, seed=order.seed, bad={order.release}, manifests=known
    )
    try:
        return await Story(client, crowd, order, shown, server_ended).tell()
    finally:
        await crowd.close(politely=politely)
