"""What a trial may leave in its scratch folder: folders deeper than Python recurses must neither stop `sync` nor stay."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.host.clock import SystemClock
from agent.sync.trials.supervision import Supervisor, remove_tree
from agent.sync.trials.trial import TrialProcesses


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A scratch folder with one of an earlier trial, 3000 levels deep."""
    trial = tmp_path / "scratch" / "trial-x"
    trial.mkdir(parents=True)
    folder = os.open(trial, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("deep", dir_fd=folder)
        inner = os.open("deep", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    yield trial.parent
    remove_tree(trial.parent)


def test_sync_starts_after_a_trial_that_made_deep_folders(scratch: Path, tmp_path: Path):
    TrialProcesses(SystemClock(), tmp_path / "no.sock", scratch=scratch)
    assert not scratch.exists()


def test_deep_folders_end_a_trial(scratch: Path):
    found = Supervisor(os.getpid(), scratch / "trial-x", 1 << 30).check()
    assert found is not None
    assert not found.retryable
