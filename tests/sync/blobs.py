"""Blob sources in memory, and downloads that ask them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from agent.contract.manifest import Block, File
from agent.store import Store
from agent.sync.fetching.downloader import Downloader
from tests.sync.conftest import FakeClock
from tests.sync.fleet import sha


class MemoryBlobs:
    """A source that sends chunks of a size, from memory. `asked` has every stretch that was asked for."""

    metered = True

    def __init__(
        self,
        data: bytes,
        chunk: int = 50_000,
        *,
        resumes: bool = True,
        name: str = "memory",
        place: int = 0,
        final: bool = True,
    ) -> None:
        self.data, self.chunk, self.resumes = data, chunk, resumes
        self.name, self.place, self.final = name, place, final
        self.asked: list[tuple[int, int]] = []
        self.sent = 0
        self.on_chunk: Callable[[], object] = lambda: None

    @property
    def offsets(self) -> list[int]:
        return [start for start, _ in self.asked]

    @contextlib.contextmanager
    def open(self, sha256: str):
        yield lambda start, end: self.read(sha256, start, end)

    @contextlib.contextmanager
    def read(self, sha256: str, start: int, end: int):
        self.asked.append((start, end))
        begin = start if self.resumes else 0
        yield begin, self.chunks(begin, end if self.resumes else len(self.data))

    def chunks(self, start: int, end: int) -> Iterator[bytes]:
        for at in range(start, min(end, len(self.data)), self.chunk):
            self.on_chunk()
            chunk = self.data[at : min(end, at + self.chunk)]
            self.sent += len(chunk)
            yield chunk


def downloader(store: Store, *sources, clock=None, reserve: int = 0, rate: int = 1, **options) -> Downloader:
    return Downloader(store, sources, clock or FakeClock(), reserve_bytes=reserve, min_bytes_per_s=rate, **options)


def fetch(downloads: Downloader, file: File) -> list[int]:
    """What the progress was."""
    seen: list[int] = []
    downloads.fetch(file, seen.append, lambda: False)
    return seen


def blocked(data: bytes, *sizes: int) -> File:
    """A file of blocks of these sizes, the last of which repeats to the end."""
    blocks, at = [], 0
    while at < len(data):
        size = sizes[min(len(blocks), len(sizes) - 1)]
        blocks.append(Block(sha256=sha(data[at : at + size]), size_bytes=len(data[at : at + size])))
        at += size
    return File(sha256=sha(data), size_bytes=len(data), blocks=tuple(blocks))
