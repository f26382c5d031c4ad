"""Where `serve` notes that it began and that it ended in order, and `sync` reads it. The only file that `serve` writes for
others.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from agent.common import files
from agent.contract.codec import FORMAT, ContractError, Document, decode, encode, require_format
from agent.host.boot import boot_id
from agent.lives import Life

KEPT = 64
"""Lives that are remembered. `sync` reads it twice a second; this many restarts go by unseen only while it is gone for long."""

_MAX_BYTES = 64 * 1024
_NAME = "lives.json"

log = logging.getLogger(__name__)


class _Record(Document, frozen=True, kw_only=True):
    lives: tuple[Life, ...] = ()
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "record of lives")


class Diary:
    """The file in `folder`. What cannot be written is logged and never keeps `serve` from serving: its restarts then count as
    crashes.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _NAME

    def begin(self, instance: str) -> None:
        """Notes that a process of this name serves from now on."""
        self._write((*self.read(), Life(instance=instance, boot=boot_id())))

    def end(self, instance: str) -> None:
        """Notes that the process ends in order. The last thing it does: whatever goes wrong before is a crash."""
        self._write(
            tuple(msgspec.structs.replace(life, ended=True) if life.instance == instance else life for life in self.read())
        )

    def read(self) -> tuple[Life, ...]:
        """Oldest first. Empty when there is no such file or it is not what it should be: `serve` may be anything."""
        try:
            return decode(files.read_regular(self._path, _MAX_BYTES), _Record, limit_bytes=_MAX_BYTES).lives
        except (OSError, ContractError):
            return ()

    def _write(self, lives: tuple[Life, ...]) -> None:
        try:
            files.make_directory(self._path.parent, mode=0o750)
            files.write(self._path, encode(_Record(lives=lives[-KEPT:])), mode=0o640)
        except OSError as error:
            log.warning("a restart of this process will count as a crash: %s cannot be written: %s", self._path, error)
