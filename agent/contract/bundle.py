"""A bundle: one file that carries signed documents and blobs to where no network goes. A plain tar that any tar lists.

    bundle.json                      Bundle: what is in it. Not signed, and believed by nobody
    metadata/<name>                  TUF metadata as the device listener serves it
    targets/<path>                   TUF targets by their consistent-snapshot names: the assignment, manifests
    records/<device>.json            device records in their envelopes
    blobs/<sha256>                   files

Whoever reads one has it from a stranger's stick: only regular members with names of these five shapes are taken, each once, within
limits that stand before anything is read into memory. Links, devices, long-name records, other names and truncation are errors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import IO, Literal

import msgspec

from agent.contract.assignment import MAX_RECORD_BYTES
from agent.contract.codec import FORMAT, Document, require_format
from agent.contract.manifest import MAX_MANIFEST_BYTES

SUFFIX = ".bundle"
HEAD = "bundle.json"
BLOCK = 512
MAX_MEMBERS = 100_000
MAX_DOCUMENT_BYTES = 5_000_000  # what a TUF client reads of any role
MAX_DOCUMENTS_BYTES = 256 * 1024 * 1024
MAX_BLOB_BYTES = 64 * 1024**3

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,139}"
_SHAPES: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"bundle\.json"), 1024 * 1024),
    (re.compile(rf"metadata/{_PART}\.json"), MAX_DOCUMENT_BYTES),
    (re.compile(rf"targets/(?:{_PART}/){{1,3}}{_PART}\.json"), max(MAX_DOCUMENT_BYTES, MAX_MANIFEST_BYTES)),
    (re.compile(rf"records/{_PART}\.json"), 2 * MAX_RECORD_BYTES),
    (re.compile(r"blobs/[0-9a-f]{64}"), MAX_BLOB_BYTES),
)


class BundleError(ValueError):
    """The file is not a whole bundle; the message says where it stops being one."""


class Bundle(Document, frozen=True, kw_only=True):
    """What a bundle says about itself: for people, and to say early that it is of another fleet."""

    fleet: str
    created: float
    valid_until: float
    devices: tuple[str, ...]
    releases: tuple[str, ...]
    blobs: int
    size_bytes: int
    """Of all blobs."""
    kind: Literal["bundle"] = "bundle"
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "bundle")


class Member(msgspec.Struct, frozen=True):
    """Where a member's bytes are in the file."""

    name: str
    offset: int
    size_bytes: int

    @property
    def is_blob(self) -> bool:
        return self.name.startswith("blobs/")


def header(name: str, size_bytes: int, modified: float) -> bytes:
    """The tar header of a member.  Raises: ValueError when a bundle has no members of that name or size."""
    _limit(name, size_bytes)
    prefix, last = "", name
    if len(name) > 100:
        prefix, _, last = name.rpartition("/")
    size = b"%011o\0" % size_bytes if size_bytes < 8**11 else b"\x80" + size_bytes.to_bytes(11, "big")
    fields = (
        last.encode().ljust(100, b"\0"), b"0000644\0", b"0000000\0", b"0000000\0", size, b"%011o\0" % int(modified),
        b" " * 8, b"0", b"\0" * 100, b"ustar\x0000", b"\0" * 32, b"\0" * 32, b"\0" * 16, prefix.encode().ljust(155, b"\0"),
        b"\0" * 12,
    )  # fmt: skip
    block = b"".join(fields)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padding(size_bytes: int) -> bytes:
    """What follows a member's bytes."""
    return b"\0" * (-size_bytes % BLOCK)


END = b"\0" * (2 * BLOCK)


def length(members: dict[str, int]) -> int:
    """The size of a bundle with members of these sizes, in bytes."""
    return sum(BLOCK + size + len(padding(size)) for size in members.values()) + len(END)


def members(file: IO[bytes]) -> Iterator[Member]:
    """The members in order, without their bytes; the first is `bundle.json`. Reads headers only.  Raises: BundleError,
    OSError.
    """
    size = os.fstat(file.fileno()).st_size
    at, seen, documents = 0, set[str](), 0
    while True:
        block = os.pread(file.fileno(), BLOCK, at)
        if len(block) < BLOCK:
            raise BundleError(f"it is cut off at byte {size}: a bundle ends with two empty blocks")
        if block == b"\0" * BLOCK:
            break
        member = member_of(block, at)
        if member.name in seen:
            raise BundleError(f"it has {member.name!r} twice")
        if not seen and member.name != HEAD:
            raise BundleError(f"it begins with {member.name!r}, a bundle with {HEAD!r}")
        if member.offset + member.size_bytes > size:
            raise BundleError(f"it is cut off at byte {size}, in the middle of {member.name!r}")
        seen.add(member.name)
        documents += 0 if member.is_blob else member.size_bytes
        if len(seen) > MAX_MEMBERS or documents > MAX_DOCUMENTS_BYTES:
            raise BundleError(f"it has more than {MAX_MEMBERS} members or {MAX_DOCUMENTS_BYTES} bytes of documents")
        yield member
        at = member.offset + member.size_bytes + len(padding(member.size_bytes))
    if not seen:
        raise BundleError("it is empty")


def read(file: IO[bytes], member: Member) -> bytes:
    """A document's bytes.  Raises: BundleError, OSError."""
    data = os.pread(file.fileno(), member.size_bytes, member.offset)
    if len(data) != member.size_bytes:
        raise BundleError(f"it is cut off in the middle of {member.name!r}")
    return data


def member_of(block: bytes, at: int) -> Member:
    try:
        said = int(block[148:156].strip(b" \0") or b"-1", 8)
        size = int.from_bytes(block[125:136], "big") if block[124] == 0x80 else int(block[124:136].strip(b" \0") or b"0", 8)
        name = block[:100].rstrip(b"\0").decode("ascii")
        prefix = block[345:500].rstrip(b"\0").decode("ascii")
    except ValueError:
        raise BundleError(f"there is no tar header at byte {at}") from None
    if block[257:262] != b"ustar" or said != sum(block[:148]) + 8 * 32 + sum(block[156:]):
        raise BundleError(f"there is no tar header at byte {at}, or it is damaged")
    name = f"{prefix}/{name}" if prefix else name
    if block[156:157] not in {b"0", b"\0"}:
        raise BundleError(f"{name!r} is not a regular file: links and the like have no place in a bundle")
    try:
        _limit(name, size)
    except ValueError as error:
        raise BundleError(str(error)) from None
    return Member(name, at + BLOCK, size)


def _limit(name: str, size_bytes: int) -> None:
    limit = next((limit for shape, limit in _SHAPES if shape.fullmatch(name)), None)
    if limit is None:
        raise ValueError(f"{name!r} is no name that a bundle has")
    if not 0 <= size_bytes <= limit:
        raise ValueError(f"{name!r} has {size_bytes} bytes, at most {limit} are allowed")
