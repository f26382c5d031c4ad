"""In one step no manifest and no metadata file is read or parsed twice, and one that has not changed is not read again in the next."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent import store as stores
from agent.contract.acceptance import WatchRules
from agent.contract.names import ReleaseRef
from agent.contract.reports import Phase
from agent.store import StoreError
from agent.sync.updating import manifests
from agent.sync.updating.manifests import Manifests
from tests import audit
from tests.sync.bench import MODEL, Bench

WATCH = WatchRules(duration_s=50.0, max_duration_s=100.0)

pytestmark = pytest.mark.alone  # it listens to the interpreter: see tests/audit.py


def read_by(bench: Bench, act: Callable[[], object]) -> Counter[str]:
    """The manifests and metadata files that are opened for reading meanwhile."""
    root, paths = bench.store.root, []

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str) or not arguments[0].startswith(str(root)):
            return
        if (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR) == 0:
            paths.append(Path(arguments[0]).relative_to(root).as_posix())

    with audit.listening(hear):
        act()
    return Counter(path for path in paths if path.startswith(("releases/", "sync/trust/")))


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The manifests that are parsed."""
    found: list[bytes] = []
    parse = stores.parse_manifest

    def noting(data: bytes, **options: Any):
        found.append(data)
        return parse(data, **options)

    monkeypatch.setattr(stores, "parse_manifest", noting)
    return found


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path)
    bench.install(1)
    bench.release(2, watch=WATCH)
    bench.want(2)
    bench.step()
    bench.until(Phase.TRIALING)
    return bench


def test_a_step_of_a_trial(bench: Bench, parsed: list[bytes]):
    reads = read_by(bench, bench.step)
    assert bench.tried == ["crane:1", "crane:2"]
    assert max(reads.values(), default=0) <= 1, reads
    assert len(parsed) == len(set(parsed)) <= 2


def test_a_step_of_a_watch(bench: Bench, parsed: list[bytes]):
    bench.until(Phase.WATCHING)
    bench.again()
    parsed.clear()
    assert read_by(bench, bench.step) == {"releases/crane/2.json": 1}
    assert len(parsed) == 1
    for _ in range(20):
        assert read_by(bench, bench.step) == {}
    assert bench.phase is Phase.WATCHING
    assert len(parsed) == 1


def test_what_is_damaged_meanwhile_is_noticed(bench: Bench, parsed: list[bytes]):
    known, ref = Manifests(bench.store), ReleaseRef(MODEL, 2)
    path = bench.store.manifest_path(ref)
    assert known.get(ref).version == 2
    path.write_bytes(b"damaged")
    with pytest.raises(StoreError, match="is damaged"):
        known.get(ref)
    with pytest.raises(StoreError, match="is damaged"):
        known.get(ref)
    path.unlink()
    with pytest.raises(StoreError, match="is not in the store"):
        known.get(ref)


def test_the_same_bytes_in_a_new_file_are_not_parsed_again(bench: Bench, parsed: list[bytes]):
    known, ref = Manifests(bench.store), ReleaseRef(MODEL, 2)
    first, path = known.get(ref), bench.store.manifest_path(ref)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    assert known.get(ref) is first
    assert len(parsed) == 1


def test_large_manifests_do_not_fill_the_memory(bench: Bench, parsed: list[bytes], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(manifests, "KEPT_BYTES", 10)
    known = Manifests(bench.store)
    for version in (1, 2, 2, 1):
        known.get(ReleaseRef(MODEL, version))
    assert len(parsed) == 3
