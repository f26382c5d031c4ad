"""Removes what nobody needs any more, at the start and every few minutes, a little at a time."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable

from fleet_server.config import KeepSettings
from fleet_server.devices.told import Told
from fleet_server.journal import Journal
from fleet_server.releases.catalogue import Catalogue
from fleet_server.rollouts.retention import Retention
from fleet_server.storage.blobs import Blobs

_log = logging.getLogger(__name__)

EVERY_S = 300.0
ROWS = 1000  # in one transaction, so that nobody waits for it longer than for a report
BATCHES = 100  # in one turn


class Housekeeping:
    """`removed`: how many uploads, releases' files, events, entries of the audit and figures of devices were removed since the start."""

    def __init__(
        self, blobs: Blobs, catalogue: Catalogue, retention: Retention, journal: Journal, keep: KeepSettings,
        clock: Callable[[], float], told: Told | None = None,
    ) -> None:  # fmt: skip
        self._blobs, self._catalogue, self._retention = blobs, catalogue, retention
        self._journal, self._keep, self._clock, self._told = journal, keep, clock, told
        self.removed: Counter[str] = Counter()

    def run(self) -> None:
        """One turn. Whatever fails is tried again at the next."""
        now = self._clock()
        old = self._blobs.pending.older_than(now - self._keep.uploads_s)
        if old:
            gone = self._catalogue.remove_unused(old)
            self.removed["uploads"] += len(gone)
            if gone:
                _log.info("removed %d uploads that no release names", len(gone))
        self.removed["releases"] += self._retention.apply()
        self._rows("events", lambda: self._journal.prune_events(ROWS))
        self._rows("audit", lambda: self._journal.prune_audit(now - self._keep.audit_s, ROWS))
        if self._told is not None:
            self._rows("figures", functools.partial(self._told.prune, ROWS))
        self._journal.forget_requests(now)

    def _rows(self, what: str, prune: Callable[[], int]) -> None:
        for _ in range(BATCHES):
            removed = prune()
            self.removed[what] += removed
            if removed < ROWS:
                return
