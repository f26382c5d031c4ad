"""What a poke may carry: signed documents that the device would otherwise ask its server for.

Nothing of it is trusted more for the way it came: a device verifies each document as it verifies what it fetches. So everything
here is bounded before it is read, and whatever is wrong with it is one more poke without news.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

from agent.contract.codec import FORMAT, Document, Unreadable, decode, encode, require_format
from agent.contract.topics import Poke

MAX_POKE_BYTES = 64 * 1024
"""The largest poke that a device reads."""

PACKED_BYTES = 16 * 1024
"""What a server packs at most. A poke goes to every device: 10 000 of them get 160 MB at most."""

MAX_NEWS_BYTES = 512 * 1024
"""What a device unpacks at most."""

LIKELY = 10
"""How many times larger than its packed form a document may be to be tried: signed metadata packs to between a half and a fifth."""

MAX_DOCUMENTS = 32

TIMESTAMP = "metadata/timestamp.json"
RECORD = "record"


class News(Document, frozen=True, kw_only=True):
    """`documents` by the path at which the server has them: `metadata/timestamp.json`, `targets/…`, and `record`, which is the
    device's own. `root` is the version of the newest trusted root: a device that has an older one asks for it.
    """

    root: int
    documents: dict[str, str]
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "news")
        if len(self.documents) > MAX_DOCUMENTS:
            raise ValueError(f"news has at most {MAX_DOCUMENTS} documents")


def pack_what_fits(
    root: int, needed: Mapping[str, bytes], useful: Iterable[tuple[str, bytes]], limit_bytes: int = PACKED_BYTES
) -> bytes:
    """News with all that is needed, and of what is useful as much as there is room for, in its order. Nothing when what is
    needed does not fit. Every document is JSON, so text.
    """
    chosen = {path: data.decode() for path, data in needed.items()}
    found = _packed(root, chosen, limit_bytes)
    for path, data in useful if found else ():
        if len(chosen) < MAX_DOCUMENTS and len(data) <= limit_bytes * LIKELY and path not in chosen:
            more = {**chosen, path: data.decode()}
            if attempt := _packed(root, more, limit_bytes):
                chosen, found = more, attempt
    return found


def _packed(root: int, documents: dict[str, str], limit_bytes: int) -> bytes:
    if sum(map(len, documents.values())) > limit_bytes * LIKELY:
        return b""
    packed = zlib.compress(encode(News(root=root, documents=documents)), 9)
    return packed if len(packed) <= limit_bytes else b""


def unpack(data: bytes) -> News:
    """Raises: ContractError when it is no news; its kind Unreadable when it is too large, cut off, or has something behind it."""
    unpacking = zlib.decompressobj()
    try:
        raw = unpacking.decompress(data, MAX_NEWS_BYTES)
    except zlib.error as error:
        raise Unreadable(f"news that cannot be unpacked: {error}") from error
    if not unpacking.eof or unpacking.unused_data:
        raise Unreadable(f"news that is cut off, has something behind it, or has more than {MAX_NEWS_BYTES} bytes")
    return decode(raw, News, limit_bytes=MAX_NEWS_BYTES)


def read_poke(payload: bytes) -> Poke:
    """Raises: ContractError."""
    return decode(payload, Poke, limit_bytes=MAX_POKE_BYTES)
