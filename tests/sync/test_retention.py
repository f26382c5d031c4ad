"""What may be deleted from the store."""

from __future__ import annotations

from pathlib import Path

from agent.contract.codec import encode
from agent.contract.manifest import ReleaseManifest
from agent.contract.names import ReleaseRef
from agent.store import Store
from agent.sync.updating.retention import Housekeeping, collect, surplus
from tests.sync.fleet import script_release


def ref(version: int, model: str = "crane") -> ReleaseRef:
    return ReleaseRef(model, version)


def test_what_may_be_deleted_goes_oldest_first():
    releases = [ref(n) for n in (1, 2, 3, 4, 5)] + [ref(7, "lift")]
    needed = {"crane": {2, 5}, "lift": {7}}

    assert surplus(releases, needed, 2) == [ref(1)]
    assert surplus(releases, needed, 0) == [ref(1), ref(3), ref(4)]
    assert surplus(releases, {}, 0) == releases


def fill(store: Store, tmp_path: Path, version: int, **options) -> ReleaseManifest:
    manifest, contents = script_release(tmp_path / "made", version, f"scale {version}", **options)
    for name, data in contents.items():
        store.file(manifest, name).write_bytes(data)
    store.write_manifest(encode(manifest))
    return manifest


def test_collecting_keeps_shared_blobs_and_downloads_under_way(store: Store, tmp_path: Path):
    one, two = fill(store, tmp_path, 1, expect=1.0), fill(store, tmp_path, 2)
    (store.staging / ("a" * 64)).write_bytes(b"half")
    (store.staging / ("b" * 64)).write_bytes(b"orphan")

    collect(store, [one.ref], staging_needed=["a" * 64])

    assert store.releases() == [two.ref]
    assert store.has_blob(two.files["model.script"].sha256)
    assert not store.has_blob(one.files["model.script"].sha256)
    assert [path.name for path in store.staging.iterdir()] == ["a" * 64]


def test_a_manifest_that_cannot_be_read_keeps_all_blobs(store: Store, tmp_path: Path):
    fill(store, tmp_path, 1)
    (store.root / "releases" / "crane" / "2.json").write_bytes(b"?")

    assert collect(store, []) == 0
    assert len(list(store.blobs.iterdir())) == 1


def test_nothing_is_collected_while_a_download_has_not_said_what_it_needs(store: Store, tmp_path: Path):
    fill(store, tmp_path, 1)
    keeping = Housekeeping(store, 0)
    keeping.need("crane", ())
    keeping.fetching("lift", None)
    assert keeping.collect() == 0
    keeping.fetched("lift")

    assert keeping.collect() > 0
    assert store.releases() == []


def test_a_damaged_manifest_that_nobody_needs_does_not_stop_collecting(store: Store, tmp_path: Path):
    fill(store, tmp_path, 1)
    kept = fill(store, tmp_path, 3)
    (store.root / "releases" / "crane" / "2.json").write_bytes(b"?")
    keeping = Housekeeping(store, 1)
    keeping.need("crane", {3})

    assert keeping.collect() > 0
    assert store.releases() == [kept.ref]
    assert store.has_blob(kept.files["model.script"].sha256)
