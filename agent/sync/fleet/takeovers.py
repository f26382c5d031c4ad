"""How often somebody else with this device's identity took its place at the broker. Kept on disk, for `doctor` and for the next
start.
"""

from __future__ import annotations

from pathlib import Path

from agent.common import files
from agent.contract.codec import FORMAT, ContractError, Document, decode, encode, require_format

WITHIN_S = 600.0
MANY = 3
"""Two devices with one identity throw each other out every few seconds, and at least every two minutes. A broker that is
restarted ends connections too, but refuses the next attempt or comes back for longer."""

CERTAIN = 2
"""One can be a connection of our own that the broker had not given up yet."""

_KEPT = 20
_MAX_BYTES = 16 * 1024
_NAME = "takeovers.json"


class _Record(Document, frozen=True, kw_only=True):
    at: tuple[float, ...] = ()
    certain: tuple[float, ...] = ()
    """Those of which the broker itself said so."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "record of take-overs")


def note(folder: Path, now: float, *, certain: bool) -> None:
    """Notes one more take-over.  Raises: OSError."""
    known = _read(folder)
    told = (*known.certain, now)[-_KEPT:] if certain else known.certain
    files.write(folder / _NAME, encode(_Record(at=(*known.at, now)[-_KEPT:], certain=told)), mode=0o600)


def finding(folder: Path, now: float) -> str | None:
    """What an operator should know of take-overs; None while there were few. A damaged record counts as empty.  Raises:
    OSError.
    """
    known = _read(folder)
    lately, certain = (len([at for at in times if 0 <= now - at < WITHIN_S]) for times in (known.at, known.certain))
    if lately < MANY and certain < CERTAIN:
        return None
    return (
        f"another device has this one's identity: it took this one's place at the broker {lately} times within {WITHIN_S / 60:.0f} "
        "minutes. A card or a state folder was copied after it had been enrolled; enrol the copy as a device of its own "
        "(edge-agent enrol --force STRING)"
    )


def _read(folder: Path) -> _Record:
    try:
        return decode((folder / _NAME).read_bytes(), _Record, limit_bytes=_MAX_BYTES)
    except (FileNotFoundError, ContractError):
        return _Record()
