"""The text of a long JSON list in pieces that end where an element ends, with its outline: which byte is what.

An outline has a letter for each byte: `[`, `]` and `,` outside of strings as they are, a space for white space, and `0` for
whatever is part of an element, be it a number, a string or an object with commas only in its strings. Nothing here says that
the text is JSON.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from agent.serving.answers import Refusal
from agent.serving.api.pauses import LARGEST, Pauses
from runtimes.contract import Array

OUTLINE = bytes(code if (code := ord(chr(n))) in b"[]," else 32 if n in b" \t\r\n" else 48 for n in range(256))
QUOTE, COMMA, OPEN, CLOSE = b'",[]'
WINDOW = LARGEST
LONGEST = 4 * WINDOW  # of an element in which no string is open
_AROUND = b" \t\r\n[],"


@dataclass(slots=True)
class Piece:
    """`text` ends with the comma behind its last element, if one comes; `lone` when it is one long element without what is
    around it.
    """

    text: bytes | memoryview
    outline: bytes
    lone: bool = False


def outside(text: bytes, outline: bytes, *, inside: bool = False) -> tuple[bytes, int]:
    """The outline with strings filled in, and where the last string begins if it does not end here, else -1. `inside`: the text
    begins within a string, and neither behind a backslash.
    """
    if QUOTE not in text and not inside:
        return outline, -1
    if b"\\" in text:  # pairs of them are themselves; what is left escapes the quote behind it
        text = text.replace(b"\\\\", b"00").replace(b'\\"', b"00")
    quotes = np.frombuffer(text, np.uint8) == QUOTE
    within = ((np.cumsum(quotes, dtype=np.int32) + inside) & 1).astype(bool)
    filled = np.where(quotes | within.view(bool)[:: within.itemsize], np.uint8(48), np.frombuffer(outline, np.uint8))
    return filled.tobytes(), max(text.rfind(b'"'), 0) if within[-1] else -1


def pieces(text: memoryview, pauses: Pauses) -> Iterator[Piece]:
    """All of it.  Raises: Refusal (400) where a single number is longer than any that means something."""
    at, end = 0, len(text)
    while at < end:
        size = pauses.size
        while True:
            stop = min(at + size, end)
            part = bytes(text[at:stop])
            outline, begins = outside(part, part.translate(OUTLINE))
            cut = len(part) if stop == end and begins < 0 else outline.rfind(b",") + 1
            if cut or stop == end or (size >= WINDOW and begins >= 0) or size > LONGEST:
                break
            size *= 4
        if cut:
            yield Piece(part[:cut], outline[:cut])
            at += cut
        else:
            if begins < 0:
                raise Refusal(400, f"an element of a list goes on for more than {size} bytes")
            piece, at = _lone(text, at, outline, begins, pauses)
            yield piece
        pauses.rest()


def _lone(text: memoryview, at: int, outline: bytes, begins: int, pauses: Pauses) -> tuple[Piece, int]:
    """The one element whose string begins `begins` bytes behind `at`, and where the next one does."""
    close = string_end(text, at + begins + 1, pauses)
    rest = bytes(text[close : close + WINDOW])
    behind, more = outside(rest, rest.translate(OUTLINE))
    cut = behind.find(b",") + 1 or len(rest)
    if more >= 0 and cut == len(rest):
        raise Refusal(400, "an element of a list has more than one long string")
    lead = len(outline) - len(outline.lstrip(b" ["))
    stop = close + len(behind[:cut].rstrip(b" ],"))
    return Piece(text[at + lead : stop], outline[:begins] + b"0" + behind[:cut], lone=True), close + cut


def whole(part: bytes, *, last: bool) -> bytes:
    """Without a backslash at its end whose next byte is in the next part; `last`: there is no next part."""
    cut = not last and len(part) > 1 and (len(part) - len(part.rstrip(b"\\"))) % 2
    return part[:-1] if cut else part


def list_end(text: memoryview, at: int, pauses: Pauses) -> int:
    """Just behind the bracket that closes the one at `at`.  Raises: Refusal (400) when none does."""
    depth, inside = 0, False
    while at < len(text):
        part = whole(bytes(text[at : at + pauses.size]), last=at + pauses.size >= len(text))
        closes = part.count(b"]")
        if depth > closes and not inside and QUOTE not in part:
            depth += part.count(b"[") - closes
        else:
            outline, begins = outside(part, part.translate(OUTLINE), inside=inside)
            codes = np.frombuffer(outline, np.uint8)
            depths = depth + np.cumsum((codes == OPEN).astype(np.int32) - (codes == CLOSE), dtype=np.int32)
            ends = np.flatnonzero(depths <= 0)
            if len(ends):
                return at + int(ends[0]) + 1
            depth, inside = int(depths[-1]), begins >= 0
        at += len(part)
        pauses.rest()
    raise Refusal(400, "a list of the JSON does not end")


def string_end(text: memoryview, at: int, pauses: Pauses) -> int:
    """Just behind the quote that ends the string whose content begins at `at`.  Raises: Refusal (400) when none does."""
    while at < len(text):
        part = whole(bytes(text[at : at + pauses.size]), last=at + pauses.size >= len(text))
        found = part.replace(b"\\\\", b"00").replace(b'\\"', b"00").find(b'"') if b"\\" in part else part.find(b'"')
        if found >= 0:
            return at + found + 1
        at += len(part)
        pauses.rest()
    raise Refusal(400, "a string of a list does not end")


def without_brackets(piece: Piece) -> bytes | memoryview:
    """Its elements with commas between them, as JSON has them."""
    if piece.lone:
        return piece.text
    text, outline = piece.text, piece.outline
    if b"[" in outline or b"]" in outline:
        codes = np.frombuffer(outline, np.uint8)
        brackets = (codes == OPEN) | (codes == CLOSE)
        text = np.where(brackets, np.uint8(32), np.frombuffer(text, np.uint8)).tobytes()
    assert isinstance(text, bytes)
    return text[:-1] if outline.endswith(b",") else text


# -- the form of nested lists
# ------------------------------------------------------------------------------------------------------

_CLASS = bytes(b"0[],".find(bytes((n,))) if n in b"0[]," else 0 for n in range(256))
# What may stand behind what: an element, a list that begins, one that ends, a comma.
_MAY = {"0": "0],", "[": "0[", "]": "],", ",": "0["}
_BAD = bytes(n < 16 and "0[],"[n & 3] not in _MAY["0[],"[n >> 2]] for n in range(256))


class Form:
    """Follows the outlines of a list, piece by piece, and says whether it has this shape, which has no size 0."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._rank = len(shape)
        self._sizes = [int(np.prod(shape[at:], dtype=object)) for at in range(1, len(shape))]  # of the lists within lists
        self._count = int(np.prod(shape, dtype=object))
        self.commas = self._opened = self._closed = 0
        self._last = b""

    def fits(self, outline: bytes) -> bool:
        """False when no list of this shape goes on like that."""
        if self._last == b"," and b"[" not in outline and b"]" not in outline:
            self.commas += outline.count(
                b","
            )  # no list ends here: one that should have is missed at the next bracket, or at the end
            return True
        tight = outline.translate(None, b" ")
        codes = np.frombuffer((self._last + tight).translate(_CLASS), np.uint8)
        self._last = tight[-1:] or self._last
        if (codes[:-1] << 2 | codes[1:]).tobytes().translate(_BAD).find(1) >= 0:
            return False
        commas = np.flatnonzero(codes[len(codes) - len(tight) :] == 3)
        here = codes[len(codes) - len(tight) :]
        fits = self._counts_fit(here, commas)
        self.commas += len(commas)
        self._opened += tight.count(b"[")
        self._closed += tight.count(b"]")
        return fits

    def _counts_fit(self, codes: Array, commas: Array) -> bool:
        """Behind element i of a list of lists, those lists end whose sizes divide i, and the next ones begin."""
        if not len(commas):
            return True
        number = np.arange(self.commas + 1, self.commas + len(commas) + 1)
        opened = self._opened + np.cumsum(codes == 1, dtype=np.int32)[commas]
        closed = self._closed + np.cumsum(codes == 2, dtype=np.int32)[commas]
        ended, begun = np.zeros_like(number), np.full_like(number, self._rank)
        for size in self._sizes:
            ended += number // size
            begun += (number - 1) // size
        return bool((closed == ended).all() and (opened == begun).all())

    def ended(self) -> bool:
        """Whether all of it was there."""
        lists = self._rank + sum((self._count - 1) // size for size in self._sizes)
        return self.commas == self._count - 1 and self._opened == self._closed == lists and self._last == b"]"


def shape_of(text: memoryview, pauses: Pauses) -> tuple[int, ...] | None:
    """The only shape that the list can have, if it is regular; None when it cannot be."""
    first = bytes(text[:WINDOW]).translate(OUTLINE)
    rank = 0
    for code in first:
        if code not in b"[ ":
            break
        rank += code == OPEN
    commas, elements = 0, False
    sizes: list[int] = []
    for piece in pieces(text, pauses):
        tight = piece.outline.translate(None, b" ")
        elements = elements or b"0" in tight
        while len(sizes) < rank - 1 and (found := tight.find(b"]" * (len(sizes) + 1) + b",")) >= 0:
            sizes.append(commas + tight.count(b",", 0, found) + 1)
        commas += tight.count(b",")
    if not elements:
        return None
    counts = [commas + 1, *[commas + 1] * (rank - 1 - len(sizes)), *reversed(sizes), 1]
    if rank == 0 or any(a % b for a, b in itertools.pairwise(counts)):
        return None
    return tuple(a // b for a, b in itertools.pairwise(counts))
