"""Which releases stay in the store, and which make room."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from agent.contract.assignment import ModelAssignment
from agent.contract.codec import encode
from agent.contract.reports import Phase
from tests.sync.bench import Bench
from tests.sync.fleet import script_release

P = Phase


def test_old_releases_go_and_needed_ones_stay(bench: Bench):
    for version in range(1, 7):
        bench.install(version)

    kept = [ref.version for ref in bench.store.releases()]
    assert kept == [3, 4, 5, 6], "active, the one before, and two more"
    assert len(list(bench.store.blobs.iterdir())) == 4


def test_releases_set_up_by_hand_are_left_alone(on_one: Bench, tmp_path: Path):
    manifest, contents = script_release(tmp_path / "hand", 1, "scale 9", model="mine")
    for name, data in contents.items():
        on_one.store.file(manifest, name).write_bytes(data)
    on_one.store.write_manifest(encode(manifest))
    for version in range(2, 6):
        on_one.install(version)

    assert on_one.store.manifest(manifest.ref) == manifest
    assert on_one.store.has_blob(manifest.files["model.script"].sha256)


def fill_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of which every byte is in use, and of which what is deleted becomes free."""
    full = sum(path.stat().st_size for path in bench.store.blobs.iterdir())

    def usage(_path):
        used = sum(path.stat().st_size for path in bench.store.blobs.iterdir())
        return SimpleNamespace(free=full - used)

    monkeypatch.setattr("agent.sync.fetching.downloader.shutil.disk_usage", usage)


def test_old_releases_make_room_also_after_a_restart_in_the_middle(on_one: Bench, monkeypatch: pytest.MonkeyPatch):
    on_one.install(2)
    on_one.install(3)
    on_one.release(4)
    on_one.want(4)
    on_one.step()
    fill_up(on_one, monkeypatch)
    on_one.again()
    on_one.until(P.STEADY, steps=40)

    assert on_one.serving == 4


def test_a_release_that_cannot_be_found_keeps_no_room_from_another_model(on_one: Bench, monkeypatch: pytest.MonkeyPatch):
    on_one.install(2)
    on_one.install(3)
    other = on_one.machine.updater("lift")
    on_one.release(4)
    on_one.want(4)
    models = {**on_one.assignment.models, "lift": ModelAssignment(release=9)}
    on_one.assignment = msgspec.structs.replace(on_one.assignment, models=models)
    for _ in range(3):
        other.step(lambda: False)
    assert other.state.phase is P.WAITING
    fill_up(on_one, monkeypatch)
    on_one.step()
    on_one.until(P.STEADY, steps=40)

    assert on_one.serving == 4


def test_the_files_of_a_model_that_is_wanted_no_more_may_go(on_one: Bench):
    on_one.want(None)
    on_one.step()
    on_one.again()
    on_one.step()
    on_one.machine.housekeeping.collect(short_of_space=True)

    assert on_one.store.releases() == []
    assert list(on_one.store.blobs.iterdir()) == []
