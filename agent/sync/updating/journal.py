"""What each gate of an update said, with its numbers, per model: what `edge-agent why` tells. Small, bounded, and durable.

It explains and decides nothing: a journal that is damaged or cannot be written never stands in the way of an update.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal

import msgspec

from agent.common import files
from agent.contract import names
from agent.contract.codec import FORMAT, ContractError, Document, decode, encode, require_format
from agent.sync.updating import renamed

ENTRIES_KEPT = 60
"""Entries kept per model. An update that goes well writes six of them."""

MESSAGE_KEPT = 500
_MAX_BYTES = 512 * 1024

Gate = Literal[
    "assignment",
    "fetch",
    "trial",
    "shadow",
    "canary",
    "window",
    "approval",
    "team",
    "activation",
    "watch",
    "report",
    "lease",
]
Verdict = Literal[
    "wanted", "passed", "refused", "put off", "waits", "rolled back", "committed", "overtaken", "stopped", "resumed", "retried"
]


class Entry(Document, frozen=True, kw_only=True):
    """A gate's verdict on a release. `times`: how often it said the same in a row; `at` is the last time."""

    at: float
    release: int | None
    gate: Gate
    verdict: Verdict
    message: str = ""
    reason: str | None = None
    rollout: str | None = None
    evidence: dict[str, float | str] = {}
    times: int = 1

    def again(self, other: Entry) -> bool:
        """Whether `other` says the same."""
        mine, others = (
            (self.release, self.gate, self.verdict, self.reason),
            (other.release, other.gate, other.verdict, other.reason),
        )
        return mine == others


class _Book(Document, frozen=True, kw_only=True):
    entries: tuple[Entry, ...] = ()
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "journal")


class Journal:
    """One file per model in `folder`. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()

    def add(self, model: str, entry: Entry) -> None:
        """Raises: OSError."""
        entry = msgspec.structs.replace(entry, message=entry.message[:MESSAGE_KEPT])
        with self._lock:
            kept = list(self.entries(model))
            if kept and kept[-1].again(entry):
                entry = msgspec.structs.replace(entry, times=kept.pop().times + 1)
            files.make_directory(self._folder, mode=0o700)
            files.write(self._path(model), encode(_Book(entries=tuple([*kept, entry][-ENTRIES_KEPT:]))))

    def entries(self, model: str) -> tuple[Entry, ...]:
        """Oldest first; none when there is no journal or it cannot be read."""
        try:
            return decode(renamed.with_new_words(self._path(model).read_bytes()), _Book, limit_bytes=_MAX_BYTES).entries
        except (OSError, ContractError):
            return ()

    def _path(self, model: str) -> Path:
        return self._folder / f"{names.check_model(model)}.json"
