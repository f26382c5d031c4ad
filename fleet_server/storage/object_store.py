"""Files of releases in an object store (S3, Google Cloud Storage, Azure), through `obstore`.

What is put is hashed by whoever puts it, and again by every device that fetches it; the store is trusted with nothing but keeping.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fleet_server.config import BlobSettings, Folder
from fleet_server.errors import Unavailable
from fleet_server.storage.shelves import FolderShelf, Opened, Shelf

RETRY_S = 20.0
"""For how long a store that fails is asked again before the caller is told."""
ANSWER_WITHIN_S = 30.0
PART_BYTES = 8 * 1024 * 1024
ADVICE = "the library for object stores is not installed: pip install 'edge-inference-agent[object-store]'"


def shelf_of(folder: Folder, settings: BlobSettings) -> Shelf:
    """Where fleet.yaml says that files are kept.  Raises: Unavailable when it names no store."""
    return FolderShelf(folder.blobs) if settings.store is None else ObjectShelf(settings)


class ObjectShelf:
    """Files below a prefix of a bucket. Who may use it is told by the environment, as the provider's own tools are told."""

    def __init__(self, settings: BlobSettings) -> None:
        """Raises: Unavailable when the settings name no store."""
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError as error:
            raise Unavailable(ADVICE) from error
        self._obstore: Any = obstore
        self._error, self._settings, self._where = BaseError, settings, str(settings.store)
        backoff = {"init_backoff": dt.timedelta(seconds=0.2), "max_backoff": dt.timedelta(seconds=3), "base": 2.0}
        options: dict[str, Any] = {
            "config": dict(settings.options),
            "client_options": {"timeout": dt.timedelta(seconds=ANSWER_WITHIN_S), "allow_http": settings.allow_http},
            "retry_config": {"max_retries": 10, "retry_timeout": dt.timedelta(seconds=RETRY_S), "backoff": backoff},
        }
        try:
            self._store = from_url(self._where, **options)
        except (BaseError, ValueError) as error:
            raise Unavailable(f"blobs.store {self._where!r} in fleet.yaml cannot be used: {_words(error)}") from error

    def size(self, sha256: str) -> int | None:
        try:
            return int(self._obstore.head(self._store, sha256)["size"])
        except FileNotFoundError:
            return None
        except self._error as error:
            raise self._told(error) from error

    def open(self, sha256: str) -> Opened | None:
        size = self.size(sha256)
        return None if size is None else _OpenedObject(self, sha256, size)

    def local(self, sha256: str) -> Path | None:
        del sha256
        return None

    def link(self, sha256: str) -> str | None:
        if self._settings.hand_out == "public":
            return f"{str(self._settings.public_url).rstrip('/')}/{sha256}"
        if self._settings.hand_out == "signed":
            try:
                return str(self._obstore.sign(self._store, "GET", sha256, dt.timedelta(seconds=self._settings.signed_s)))
            except self._error as error:
                raise self._told(error) from error
        return None

    def put(self, sha256: str, path: Path) -> None:
        try:
            self._obstore.put(self._store, sha256, path, chunk_size=PART_BYTES, max_concurrency=4)
        except self._error as error:
            raise self._told(error) from error
        if self.size(sha256) != path.stat().st_size:
            raise Unavailable(f"the object store {self._where} did not keep all of {sha256}")
        path.unlink()

    def remove(self, sha256: str) -> None:
        try:
            self._obstore.delete(self._store, sha256)
        except FileNotFoundError:
            return
        except self._error as error:
            raise self._told(error) from error

    def all(self) -> Iterable[tuple[str, float]]:
        try:
            for page in self._obstore.list(self._store):
                for one in page:
                    yield one["path"], one["last_modified"].timestamp()
        except self._error as error:
            raise self._told(error) from error

    def range(self, sha256: str, offset: int, count: int) -> bytes:
        try:
            return bytes(self._obstore.get_range(self._store, sha256, start=offset, length=count))
        except FileNotFoundError as error:
            raise Unavailable(f"{sha256} is gone from the object store {self._where}") from error
        except self._error as error:
            raise self._told(error) from error

    def _told(self, error: Exception) -> Unavailable:
        return Unavailable(f"the object store {self._where} does not answer as it should: {_words(error)}", code="object_store")


class _OpenedObject:
    def __init__(self, shelf: ObjectShelf, sha256: str, size: int) -> None:
        self._shelf, self._sha256, self.size = shelf, sha256, size

    def read(self, offset: int, count: int) -> bytes:
        count = min(count, self.size - offset)
        return self._shelf.range(self._sha256, offset, count) if count > 0 else b""

    def close(self) -> None:
        pass


def _words(error: Exception) -> str:
    """The first line of what obstore says, which goes on with a debugging aid."""
    return str(error).strip().partition("\n")[0][:300]
