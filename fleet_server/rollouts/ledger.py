"""How the devices stand to one rollout, kept up with the database by what changed there.

Rules:
 1. The database is the only source. Whoever writes a device numbers the change (`storage.changes`); the ledger reads what has a
    number above the last one that it read, so it does not matter which process wrote it.
 2. What only time changes has a moment: a device falls silent, an identity counts as shared no more. Then its row is read again.
 3. Who counts as silent is read again when it turns out that nobody could have been heard.
 4. That a device was told (it was there while its wave reached it) is seen here first, and written down by whoever decides.
 5. When the wave tells more of its devices, only those are read.
 6. Of a deleted device it stays written down that it was told, unless its id is enrolled again.
 7. What fits no rule (the first time, a clock or a counter that went back) makes the ledger anew from every row. So does its
    owner, by making another one, when what the rollout is about has changed: its wave, the classes excluded from it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from sqlalchemy import insert
from sqlalchemy.orm import Session

from fleet_server.rollouts import facts
from fleet_server.rollouts.facts import About, Hearing
from fleet_server.rollouts.tally import Entry, Tally
from fleet_server.storage import changes
from fleet_server.storage.models import Device, RolloutRow, ToldDevice


class Ledger:
    """One thread at a time."""

    def __init__(self, about: About, hearing: Hearing) -> None:
        self.about = about
        self.tally = Tally(shadow=about.wave.mode == "shadow")
        self.read = 0
        """How many rows of devices were read: what the work is measured by."""
        self._hearing = hearing
        self._number: int | None = None
        self._now = self._heard = -math.inf
        self._due: list[tuple[float, str]] = []
        self._until: dict[str, float] = {}
        """Device → its moment; what stands in `_due` of another moment is old."""
        self._silent: set[str] = set()
        self.told: dict[str, float] = {}
        """Devices that were told → when, of those that this was seen of here."""
        self._unwritten: set[str] = set()

    def follow(self, session: Session, now: float) -> None:
        """Brings the tally to what the database says now. When that fails, the next time begins anew."""
        heard, number, before = self._hearing.heard_since(), changes.last(session), self._number
        self._number = None
        if before is None or number < before or now < self._now or heard < self._heard:
            self._begin(session, now)
        else:
            if number > before:
                self._follow_changes(session, before, number, now)
            again = self._come_due(now)
            if heard > self._heard:
                again |= self._silent
            self._read_again(session, again, now)
        self._number, self._now, self._heard = number, now, heard

    def widen(self, session: Session, about: About, now: float) -> None:
        """The wave tells more of its devices from now on; nothing else about the rollout is different."""
        number, self._number = self._number, None  # when this fails, the next time begins anew
        more, self.about = self.tally.below(about.reach), about
        self._read_again(session, more, now)
        self._number = number

    def _begin(self, session: Session, now: float) -> None:
        self.tally = Tally(shadow=self.about.wave.mode == "shadow")
        self._due, self._until, self._silent = [], {}, set()
        self._take(session.execute(facts.of_devices(self.about)), now)
        self._note_left(session.scalars(facts.deleted(self.about)))

    def _follow_changes(self, session: Session, after: int, up_to: int, now: float) -> None:
        self._leave(session, changes.deleted(session, after, up_to))  # first: one of them may have been enrolled again
        query = facts.of_devices(self.about).where(Device.change > after, Device.change <= up_to)
        self._take(session.execute(query), now)

    def _come_due(self, now: float) -> set[str]:
        found = set()
        while self._due and self._due[0][0] <= now:
            moment, device = heapq.heappop(self._due)
            if self._until.get(device) == moment:
                found.add(device)
        return found

    def _read_again(self, session: Session, devices: set[str], now: float) -> None:
        if not devices:
            return
        found = self._take(facts.of_some(session, self.about, devices), now)
        self._leave(session, sorted(devices - found))  # deleted by changes that are still to be followed

    def _leave(self, session: Session, devices: Sequence[str]) -> None:
        """These were deleted."""
        for device in devices:
            self._forget(device)
        for start in range(0, len(devices), facts.ROWS_AT_ONCE):
            some = devices[start : start + facts.ROWS_AT_ONCE]
            self._note_left(session.scalars(facts.deleted(self.about).where(ToldDevice.device.in_(some))))

    def _note_left(self, devices: Iterable[str]) -> None:
        for device in () if self.about.over else devices:
            self.tally.put(device, Entry(facts.left(device, facts.DELETED), None, serves=False))

    def _take(self, rows: Iterable[Any], now: float) -> set[str]:
        taken = set()
        for row in rows:
            seen = facts.seen(self.about, row, self._hearing, now, self.told.get(row.id))
            taken.add(seen.device)
            if seen.told_now:
                self.told[seen.device] = now
                self._unwritten.add(seen.device)
            self.tally.put(seen.device, seen.entry)
            self._until.pop(seen.device, None)
            if seen.until < math.inf:
                self._until[seen.device] = seen.until
                heapq.heappush(self._due, (seen.until, seen.device))
            (self._silent.add if seen.silent else self._silent.discard)(seen.device)
        self.read += len(taken)
        return taken

    def write_told(self, session: Session) -> None:
        """Writes down which devices were told since the last time. Whoever calls this drops the ledger when its transaction fails."""
        found = [{"rollout": self.about.wave.id, "device": device, "at": self.told[device]} for device in self._unwritten]
        if found:
            session.execute(insert(ToldDevice), found)
        self._unwritten = set()

    def _forget(self, device: str) -> None:
        self.tally.drop(device)
        self._until.pop(device, None)
        self._silent.discard(device)
        self.told.pop(device, None)
        self._unwritten.discard(device)


class Ledgers:
    """The ledgers of the rollouts that are judged. One thread at a time: whoever has the lock of the decisions."""

    def __init__(self, hearing: Hearing, clock: Callable[[], float]) -> None:
        self._hearing, self._clock = hearing, clock
        self._known: dict[str, Ledger] = {}

    def tally(self, session: Session, row: RolloutRow, *, over: bool = False) -> Tally:
        """How the devices stand to the rollout as the database says now. `over`: it has ended, and only who quarantines its
        release counts.
        """
        about, now = facts.about(session, row, over=over), self._clock()
        known = self._known.get(row.id)
        if known is not None and known.about != about and facts.is_wider(about, known.about):
            known.widen(session, about, now)
        elif known is None or known.about != about:
            self._known[row.id] = known = Ledger(about, self._hearing)
        known.follow(session, now)
        return known.tally

    def are_current(self, about: About) -> bool:
        """Whether there is a ledger that goes by this already, so that no device must be read which has not changed."""
        known = self._known.get(about.wave.id)
        return known is not None and known.about == about

    def write_told(self, session: Session, rollouts: Iterable[str]) -> None:
        """Writes down which devices of these rollouts were told."""
        for rollout_id in rollouts:
            self._known[rollout_id].write_told(session)

    def forget_all(self) -> None:
        """From the next time on they are made anew from what the database says."""
        self._known = {}

    def of(self, rollout_id: str) -> Ledger | None:
        """The ledger of a rollout, as it was brought up to date last."""
        return self._known.get(rollout_id)

    def keep(self, rollouts: Collection[str]) -> None:
        """Drops the ledgers of all other rollouts."""
        self._known = {name: ledger for name, ledger in self._known.items() if name in rollouts}
