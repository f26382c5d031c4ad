"""The store keeps within its quota, and what is deleted for it is never what serves, served, is held or is being fetched."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.config import AgentConfig, ConfigError, SyncSettings, load
from agent.contract.codec import encode
from agent.contract.manifest import File, ReleaseManifest, Variant
from agent.contract.reasons import Reason
from agent.store import Store
from agent.sync.fetching.downloader import used_bytes
from agent.sync.problems import Problem
from agent.sync.updating.retention import Housekeeping
from tests.sync.blobs import MemoryBlobs, blocked, downloader, fetch
from tests.sync.fleet import sha

DATA = random.Random(41).randbytes(200_000)
FILE = blocked(DATA, 20_000)


def keep(store: Store, model: str, version: int, data: bytes) -> str:
    file = File(sha256=sha(data), size_bytes=len(data))
    store.blob(file.sha256).write_bytes(data)
    store.write_manifest(
        encode(
            ReleaseManifest(
                model=model, version=version, files={"m": file}, variants=(Variant(name="cpu", runtime="script", file="m"),)
            )
        )
    )
    return file.sha256


def test_a_release_beyond_the_quota_is_refused_with_numbers(store: Store):
    keep(store, "crane", 1, DATA[:100_000])
    downloads = downloader(store, MemoryBlobs(DATA), quota_bytes=250_000)

    with pytest.raises(Problem) as caught:
        downloads.require_space([FILE])

    assert caught.value.reason is Reason.NO_SPACE
    assert caught.value.retryable
    assert "disk_quota_bytes" in caught.value.message
    assert 40_000 < caught.value.evidence["short_bytes"] < 60_000


def test_only_what_is_missing_counts(store: Store):
    """Most of the file is staged: it counts as used, not as needed once more."""
    (store.staging / FILE.sha256).write_bytes(DATA[:180_000])
    downloads = downloader(store, MemoryBlobs(DATA), quota_bytes=230_000)

    downloads.require_space([FILE])
    fetch(downloads, FILE)

    assert used_bytes(store) <= 230_000


def test_room_is_made_before_it_is_refused(store: Store):
    for version in (1, 2, 3):
        keep(store, "crane", version, random.Random(version).randbytes(100_000))
    keeping = Housekeeping(store, 2)
    keeping.need("crane", {3})
    downloads = downloader(store, MemoryBlobs(DATA), quota_bytes=350_000)
    assert downloads.shortage_bytes([FILE]) > 0

    keeping.fetching("crane", [FILE.sha256])
    keeping.collect(short_of_space=True)

    downloads.require_space([FILE])


@settings(max_examples=60, deadline=None)
@given(
    active=st.integers(1, 6), previous=st.integers(1, 6) | st.none(), held=st.integers(1, 6) | st.none(),
    fetched=st.sets(st.integers(0, 2)), short=st.booleans(), keep_newest=st.integers(0, 3),
)  # fmt: skip
def test_what_is_needed_is_never_deleted(active, previous, held, fetched, short, keep_newest):
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(Path(folder) / "store")
        blobs = {version: keep(store, "crane", version, f"{version}".encode() * 50) for version in range(1, 7)}
        wanted = [sha(f"part {number}".encode()) for number in range(3)]
        for name in wanted:
            (store.staging / name).write_bytes(b"x")
        keeping = Housekeeping(store, keep_newest, lambda _: held)
        keeping.need("crane", {active} | ({previous} if previous else set()))
        keeping.fetching("lift", [wanted[number] for number in fetched])

        keeping.collect(short_of_space=short)

        stays = {active, previous, held} - {None}
        assert all(store.has_blob(blobs[version]) for version in stays)
        assert {ref.version for ref in store.releases()} >= stays
        assert all((store.staging / wanted[number]).exists() for number in fetched)
        if short:
            assert {ref.version for ref in store.releases()} == stays


@pytest.mark.parametrize(
    "setting",
    [
        "transfer_window: 25:00-06:00", "transfer_window: night", "transfer_window: '06:00-06:00'", "disk_quota_bytes: -1",
        "bandwidth_limit_bytes_per_s: -5", "neighbours: [nowhere]", "neighbour_listen: ':'", "mirrors: ['http://cdn.example.com']",
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant(setting, tmp_path: Path):
    path = tmp_path / "agent.yaml"
    path.write_text(f"sync:\n  {setting}\n")

    with pytest.raises(ConfigError, match=setting.split(":")[0]):
        load(path)


@pytest.mark.parametrize("old", ["peers: []", "peer_listen: ''", "peer_limit_bytes_per_s: 0"])
def test_settings_of_before_name_those_of_now(old, tmp_path: Path):
    path = tmp_path / "agent.yaml"
    path.write_text(f"sync:\n  {old}\n")

    with pytest.raises(ConfigError, match=r"sync.peer\S* is now called sync.neighbour"):
        load(path)


def test_settings_as_they_are_written(tmp_path: Path):
    path = tmp_path / "agent.yaml"
    path.write_text(
        "sync:\n  transfer_window: 22:00-06:00\n  neighbours: ['192.0.2.7:8500', '[2001:db8::1]:8500']\n  mirrors: [https://cdn.example.com/fleet]\n"
        "  local_sources: [/media/usb]\n"
    )

    assert load(path).sync.transfer_window == "22:00-06:00"
    assert AgentConfig().sync == SyncSettings()
