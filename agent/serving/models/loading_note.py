"""Which model is being loaded right now, for whoever finds that the process ended in it, or that it takes too long.

A note on disk says it too, where there is a place for one: the process that starts after this one was killed reads which model
did it. It stays in the note until it was loaded after all, and this process does not load it, whoever asks, unless it was tried
apart and passed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Container, Iterator
from pathlib import Path

import msgspec

from agent.common import files
from agent.serving.models.loading import Source
from runtimes.contract import ModelInvalid

log = logging.getLogger(__name__)

Named = tuple[str, int]
"""A model and its version."""

MAX_NOTE_BYTES = 64 * 1024
_decode = msgspec.json.Decoder(list[Named]).decode


def _plain(path: str, flags: int) -> int:
    """Neither a link nor a pipe in the note's place makes this process stray or wait."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o640)


class LoadingNote:
    """`folder` is where the note lies between two processes; None: nobody is told after this one."""

    def __init__(self, folder: Path | None = None) -> None:
        self._note = folder / "loading.json" if folder is not None else None
        self._left = self._read()
        self._since_s: float | None = None  # monotonic
        self._now: Named = ("", 0)
        self._suspects: dict[Named, str] = {}

    def suspect(self, named: Named, why: str | None) -> None:
        """From now on it is not loaded, and why; None: it may be."""
        if why is None:
            self._suspects.pop(named, None)
        else:
            self._suspects[named] = why

    def check(self, source: Source) -> None:
        """Raises: ModelInvalid when it is not to be loaded in this process."""
        why = self._suspects.get((source.name, source.version))
        if why is not None:
            raise ModelInvalid(f"a process before this one ended while it loaded it: {why}")

    @contextlib.contextmanager
    def during(self, source: Source) -> Iterator[None]:
        """While a model is loaded and warmed up in this process, one at a time."""
        self._now, self._since_s = (source.name, source.version), time.monotonic()
        self._left.discard(self._now)
        self._write([*self._left, self._now])
        try:
            yield
        finally:
            self._since_s = None
            self._write([*self._left])

    def overdue(self, limit_s: float) -> str | None:
        """The model whose loading has taken longer; None while none has."""
        since_s = self._since_s
        if since_s is None or time.monotonic() - since_s <= limit_s:
            return None
        return f"model {self._now[0]!r} version {self._now[1]}"

    def left(self, selected: Container[Named]) -> set[Named]:
        """The models in whose loading a process before this one ended, whatever ended it. Those not selected any more are
        forgotten.
        """
        self._left = {named for named in self._left if named in selected}
        return set(self._left)

    def _read(self) -> set[Named]:
        """Nothing where the note is not what it should be: all are loaded at once then."""
        try:
            return set(_decode(files.read_regular(self._note, MAX_NOTE_BYTES))) if self._note else set()
        except (OSError, msgspec.MsgspecError):
            return set()

    def _write(self, named: list[Named]) -> None:
        """Not made durable: a power cut is no fault of the model."""
        if self._note is None:
            return
        try:
            if named:
                self._note.parent.mkdir(parents=True, exist_ok=True)
                with open(self._note, "wb", opener=_plain) as note:
                    note.write(msgspec.json.encode(sorted(named)))
            else:
                self._note.unlink(missing_ok=True)
        except OSError as error:
            log.warning(
                "%s cannot be written (%s): should a model end this process, the next one will not know which",
                self._note,
                error,
            )
