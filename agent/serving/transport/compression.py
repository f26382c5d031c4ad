"""Content codings of bodies: gzip and deflate (which HTTP means as a zlib stream), in and out.

A compressed request is inflated by the thread that answers it, never by the one that polls. What it may inflate to is bounded while
inflating, so that a small body cannot ask for all memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from agent.serving.answers import Buffer, Refusal

OFFERED = b"gzip, deflate"
USEFUL_BYTES = 1024  # a smaller answer fits one segment anyway
LEVEL = 1  # tensors gain little from more, and the local socket is faster than any level
_WINDOW = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}


@dataclass(frozen=True, slots=True)
class Coding:
    """How a request's body is compressed, and how its answer may be; None for not at all."""

    body: bytes | None
    answer: bytes | None


def request_coding(value: bytes | None) -> bytes | None:
    """The coding that Content-Encoding names, None for none.  Raises: Refusal (501) for one that is not offered."""
    coding = (value or b"identity").strip().lower()
    if coding == b"identity":
        return None
    if coding not in _WINDOW:
        shown = repr(coding[:64].decode("ascii", "replace"))
        raise Refusal(
            501, f"content encoding {shown} is not supported: send gzip or deflate", headers=((b"accept-encoding", OFFERED),)
        )
    return coding


def answer_coding(value: bytes | None) -> bytes | None:
    """The coding that Accept-Encoding likes best of gzip and deflate; None when it likes the bytes as they are as well as those."""
    if not value:
        return None
    weights: dict[bytes, float] = {}
    for item in value.lower().split(b",")[:16]:
        name, _, rest = item.partition(b";")
        weights[name.strip()] = _weight(rest)
    other = weights.get(b"*", 0.0)
    best, coding = max((weights.get(name, other), name) for name in (b"deflate", b"gzip"))
    return coding if best > 0 and best >= weights.get(b"identity", 0.0) else None


def _weight(parameters: bytes) -> float:
    name, _, value = parameters.partition(b"=")
    if name.strip() != b"q":
        return 1.0
    try:
        weight = float(value)
    except ValueError:
        return 0.0
    return weight if 0 <= weight <= 1 else 0.0


def inflate(body: Buffer, coding: bytes, limit_bytes: int) -> memoryview:
    """What `body` was before it was compressed.  Raises: Refusal (400 damaged, cut or followed by more; 413 larger than the limit)."""
    stream = zlib.decompressobj(_WINDOW[coding])
    try:
        data = stream.decompress(body, limit_bytes + 1)
    except zlib.error as error:
        raise Refusal(400, f"the body is not what content encoding {coding.decode()} makes: {error}") from error
    if len(data) > limit_bytes:
        raise Refusal(413, f"the body is larger than the {limit_bytes} bytes allowed once inflated (serve.max_body_bytes)")
    if not stream.eof:
        raise Refusal(400, f"the body ends before its content encoding {coding.decode()} does")
    if stream.unused_data:  # gzip would allow further members; looking for the end of millions of tiny ones takes for ever
        raise Refusal(400, f"{len(stream.unused_data)} bytes follow the end of the compressed body")
    return memoryview(data)


def deflate(parts: Sequence[Buffer], coding: bytes) -> bytes:
    """All of `parts`, compressed."""
    stream = zlib.compressobj(LEVEL, zlib.DEFLATED, _WINDOW[coding])
    return b"".join([*(stream.compress(part) for part in parts), stream.flush()])
