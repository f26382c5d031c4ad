"""What a file is made of, and which stretches of it to ask for. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from agent.contract.manifest import File

MAX_GAP_BYTES = 64 * 1024
"""Asking once more costs a round trip: some 50 ms on a mobile link, in which that many bytes would have come."""

MAX_WASTE = 0.02
"""Gaps are bridged up to this share of what is asked for: blocks are there to fetch few bytes."""


class Piece(msgspec.Struct, frozen=True):
    """A block and where it stands in its file."""

    start: int
    end: int
    digest: bytes

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


class Run(msgspec.Struct, frozen=True):
    """A stretch of a file to ask for at once: missing pieces in order, perhaps with something between them that is there
    already.
    """

    start: int
    end: int
    pieces: tuple[Piece, ...]


def pieces(file: File) -> list[Piece]:
    """The file's blocks in order; none when its publisher listed none."""
    found, at = [], 0
    for block in file.blocks:
        found.append(Piece(at, at + block.size_bytes, bytes.fromhex(block.sha256)))
        at += block.size_bytes
    return found


def runs(missing: Sequence[Piece]) -> list[Run]:
    """The fewest stretches that cover the missing pieces (in order) without asking for much that is there."""
    spare = int(MAX_WASTE * size_bytes(missing))
    found: list[Run] = []
    held: list[Piece] = []
    for piece in missing:
        gap = piece.start - held[-1].end if held else 0
        if gap > min(MAX_GAP_BYTES, spare):
            found.append(_run(held))
            held = []
        else:
            spare -= gap
        held.append(piece)
    if held:
        found.append(_run(held))
    return found


def size_bytes(some: Iterable[Piece]) -> int:
    return sum(piece.end - piece.start for piece in some)


def _run(held: list[Piece]) -> Run:
    return Run(held[0].start, held[-1].end, tuple(held))
