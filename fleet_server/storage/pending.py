"""What accounts uploaded and no release names yet: parts of files, and whole ones. Bounded for each account, and not for ever."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from agent.common import files
from fleet_server.errors import TooLarge
from fleet_server.storage.shelves import Shelf

MARK = ".by"  # beside an upload stands a file with this ending, with the account in it
MAX_FILES = 1000


class Pending:
    """Notes beside uploads whose they are. `uploads`: the folder of parts; whole files are on the shelf."""

    def __init__(self, shelf: Shelf, uploads: Path) -> None:
        self._shelf, self._uploads = shelf, uploads
        self._sizes: dict[str, int] = {}
        """Of whole files, which do not change."""

    def begin(self, sha256: str, account: str) -> None:
        """Notes that the account uploads this, or goes on with it."""
        mark = self._uploads / (sha256 + MARK)
        if mark.exists():
            os.utime(mark)
        else:
            files.write(mark, account.encode())

    def seen(self, sha256: str) -> None:
        """Somebody relies on its being here: its time begins anew."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._uploads / (sha256 + MARK))

    def forget(self, sha256s: Collection[str]) -> None:
        """A release names them now, or they are gone."""
        for sha256 in sha256s:
            self._sizes.pop(sha256, None)
            (self._uploads / (sha256 + MARK)).unlink(missing_ok=True)

    def room(self, account: str, sha256: str, limit: int) -> int:
        """How many bytes of this file the account may have here.  Raises: TooLarge when it has too many others."""
        others = [one for one, whose in self._marks() if whose == account and one != sha256]
        held = sum(self._size(one) for one in others)
        if len(others) >= MAX_FILES or held >= limit:
            raise TooLarge(
                f"{len(others)} files with {held} bytes were uploaded with this access token and belong to no release yet; publish them, or wait "
                "until they are removed (keep.uploads_s in fleet.yaml)",
                code="too_many_uploads",
            )
        return limit - held

    def held(self) -> tuple[int, int]:
        """How many files wait for a release, and their bytes."""
        sizes = [self._size(one) for one, _ in self._marks()]
        return len(sizes), sum(sizes)

    def marked(self) -> set[str]:
        """The files that wait for a release here."""
        return {sha256 for sha256, _ in self._marks()}

    def parts_older_than(self, moment: float) -> list[str]:
        """The parts of files of which nothing came since then."""
        found = []
        for path in self._uploads.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < moment:
                    found.append(path.name.removesuffix(MARK))
        return sorted(set(found))

    def older_than(self, moment: float) -> list[str]:
        """The uploads, whole or not, of which nothing came or was asked since then."""
        found = dict(self._shelf.all())
        for path in self._uploads.iterdir():
            with contextlib.suppress(FileNotFoundError):
                sha256 = path.name.removesuffix(MARK)
                found[sha256] = max(found.get(sha256, 0.0), path.stat().st_mtime)
        return sorted(sha256 for sha256, at in found.items() if at < moment)

    def _marks(self) -> Iterator[tuple[str, str]]:
        for mark in self._uploads.glob(f"*{MARK}"):
            with contextlib.suppress(FileNotFoundError):
                yield mark.name.removesuffix(MARK), mark.read_text()

    def _size(self, sha256: str) -> int:
        with contextlib.suppress(FileNotFoundError):
            return (self._uploads / sha256).stat().st_size
        if sha256 not in self._sizes and (size := self._shelf.size(sha256)) is not None:
            self._sizes[sha256] = size
        return self._sizes.get(sha256, 0)
