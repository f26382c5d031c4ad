"""What devices hear of the fleet's word: the signed documents that a poke carries, read without a look at their signatures.

Most simulated devices only read: all of them get the same poke, and one reading serves for all. Those that verify do so in
`looks`.
"""

from __future__ import annotations

import re

import msgspec
from securesystemslib.dsse import Envelope

from agent.contract.assignment import (
    MAX_ASSIGNMENT_BYTES,
    MAX_RECORD_BYTES,
    Assignment,
    DeviceRecord,
    read_assignment,
)
from agent.contract.codec import ContractError, decode
from agent.contract.manifest import ReleaseManifest, parse_manifest
from agent.contract.names import ReleaseRef
from agent.contract.news import RECORD, News, read_poke, unpack

_MANIFEST = re.compile(r"targets/releases/([^/]+)/[0-9a-f]{64}\.([0-9]+)\.json")
_ASSIGNMENT = re.compile(r"targets/assignments/[0-9a-f]{64}\.fleet\.json")
KEPT = 8


class Said(msgspec.Struct, frozen=True):
    """The fleet's word as a device has it. `assignment` None: the poke did not carry it, so the server has to be asked, within
    `spread_s`. `groups` None: nothing new of this device's own.
    """

    assignment: Assignment | None = None
    groups: tuple[str, ...] | None = None
    manifests: tuple[ReleaseManifest, ...] = ()
    spread_s: float = 0.0
    news: News | None = None


class Reader:
    """Reads pokes; one that was read lately is not read again."""

    def __init__(self) -> None:
        self._read: dict[bytes, Said] = {}

    def read(self, payload: bytes) -> Said:
        """Raises: ContractError when it is no poke."""
        if (said := self._read.get(payload)) is not None:
            return said
        said = _said(payload)
        while len(self._read) >= KEPT:
            del self._read[next(iter(self._read))]
        self._read[payload] = said
        return said


def _said(payload: bytes) -> Said:
    poke = read_poke(payload)
    if not poke.news:
        return Said(spread_s=poke.spread_s)
    news = unpack(poke.news)
    assignment, manifests = None, []
    for path, text in news.documents.items():
        if _ASSIGNMENT.fullmatch(path):
            assignment = read_assignment(text.encode(), limit_bytes=MAX_ASSIGNMENT_BYTES)
        elif found := _MANIFEST.fullmatch(path):
            manifests.append(parse_manifest(text.encode(), expected=ReleaseRef(found[1], int(found[2]))))
    groups = record_in(news.documents[RECORD].encode()).groups if RECORD in news.documents else None
    return Said(assignment, groups, tuple(manifests), poke.spread_s, news)


def record_in(envelope: bytes) -> DeviceRecord:
    """The device record in its envelope, whoever signed it.  Raises: ContractError."""
    try:
        payload = Envelope.from_dict(msgspec.json.decode(envelope)).payload
    except Exception as error:  # securesystemslib raises KeyError, TypeError, FormatError… for a malformed envelope
        raise ContractError(f"the device record is not a signed envelope: {error}") from error
    return decode(payload, DeviceRecord, limit_bytes=MAX_RECORD_BYTES)
