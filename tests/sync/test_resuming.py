"""What others do not have costs nothing of what the fleet server brought."""

from __future__ import annotations

import pytest

from agent.contract.manifest import File
from agent.store import Store
from agent.sync.fetching.sources import NotHere
from agent.sync.problems import Problem
from tests.sync.blobs import MemoryBlobs, downloader, fetch
from tests.sync.fleet import sha

DATA = b"right" * 500


class Without(MemoryBlobs):
    """A neighbour that does not have the file."""

    def read(self, sha256, start, end):
        raise NotHere("404")


def test_a_neighbour_without_the_file_does_not_end_what_the_server_began(store: Store):
    """A file without blocks, from a server whose connection ends after a third of it."""
    server = MemoryBlobs(DATA, name="server", place=9)
    server.chunks = lambda start, _end: iter([DATA[start : start + 900]])
    downloads = downloader(store, Without(b"", name="neighbour", final=False), server)
    file = File(sha256=sha(DATA), size_bytes=len(DATA))
    for _ in range(2):
        with pytest.raises(Problem):
            fetch(downloads, file)
    fetch(downloads, file)
    assert server.offsets == [0, 900, 1800]
