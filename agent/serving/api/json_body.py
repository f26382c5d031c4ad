"""What JSON leaves open and a server must not: a key that stands twice, of which every reader takes the one it likes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from agent.contract.codec import decoder
from agent.serving.answers import Refusal
from agent.serving.api.parameters import shown

MAX_BYTES = 256 * 1024  # of a request without its tensors; it is read in Python, some ten times slower than otherwise
LONG_BYTES = 1024

T = TypeVar("T")


def read_body(body: bytes | memoryview, kind: type[T], what: str = "what this route takes", *, code: str | None = None) -> T:
    """A body without tensors, of a request that changes or asks for something; `{}` when it is empty.  Raises: Refusal (400,
    which says that it is not `what`; 413).
    """
    if len(body) > MAX_BYTES:
        raise Refusal(413, f"the body has {len(body)} bytes; {what} has at most {MAX_BYTES}", code=code)
    text = bytes(body) or b"{}"
    try:
        found: T = decoder(kind).decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f"the body is not {what}: {error}", code=code) from error
    try:
        check_keys(text, (), what)
    except Refusal as refusal:
        refusal.code = code
        raise
    return found


def check_keys(text: bytes, tensors: Sequence[msgspec.Raw], what: str = "an inference request") -> None:
    """`text` is JSON that was read before, `tensors` the data within it.  Raises: Refusal (400) for a key that stands twice."""
    rest = _without(text, tensors)
    if len(rest) > MAX_BYTES:
        raise Refusal(400, f"the JSON has {len(rest)} bytes besides the tensors' data, more than the {MAX_BYTES} that are read")
    try:
        json.loads(rest, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not {what}: {error}") from error


def _without(text: bytes, tensors: Sequence[msgspec.Raw]) -> bytes:
    pieces, at = [], 0
    for tensor in tensors:
        data = bytes(tensor)
        if len(data) < LONG_BYTES:
            continue
        found = text.find(data, at)
        if found >= 0:
            pieces += [text[at:found], b"0"]
            at = found + len(data)
    return b"".join([*pieces, text[at:]])


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise Refusal(400, f"key {shown(key)} stands twice in one object of the JSON")
        found[key] = value
    return found
