"""Cuts a file into blocks where its content says so, so that a small change moves few blocks (content-defined chunking).

A block ends where a hash of the last 32 bytes has enough zero bits (a gear hash, as in FastCDC); so an insertion shifts the
blocks behind it without changing them. Publisher and device need not agree on the rule: the blocks stand in the manifest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from agent.contract.manifest import Block, File

WINDOW = 32
AVERAGE_BYTES = 4 * 1024  # of the smallest files
BLOCKS_PER_AVERAGE = 16
"""A block costs some 100 bytes of the manifest, and each changed stretch of a file about one block more than changed. Both are
least together when the number of blocks grows with the root of the size: 4 KiB up to 1 MiB, 16 KiB up to 16 MiB, 64 KiB up to
256 MiB.
"""
MAX_BLOCKS = 24_576  # of all files of a release: about 2.5 MB of manifest, which may have 4
MIN_FILE_BYTES = 2 * AVERAGE_BYTES  # smaller ones are fetched whole

_GEAR = np.frombuffer(
    b"".join(hashlib.sha256(bytes([value])).digest()[:4] for value in range(256)), dtype="<u4"
)  # any fixed table of random numbers does; this one can be written down in a line


def average_bytes(size: int, release: int = 0) -> int:
    """How large the blocks of a file should be, in a release whose files have `release` bytes together. A power of two."""
    average = AVERAGE_BYTES
    while size * BLOCKS_PER_AVERAGE > average**2 or max(size, release) > average * MAX_BLOCKS:
        average *= 2
    return average


def describe(path: Path, release_bytes: int = 0) -> File:
    """The hash, size and blocks of a file, one of a release whose files have `release_bytes` together.  Raises: OSError."""
    average = average_bytes(path.stat().st_size, release_bytes)
    digest = hashlib.sha256()
    blocks = []
    total = 0
    with path.open("rb") as file:
        for piece in _pieces(file, average):
            digest.update(piece)
            total += len(piece)
            blocks.append(Block(sha256=hashlib.sha256(piece).hexdigest(), size_bytes=len(piece)))
    return File(sha256=digest.hexdigest(), size_bytes=total, blocks=tuple(blocks) if total >= MIN_FILE_BYTES else ())


def _pieces(file: IO[bytes], average: int) -> Iterator[bytes]:
    """The file cut into pieces of average/4 to average*4 bytes (the last may be shorter)."""
    low, high = average // 4, average * 4
    held = b""
    while True:
        more = file.read(high * 8)
        held += more
        ends = _candidates(held, average)
        start = 0
        while len(held) - start > (high if more else 0):
            after = int(np.searchsorted(ends, start + low))
            cut = int(ends[after]) if after < len(ends) else len(held)
            cut = min(cut, start + high, len(held))
            yield held[start:cut]
            start = cut
        held = held[start:]
        if not more:
            return


def _candidates(data: bytes, average: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where blocks may end: positions behind a window whose hash has log2(average) leading zero bits."""
    values = _GEAR[np.frombuffer(data, dtype=np.uint8)]
    step = 1
    while step < WINDOW:  # doubling: the hash of 2n bytes from those of n
        shifted = np.zeros_like(values)
        shifted[step:] = values[:-step]
        values = values + (shifted << np.uint32(step))
        step *= 2
    mask = np.uint32((average - 1) << (WINDOW - average.bit_length() + 1))
    found: np.ndarray[tuple[int], np.dtype[np.int64]] = np.flatnonzero((values & mask) == 0) + 1
    return found
