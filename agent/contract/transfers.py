"""Documents, blobs and new certificates over MQTT, for devices that reach only the broker's port. The device pulls, the server
answers; nothing is trusted.

The device publishes an Ask on `v1/d/<device>/up/blocks`: which parts of which thing it lacks, as a bitmap. The server publishes
each part as a message of its own on `v1/d/<device>/down/blocks/<id>`: a fixed head, then bytes. Both at most once: what got
lost is asked for again, so the device sets the pace, and a part's bytes are as good from a second answer as from the first.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Literal

import msgspec

from agent.contract.codec import FORMAT, Document, require_format

PART_BYTES = 64 * 1024
"""What devices ask for: small enough for the broker's largest message, and to share a slow link with reports."""

MIN_PART_BYTES, MAX_PART_BYTES = 1024, 64 * 1024
MAX_PARTS = 64
"""In one ask: 4 MiB at most, which is what a device that asks and does not read can leave with the broker for each."""

MAX_ASK_BYTES = 4096
_ID = re.compile(r"[A-Za-z0-9]{1,32}")
_BITMAP = re.compile(r"(?:[0-9a-f]{2}){1,8}")
_HEAD = struct.Struct("!BBxxIQ")  # version, status, nothing, part, size of the whole thing

Kind = Literal["metadata", "target", "record", "blob", "renewal"]


class Status(IntEnum):
    OK = 0
    NOT_FOUND = 1
    REFUSED = 2
    """The ask breaks a rule; the bytes say which, as text."""


class Ask(Document, frozen=True, kw_only=True):
    """`wanted`: bit n (the lowest of the first byte is 0), in hex, says whether part `first` + n is wanted."""

    id: str
    thing: Kind
    name: str
    first: int
    wanted: str
    part_bytes: int = PART_BYTES
    request: str = ""
    """Of a renewal: the SignedRenewal in its envelope (agent.contract.enrolment). The thing is the certificate, PEM."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "ask")
        if not _ID.fullmatch(self.id):
            raise ValueError("id must be 1 to 32 letters and digits")
        if not _BITMAP.fullmatch(self.wanted) or self.first < 0 or self.first >= 2**32 - MAX_PARTS:
            raise ValueError(f"wanted must be a bitmap of at most {MAX_PARTS} bits in hex, first a part's number")
        if not MIN_PART_BYTES <= self.part_bytes <= MAX_PART_BYTES:
            raise ValueError(f"part_bytes must be from {MIN_PART_BYTES} to {MAX_PART_BYTES}")
        if len(self.name) > 256:
            raise ValueError("name must have at most 256 characters")
        if bool(self.request) is not (self.thing == "renewal"):
            raise ValueError("a request goes with a renewal, and with nothing else")

    def parts(self) -> Iterator[int]:
        """The numbers of the parts that are wanted."""
        bits = int.from_bytes(bytes.fromhex(self.wanted), "little")
        return (self.first + bit for bit in range(bits.bit_length()) if bits >> bit & 1)


class Part(msgspec.Struct, frozen=True):
    """A part of a thing of `size_bytes`; or, with another status than OK, why there is none."""

    status: Status
    number: int
    size_bytes: int
    data: bytes

    def encode(self) -> bytes:
        return _HEAD.pack(FORMAT, self.status, self.number, self.size_bytes) + self.data


def bitmap(first: int, wanted: Iterable[int]) -> str:
    """The bitmap for these parts, of which `first` is the lowest."""
    bits = 0
    for number in wanted:
        bits |= 1 << (number - first)
    return bits.to_bytes(max(1, (bits.bit_length() + 7) // 8), "little").hex()


def decode_part(payload: bytes) -> Part | None:
    """None for what is no part."""
    if len(payload) < _HEAD.size:
        return None
    version, status, number, size = _HEAD.unpack_from(payload)
    if version != FORMAT or status not in Status.__members__.values():
        return None
    return Part(Status(status), number, size, payload[_HEAD.size :])
