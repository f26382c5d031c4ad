"""The JSON of TensorFlow Serving's requests: long lists are left as text, rows become columns, and none of it more memory than
allowed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import msgspec
import numpy as np

from agent.contract.codec import decoder
from agent.serving.allowance import Allowance
from agent.serving.answers import Refusal
from agent.serving.api import json_body, list_pieces
from agent.serving.api.excerpt import REST_BYTES, Excerpt, read_excerpt
from agent.serving.api.pauses import Pauses

MAX_ROWS_BYTES = 4 * 1024 * 1024  # of a request besides its long lists: rows of single numbers
MEMBER_BYTES = 256  # of an object, in memory
_Document = TypeVar("_Document", bound=msgspec.Struct)

Text = bytes | memoryview  # of one JSON value
_COMMA = re.compile(rb"[ \t\r\n]*,")


class Body:
    """A request's body. What is made of it is taken from `allowance`."""

    def __init__(self, text: Text, allowance: Allowance | None = None) -> None:
        self.text = memoryview(text)
        self.allowance = allowance or Allowance(body_bytes=len(text))
        if self.allowance.made:
            self.allowance.again()
        self._excerpt: Excerpt | None = None

    def document(self, kind: type[_Document]) -> _Document:
        """Raises: Refusal (400)."""
        try:
            found, rest, self._excerpt = read_excerpt(self.text, decoder(kind), MAX_ROWS_BYTES)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Refusal(400, f"JSON Parse error: {error}") from error
        document: _Document = found
        text, places = (bytes(self.text), 0) if self._excerpt is None else (rest, len(self._excerpt.found))
        # Numbers in lists have no colon: with more of them than keys, one may be there twice. What is huge is rows for the most
        # part.
        if len(text) <= REST_BYTES:
            keys = sum(f'"{name}"'.encode() in text for name in kind.__struct_fields__)
            if text.count(b":") > keys + places:
                json_body.check_keys(text, (), "a request that TensorFlow Serving takes")
        return document

    def text_of(self, raw: msgspec.Raw) -> Text:
        return bytes(raw) if self._excerpt is None else self._excerpt.text_of(raw)

    def members(self, raw: msgspec.Raw | bytes) -> dict[str, msgspec.Raw]:
        """The members of an object, by name.  Raises: Refusal (400; 413, 503 when they are too many)."""
        text = bytes(raw)
        self.allowance.reserve(text.count(b":") * MEMBER_BYTES, "the members of the request's objects")
        found: dict[str, msgspec.Raw] = _decoded(text, dict[str, msgspec.Raw])
        return found

    def rows(self, raw: msgspec.Raw) -> Iterator[list[dict[str, Text]]]:
        """The objects of a list, some at a time, with the JSON of their members.  Raises: Refusal (400)."""
        text, at, pauses = bytes(raw).strip(), 1, Pauses()
        while True:
            chunk, at = _chunk(text, at, pauses.size)
            found: list[dict[str, Any]] = _decoded(b"[%b]" % chunk, list[dict[str, msgspec.Raw]])
            if self._excerpt is not None and self._excerpt.has_place(chunk):
                found = [{name: self._excerpt.text_of(value) for name, value in row.items()} for row in found]
            yield found
            if at >= len(text):
                return
            pauses.rest()

    def stacked(self, rows: Iterator[list[Mapping[str, Text]]], row_name: str, values_name: str) -> tuple[dict[str, Text], int]:
        """The list of each member's values in all rows, and how many there are. `row_name` and `values_name` are what
        a row and its members are called.

        Raises: Refusal (400 when a row has other members than the first; 413, 503).
        """
        self.allowance.reserve(2 * len(self.text), "what the rows say")
        found: dict[str, list[Text]] = {}
        count = 0
        for some in rows:
            for row in some:
                if count and row.keys() != found.keys():
                    known = ", ".join(map(repr, found))
                    raise Refusal(400, f"{row_name} {count} has other {values_name} than the ones before it: expected {known}")
                if not count:
                    found = {name: [] for name in row}
                count += 1
            for name, values in found.items():
                values.append(b",".join([row[name] for row in some]))
        return {name: b"[%b]" % b",".join(filter(None, values)) for name, values in found.items()}, count


def _chunk(text: bytes, at: int, size: int) -> tuple[bytes, int]:
    """Whole rows from `at` on, of some `size` bytes or of one that is longer, and where the next ones begin."""
    while at + size < len(text):
        part = list_pieces.whole(text[at : at + size], last=False)
        codes = np.frombuffer(list_pieces.outside(part, part)[0], np.uint8)
        depths = np.cumsum((codes == ord("{")).astype(np.int32) - (codes == ord("}")), dtype=np.int32)
        ends = np.flatnonzero((codes == ord("}")) & (depths == 0))
        if len(ends):
            stop = at + int(ends[-1]) + 1
            comma = _COMMA.match(text, stop)
            if comma is not None:
                return text[at:stop], comma.end()
        size *= 2
    return text[at:-1], len(text)


def _decoded(text: bytes, kind: Any) -> Any:
    try:
        return decoder(kind).decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f"JSON Parse error: {error}") from error
