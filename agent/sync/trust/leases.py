"""How old the fleet's last signed word is, for releases that may not serve without a recent one.

Rules:
 1. a word counts once, from when it was first verified here: the same word again renews nothing;
 2. its age is the larger of what the (signed) clock says and how long this device ran since: a clock that is set back, or a
    board without one that is switched off and on, makes nothing younger;
 3. a newer word ends it, whatever the clock says;
 4. running time that cannot be written down (a full disk) counts all the same. But a power cut takes it away, so half a lease
    of it ends the lease until it is written; and two minutes of it, in a process that could not write any. Else a board without
    a clock could be switched off and on for ever, each time for a whole lease. Asked only for releases that have a lease; a
    device without such releases writes nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from agent.common import files
from agent.contract.codec import ContractError, Document, decode, encode
from agent.sync.ports import Clock
from agent.sync.trust.desired import Desired

log = logging.getLogger(__name__)

SAVE_EVERY_S = 60.0
"""What a power cut may take from the running time. Each save is a write to flash."""

UNSAVED_SHARE = 0.5
UNSAVED_FROM_THE_START_S = 2 * SAVE_EVERY_S
"""How much running time may be unsaved while the disk refuses it, since a power cut would take it away. UNSAVED_SHARE of a
lease, where this process could write before: a quarter of a lease may pass between two words of a fleet that is heard
(LOOKS_PER_LEASE). UNSAVED_FROM_THE_START_S altogether, where it never could."""

AGAIN_S = 2.0
"""How soon a save that was refused is tried again. A download asks twenty times a second."""


class _Ran(Document, frozen=True, kw_only=True):
    """For how long this device ran since the word that was signed at `issued`."""

    issued: float = -1.0
    ran_s: float = 0.0


class Leases:
    """The age of the fleet's word. Thread-safe."""

    def __init__(self, path: Path, clock: Clock, desired: Callable[[], Desired | None]) -> None:
        self._path = path
        self._clock = clock
        self._desired = desired
        self._lock = threading.Lock()
        self._saved = _read(path)
        self._issued, self._ran_s = self._saved.issued, self._saved.ran_s
        self._counted_at = clock.monotonic()
        self._tried = float("-inf")
        self._could_save = False
        self._trouble: str | None = None

    def over(self, lease_s: float) -> str | None:
        """Why a release with this lease may not serve now; None when it may."""
        with self._lock:
            if self._age_s() > lease_s:
                return f"the fleet's last signed word is older than its lease of {lease_s:g} s"
            may_be_lost_s = UNSAVED_SHARE * lease_s if self._could_save else 0.0
            if self._unsaved_s <= max(UNSAVED_FROM_THE_START_S, may_be_lost_s):
                return None
            return f"its lease of {lease_s:g} s cannot be counted: {self._trouble}"

    def age_s(self) -> float:
        """Seconds since a newer word of the fleet was verified; infinite before the first."""
        with self._lock:
            return self._age_s()

    def _age_s(self) -> float:
        desired, now = self._desired(), self._clock.monotonic()
        if desired is None:
            return float("inf")
        if desired.issued == self._issued:
            self._ran_s += now - self._counted_at
        else:
            self._issued, self._ran_s = desired.issued, 0.0
        self._counted_at = now
        if (self._issued != self._saved.issued or self._unsaved_s >= SAVE_EVERY_S) and now >= self._tried + AGAIN_S:
            self._save(now)
        return max(self._clock.wall() - desired.heard_at, self._ran_s)

    @property
    def _unsaved_s(self) -> float:
        return self._ran_s - (self._saved.ran_s if self._issued == self._saved.issued else 0.0)

    def _save(self, now: float) -> None:
        """Saves how long this device ran. What the disk refuses is tried again after AGAIN_S."""
        ran = _Ran(issued=self._issued, ran_s=self._ran_s)
        try:
            files.write(self._path, encode(ran), mode=0o600)
        except OSError as error:
            if self._trouble is None:
                log.warning("how long this device ran cannot be written down: %s", error)
            self._trouble, self._tried = str(error), now
        else:
            self._saved, self._could_save, self._trouble = ran, True, None


def _read(path: Path) -> _Ran:
    try:
        return decode(path.read_bytes(), _Ran, limit_bytes=1024)
    except (FileNotFoundError, ContractError):
        return _Ran()
