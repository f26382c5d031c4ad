"""The sources and the budget that agent.yaml names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agent.config import SyncSettings
from agent.store import Store
from agent.sync.fetching.budget import Budget, hours
from agent.sync.fetching.downloader import Downloader
from agent.sync.fetching.folders import FolderBlobs
from agent.sync.fetching.https import NEIGHBOUR_PLACE, HttpBlobs
from agent.sync.fetching.sources import Source
from agent.sync.http import FleetHttp
from agent.sync.ports import Clock
from agent.sync.proxy import DIRECT, Way

NEIGHBOUR_CONNECT_S = 2.0
"""A neighbour on the local network answers at once or is switched off."""


def downloader(store: Store, settings: SyncSettings, clock: Clock, sources: list[Source]) -> Downloader:
    """What brings files into the store."""
    return Downloader(
        store,
        sources,
        clock,
        reserve_bytes=settings.disk_reserve_bytes,
        min_bytes_per_s=settings.download_min_bytes_per_s,
        quota_bytes=settings.disk_quota_bytes,
        budget=Budget(clock, limit_bytes_per_s=settings.bandwidth_limit_bytes_per_s, window=hours(settings.transfer_window)),
    )


def sources(
    settings: SyncSettings, fleet: Callable[[], FleetHttp], clock: Clock, ca: Path, unset: Callable[[], bool], way: Way = DIRECT
) -> list[Source]:
    """Folders, neighbours, mirrors and the fleet server. A mirror may have a certificate of any authority that the machine
    trusts, or of the fleet's own (`ca`). It is reached by `way`; neighbours are always reached directly.
    """

    def neighbour(address: str) -> Callable[[], FleetHttp]:
        return lambda: FleetHttp(f"http://{address}", clock, connect_timeout_s=NEIGHBOUR_CONNECT_S)

    def mirror(url: str) -> Callable[[], FleetHttp]:
        return lambda: FleetHttp(url, clock, ca=ca, public=True, unset=unset, way=way)

    found: list[Source] = [FolderBlobs(folder) for folder in settings.local_sources]
    found += [
        HttpBlobs(neighbour(one), name=f"the neighbour {one}", place=NEIGHBOUR_PLACE, final=False)
        for one in settings.neighbours
    ]
    found += [HttpBlobs(mirror(url), name=f"the mirror {url}", final=False) for url in settings.mirrors]
    return [*found, HttpBlobs(fleet, elsewhere=lambda base: mirror(base)())]
