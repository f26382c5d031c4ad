from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.contract.acceptance import WatchRules
from agent.store import Store
from tests.sync.fleet import Authority, Repository, Server, enrolled

PLUGIN = Path(__file__).parent / "plugin"
PATIENCE_S = 20.0
WATCH = WatchRules(duration_s=10.0, max_duration_s=60.0)


class FakeClock:
    """Time that stands still until told otherwise."""

    def __init__(self, wall: float | None = None) -> None:
        self._wall = time.time() if wall is None else wall
        self._monotonic = 1000.0

    def wall(self) -> float:
        return self._wall

    def monotonic(self) -> float:
        return self._monotonic

    def pass_(self, seconds: float) -> None:
        self._wall += seconds
        self._monotonic += seconds

    def set_wall(self, wall: float) -> None:
        self._wall = wall


def eventually(condition: Callable[[], object], what: str = "it", patience_s: float = PATIENCE_S) -> None:
    """Waits until `condition` holds; fails when it does not in time."""
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end, f"waited {patience_s} s in vain for {what}"
        threading.Event().wait(0.02)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def repository() -> Repository:
    return Repository()


@pytest.fixture
def server(authority: Authority, repository: Repository, tmp_path: Path):
    server = Server(authority, repository, tmp_path / "server")
    yield server
    server.close()


@pytest.fixture
def identity(authority: Authority, repository: Repository, server: Server, tmp_path: Path):
    return enrolled(tmp_path / "identity", authority, repository.first_root, url=server.url)


@pytest.fixture
def script_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the runtime `script` available in child processes."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PLUGIN), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))


@pytest.fixture
def bench(tmp_path: Path):
    """One model's updater on an empty device."""
    from tests.sync.bench import Bench  # which has its clock from here

    return Bench(tmp_path)


@pytest.fixture
def on_one(bench):
    """Release 1 is committed and serves; release 2 is published."""
    bench.install(1)
    bench.release(2, watch=WATCH)
    bench.serve.calls.clear()
    bench.news.clear()
    bench.tried.clear()
    return bench
