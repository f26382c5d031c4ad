"""The documents that every device asks for again and again: metadata, targets, its record. Answered without a framework, which
costs several times what the answer does.

Files with their version or hash in the name never change: proxies and devices may keep them for ever. timestamp.json and the
record change, so whoever keeps them asks whether they did (If-None-Match, 304). What is large, refused or missing is left to the
application behind.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Hashable
from typing import Protocol

import msgspec
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from agent.contract.enrolment import BLOBS_PATH, METADATA_PATH, RECORD_PATH, TARGETS_PATH
from fleet_server.api import admission, http
from fleet_server.devices.inventory import Inventory
from fleet_server.errors import FleetError, NotFound
from fleet_server.releases.repository import Repository

IMMUTABLE = "public, max-age=31536000, immutable"
ASK_AGAIN = "no-cache"
ASK_AGAIN_ALONE = "private, no-cache"
"""Of what is for one device: no proxy may give it to another."""

WHOLE_BYTES = 256 * 1024
"""Larger files are sent in pieces."""

KEPT = 64
"""Small files in memory: the current version of each role, the assignment, a few manifests."""

_FRAME = tuple(http.HEADERS.items())


class Document(msgspec.Struct, frozen=True):
    """Bytes with what a cache must know of them."""

    data: bytes
    etag: str
    cache: str


class Parts(Protocol):
    """What this application needs of the server."""

    inventory: Inventory
    repository: Repository


class Documents:
    """An ASGI application before another one."""

    def __init__(self, parts: Parts, behind: ASGIApp) -> None:
        self._inventory, self._repository, self._behind = parts.inventory, parts.repository, behind
        self._documents = parts.repository.documents
        self._kept: dict[str, tuple[Hashable, Document]] = {}
        self._lock = threading.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            found = await self._found(scope) if scope["type"] == "http" and scope["method"] in {"GET", "HEAD"} else None
        except NotFound as missing:  # each look asks for the next root, which is hardly ever there
            await self._say(missing)(scope, receive, send)
            return
        if found is None:
            await self._behind(scope, receive, send)
            return
        etag = found.etag.encode()
        headers = [(b"etag", etag), (b"cache-control", found.cache.encode()), *_FRAME]
        unchanged = is_known(scope, found.etag)
        if not unchanged:
            headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(found.data))]
        await send({"type": "http.response.start", "status": 304 if unchanged else 200, "headers": headers})
        body = b"" if unchanged or scope["method"] == "HEAD" else found.data
        await send({"type": "http.response.body", "body": body})

    @staticmethod
    def _say(missing: NotFound) -> Response:
        answer = http.answer(404, str(missing), missing.code)
        answer.raw_headers += _FRAME
        return answer

    async def _found(self, scope: Scope) -> Document | None:
        """None when the application behind has to answer.  Raises: NotFound."""
        path: str = scope["path"]
        if not path.startswith((METADATA_PATH, TARGETS_PATH, BLOBS_PATH)) and path != RECORD_PATH:
            return None
        try:
            device = admission.known(scope["state"], self._inventory)
            if device is None:
                device = await asyncio.to_thread(admission.look_up, scope["state"], self._inventory)
            if path == RECORD_PATH:
                return of(await asyncio.to_thread(self._inventory.record, device), ASK_AGAIN_ALONE)
            name = self._name_of(path)
            if name is None or self._documents.at_hand(name):
                return self._document(path, name)
            return await asyncio.to_thread(self._document, path, name)
        except NotFound:
            raise
        except (FleetError, SQLAlchemyError, OSError):
            return None  # it fails again there, and is told in words

    def _name_of(self, path: str) -> str | None:
        """The name of the document at that path; None when there is none that this answers."""
        if path.startswith(METADATA_PATH):
            return self._repository.metadata.served(path.removeprefix(METADATA_PATH))
        if path.startswith(TARGETS_PATH):
            return self._repository.targets.served(path.removeprefix(TARGETS_PATH))
        return None

    def _document(self, path: str, name: str | None) -> Document | None:
        """None when it is for the application behind.  Raises: NotFound."""
        if name is None and path.startswith(BLOBS_PATH):
            return None
        identity = self._documents.identity(name) if name is not None else None
        if name is None or identity is None:
            raise NotFound(f"there is no {path.removeprefix('/')!r}")
        kept = self._kept.get(name)
        if kept is not None and kept[0] == identity:
            return kept[1]
        size = self._documents.size(name)
        return self._read(name, identity) if size is not None and size <= WHOLE_BYTES else None

    def _read(self, name: str, identity: Hashable) -> Document | None:
        data = self._documents.read(name)
        if data is None:
            return None
        found = of(data, cache_of(name))
        with self._lock:
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[name] = (identity, found)
        return found


def of(data: bytes, cache: str) -> Document:
    return Document(data, f'"{hashlib.sha256(data).hexdigest()[:32]}"', cache)


def cache_of(name: str) -> str:
    """What caches may do with a document of metadata or targets of this name."""
    return ASK_AGAIN if name == "metadata/timestamp.json" else IMMUTABLE


def is_known(scope: Scope, etag: str) -> bool:
    """Whether the client has this already (RFC 9110, 13.1.2)."""
    for name, value in scope["headers"]:
        if name == b"if-none-match":
            tags = [tag.strip().removeprefix("W/") for tag in value.decode("latin-1").split(",")]
            return etag in tags or tags == ["*"]
    return False
