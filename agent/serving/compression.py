"""Content codings of bodies: gzip and deflate (which HTTP means as a zlib stream), in and out.

A compressed request is inflated by the thread that answers it, never by the one that polls. What it may inflate to is bounded
while inflating, so that a small body cannot ask for all memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from agent.serving.allowance import Allowance
from agent.serving.answers import Buffer, Refusal

OFFERED = b"gzip, deflate"
USEFUL_BYTES = 1024  # a smaller answer fits one segment anyway
LEVEL = 1  # tensors gain little from more, and the local socket is faster than any level
PIECE_BYTES = 64 * 1024  # are inflated at once
MAX_MEMBERS = 1024  # one may have twenty bytes and say nothing
_GZIP = b"\x1f\x8b"  # how each member begins
_SAME = {b"x-gzip": b"gzip"}  # RFC 9110, section 8.4.1.3
_WINDOW = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}


@dataclass(frozen=True, slots=True)
class Coding:
    """How a request's body is compressed, and how its answer may be; None for not at all."""

    body: bytes | None
    answer: bytes | None
    must: bool = False  # the client takes no answer that is not compressed


def request_coding(value: bytes | None) -> bytes | None:
    """The coding that Content-Encoding names, None for none.  Raises: Refusal (415) for one that is not offered."""
    codings = [name for item in (value or b"").lower().split(b",") if (name := item.strip()) not in (b"", b"identity")]
    coding = b", ".join(codings) or b"identity"
    if coding == b"identity":
        return None
    if coding not in _WINDOW:
        shown = repr(coding[:64].decode("ascii", "replace"))
        raise Refusal(
            415, f"content encoding {shown} is not supported: send gzip or deflate", headers=((b"accept-encoding", OFFERED),)
        )
    return coding


def answer_coding(value: bytes | None) -> tuple[bytes | None, bool]:
    """The coding that Accept-Encoding likes best of gzip and deflate, None when it likes the bytes as they are as well as
    those; and whether it takes no others (RFC 9110, section 12.5.3).  Raises: Refusal (406) when it takes nothing that is
    offered.
    """
    if not value:
        return None, False
    weights: dict[bytes, float] = {}
    for item in value.lower().split(b",")[:16]:
        name, _, rest = item.partition(b";")
        weights[_SAME.get(name.strip(), name.strip())] = _weight(rest)
    other = weights.get(b"*", 0.0)
    best, coding = max((weights.get(name, other), name) for name in (b"deflate", b"gzip"))
    plain = weights.get(b"identity", 1.0 if b"*" not in weights else other)
    if plain <= 0 and best <= 0:
        raise Refusal(406, "no content coding is accepted that is offered: accept gzip, deflate or identity")
    liked = best > 0 and best >= weights.get(b"identity", 0.0)
    return coding if liked else None, plain <= 0


def _weight(parameters: bytes) -> float:
    name, _, value = parameters.partition(b"=")
    if name.strip() != b"q":
        return 1.0
    try:
        weight = float(value)
    except ValueError:
        return 0.0
    return weight if 0 <= weight <= 1 else 0.0


def inflate(body: Buffer, coding: bytes, limit_bytes: int, allowance: Allowance | None = None) -> memoryview:
    """What `body` was before it was compressed, charged to `allowance`. Of gzip that is all its members, one behind another.

    Raises: Refusal (400 damaged, cut, or followed by something else; 413 larger than the limit; 503 others have so much).
    """
    left, made, members = memoryview(body), bytearray(), 1
    stream = zlib.decompressobj(_WINDOW[coding])
    data: Buffer = b""
    while True:
        if not data:
            if not left:
                raise Refusal(400, f"the body ends before its content encoding {coding.decode()} does")
            data, left = left[:PIECE_BYTES], left[PIECE_BYTES:]
        try:
            piece = stream.decompress(data, PIECE_BYTES)
        except zlib.error as error:
            raise Refusal(400, f"the body is not what content encoding {coding.decode()} makes: {error}") from error
        if len(made) + len(piece) > limit_bytes:
            raise Refusal(413, f"the body is larger than the {limit_bytes} bytes allowed once inflated (serve.max_body_bytes)")
        if allowance is not None and piece:
            allowance.charge(len(piece))
        made += piece
        if not stream.eof:
            data = stream.unconsumed_tail
            continue
        data = stream.unused_data
        if not (data or left):
            return memoryview(made)
        following = bytes(data[:2]) + bytes(left[: max(0, 2 - len(data))])
        if coding == b"deflate" or following != _GZIP:
            raise Refusal(400, f"{len(data) + len(left)} bytes follow the end of the compressed body")
        members += 1
        if members > MAX_MEMBERS:
            raise Refusal(400, f"the body has more than {MAX_MEMBERS} gzip members")
        stream = zlib.decompressobj(_WINDOW[coding])


def deflate(parts: Sequence[Buffer], coding: bytes) -> bytes:
    """All of `parts`, compressed."""
    stream = zlib.compressobj(LEVEL, zlib.DEFLATED, _WINDOW[coding])
    return b"".join([*(stream.compress(part) for part in parts), stream.flush()])
