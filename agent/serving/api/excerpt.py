"""A request's JSON without its long lists and strings, which are found but not read: what is left is short, and read whole.

Each list or string that is taken out leaves a place that says its number. So a reader that makes an object for every value
never sees the tensors; `lists` reads them piece by piece into their arrays. NaN and Infinity, which JSON does not know, are
taken out too.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from typing import Any, NoReturn

import msgspec

from agent.contract.codec import decoder
from agent.serving.answers import Refusal
from agent.serving.api import list_pieces
from agent.serving.api.pauses import Pauses

WHOLE_BYTES = 16 * 1024  # JSON that is read as it is: a fraction of a millisecond, whatever it says
LONG_BYTES = 1024  # of a list or string that is taken out
REST_BYTES = 256 * 1024  # of what is left: objects take up to twenty times as much
_NAME = secrets.token_hex(8)  # of a place: nobody can write one into a request
_PLACE = re.compile(rb'\{"' + _NAME.encode() + rb'":(\d+)\}')
_STRANGE = re.compile(rb"-?(?:NaN|Infinity)")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_B64 = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*"b64"')


def is_strange(text: bytes) -> bool:
    """Whether it may have numbers that JSON does not know."""
    return b"NaN" in text or b"Infinity" in text


class Excerpt:
    """`rest` is JSON with places in it; `found` is what was there."""

    def __init__(self, text: memoryview, rest_bytes: int = REST_BYTES) -> None:
        """Raises: Refusal (400)."""
        self.found: list[memoryview] = []
        self._asked: set[int] = set()
        self._text = text
        self._limit = rest_bytes
        self._pauses = Pauses()
        self.rest = self._take_numbers(self._take_long())

    def text_of(self, raw: msgspec.Raw | bytes) -> bytes | memoryview:
        """The JSON of a value of `rest`, with what was taken out of it."""
        data = bytes(raw)
        place = _PLACE.fullmatch(data)
        if place is not None:
            return self._ask(place)
        return _PLACE.sub(lambda place: bytes(self._ask(place)), data) if _NAME.encode() in data else data

    @staticmethod
    def has_place(text: bytes) -> bool:
        return _NAME.encode() in text

    def _ask(self, place: re.Match[bytes]) -> memoryview:
        self._asked.add(int(place[1]))
        return self.found[int(place[1])]

    def check_unread(self) -> None:
        """Checks what was left out and nobody asked for.  Raises: Refusal (400) when it is much, or no JSON."""
        unread = [view for number, view in enumerate(self.found) if number not in self._asked]
        if sum(map(len, unread)) > self._limit:
            self._too_long(sum(map(len, unread)))
        for view in unread:
            if not _STRANGE.search(view):
                try:
                    decoder(msgspec.Raw).decode(view)
                except (msgspec.DecodeError, RecursionError) as error:
                    raise Refusal(400, f"the JSON cannot be read: {error}") from error

    def _place(self, start: int, stop: int) -> bytes:
        self.found.append(self._text[start:stop])
        return b'{"%b":%d}' % (_NAME.encode(), len(self.found) - 1)

    def _take_long(self) -> bytes:
        """The text with places instead of what is long."""
        out: list[bytes] = []
        kept, at, end = 0, 0, len(self._text)
        while at < end:
            piece, at = self._next(at, end)
            out.append(piece)
            kept += len(piece)
            if kept > self._limit:
                self._too_long(kept)
            self._pauses.rest()
        return b"".join(out)

    def _next(self, at: int, end: int) -> tuple[bytes, int]:
        """A piece of the rest from `at` on, and where the next one begins."""
        size = max(self._pauses.size, 2 * LONG_BYTES)
        part = list_pieces.whole(bytes(self._text[at : at + size]), last=at + size >= end)
        outline, begins = list_pieces.outside(part, part.translate(list_pieces.OUTLINE))
        if begins > 0:
            part, outline = part[:begins], outline[:begins]
        elif begins == 0:
            stop = list_pieces.string_end(self._text, at + 1, self._pauses)
            behind = bytes(self._text[stop : stop + LONG_BYTES]).lstrip()
            if stop - at <= LONG_BYTES or behind.startswith(b":"):  # short, or a name
                return bytes(self._text[at : min(stop, at + self._limit + 1)]), stop
            return self._place(at, stop), stop
        start = -1
        while (start := outline.find(b"[", start + 1)) >= 0:
            inner = part[start + 1 :]
            if inner.lstrip()[:1] == b"{" and not _B64.match(inner):
                continue
            stop = self._end(outline, at, start)
            size = stop - at - start
            if size > LONG_BYTES or is_strange(bytes(self._text[at + start : stop])):
                return part[:start] + self._place(at + start, stop), stop
            if stop - at > len(part):
                return bytes(self._text[at:stop]), stop
            start = stop - at - 1
        return part, at + len(part)

    def _end(self, outline: bytes, at: int, start: int) -> int:
        close = outline.find(b"]", start)
        if close > 0 and outline.find(b"[", start + 1, close) < 0:
            return at + close + 1
        return list_pieces.list_end(self._text, at + start, self._pauses)

    def _take_numbers(self, rest: bytes) -> bytes:
        """Places instead of NaN and Infinity that stand alone."""
        if not is_strange(rest):
            return rest
        outline, _ = list_pieces.outside(rest, bytes(rest))  # its strings become zeros
        out, at = [], 0
        for match in _STRANGE.finditer(outline):
            self.found.append(memoryview(match[0]))
            out += [rest[at : match.start()], b'{"%b":%d}' % (_NAME.encode(), len(self.found) - 1)]
            at = match.end()
        return b"".join([*out, rest[at:]])

    def _too_long(self, size: int) -> NoReturn:
        raise Refusal(
            400, f"the JSON has {size} bytes or more besides the tensors' data, more than the {self._limit} that are read"
        )


def _check_surrogates(text: bytes) -> None:
    """Raises: Refusal (400) for JSON that is none only because of them; msgspec calls it truncated."""
    if _SURROGATE.search(text):
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(text.decode())
            raise Refusal(400, "a string of the JSON has half of a surrogate pair, which is no text")


def read_excerpt(text: memoryview, reader: Any, rest_bytes: int = REST_BYTES) -> tuple[Any, bytes, Excerpt | None]:
    """What `reader` makes of it, the JSON that it was given, and what was taken out of that before: None for nothing.

    Raises: Refusal (400); as the reader.
    """
    if len(text) <= WHOLE_BYTES:
        try:
            return reader.decode(text), b"", None
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            _check_surrogates(bytes(text))
            if not is_strange(bytes(text)):
                raise
    excerpt = Excerpt(text, rest_bytes)
    return reader.decode(excerpt.rest), excerpt.rest, excerpt
