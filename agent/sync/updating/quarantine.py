"""The releases that this device refuses, remembered for good: an entry per model, version and manifest.

A release whose manifest changed is another release and gets its own chance. Causes outside the release never come here.
"""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec

from agent.common import files
from agent.contract import names
from agent.contract.codec import FORMAT, ContractError, Document, decode, encode, require_format
from agent.contract.reports import Answer

ENTRIES_KEPT = 100
"""Entries kept per model, the newest last. Versions only grow, so what falls out is long gone from any assignment."""

_MAX_BYTES = 1024 * 1024


class Entry(Document, frozen=True, kw_only=True):
    """A refused release. `manifest` is the sha256 of its manifest."""

    manifest: str
    answer: Answer


class _Memory(Document, frozen=True, kw_only=True):
    entries: tuple[Entry, ...] = ()
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "quarantine")


class Quarantine:
    """One file per model in `folder`. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()

    def add(self, model: str, manifest: str, answer: Answer) -> None:
        """Remembers, durably, before the update goes on. What was refused before keeps the number of its last attempt.  Raises: OSError."""
        with self._lock:
            if (known := self.find(model, answer.release, manifest)) is not None and known.attempt > answer.attempt:
                answer = msgspec.structs.replace(answer, attempt=known.attempt)
            kept = [e for e in self.entries(model) if (e.answer.release, e.manifest) != (answer.release, manifest)]
            kept.append(Entry(manifest=manifest, answer=answer))
            self._write(model, tuple(kept[-ENTRIES_KEPT:]))

    def find(self, model: str, version: int, manifest: str) -> Answer | None:
        """Why this very release is refused; None when it is not."""
        for entry in self.entries(model):
            if entry.answer.release == version and entry.manifest == manifest:
                return entry.answer
        return None

    def names_version(self, model: str, version: int) -> bool:
        """Whether a manifest of this version is refused. Enough to leave it alone until something about it changes."""
        return any(entry.answer.release == version for entry in self.entries(model))

    def forget(self, model: str, version: int) -> bool:
        """An operator's word: try it again. False when there was nothing to forget.  Raises: OSError."""
        with self._lock:
            entries = self.entries(model)
            kept = tuple(entry for entry in entries if entry.answer.release != version)
            if len(kept) == len(entries):
                return False
            self._write(model, kept)
            return True

    def lift(self, model: str, version: int, attempt: int) -> bool:
        """The fleet's word: try it again, where it was refused in an attempt with a lower number. False when it was not.  Raises: OSError."""
        with self._lock:
            entries = self.entries(model)
            kept = tuple(e for e in entries if e.answer.release != version or e.answer.attempt >= attempt)
            if len(kept) == len(entries):
                return False
            self._write(model, kept)
            return True

    def models(self) -> list[str]:
        """The models of which something was ever refused here."""
        return sorted(path.stem for path in self._folder.glob("*.json") if names.MODEL_NAME.fullmatch(path.stem))

    def entries(self, model: str) -> tuple[Entry, ...]:
        """Oldest first. A damaged file counts as empty: a bad release then costs one more trial, and serving is not touched."""
        try:
            return decode(self._path(model).read_bytes(), _Memory, limit_bytes=_MAX_BYTES).entries
        except (FileNotFoundError, ContractError):
            return ()

    def _write(self, model: str, entries: tuple[Entry, ...]) -> None:
        files.make_directory(self._folder, mode=0o700)
        files.write(self._path(model), encode(_Memory(entries=entries)))

    def _path(self, model: str) -> Path:
        return self._folder / f"{names.check_model(model)}.json"
