"""What a device must outlive. Needs root, for file systems of its own."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples/demo"))

from tests.survival.card import Card  # noqa: E402 - with the rest of what needs the path above


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder for what does not depend on a disk, where nothing waits for one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def card(tmp_path: Path) -> Iterator[Card]:
    if os.geteuid() != 0:
        pytest.skip("a file system of its own needs root")
    with Card(tmp_path) as mounted:
        yield mounted
