"""How the devices stand to a release: counted, and kept in order, by what changes. Pure.

A device is put in with its latest fact and taken out again; each costs the same, however many devices there are, but for moving
numbers within a list. So whoever judges asks for counts and for the first few of each standing, and walks no devices.
"""

from __future__ import annotations

import bisect
import collections
from collections.abc import Collection, Mapping, Sequence

import msgspec

from agent.contract.assignment import EVERYONE
from agent.contract.reasons import METADATA, RETRYABLE, Reason
from agent.contract.reports import Outcome
from fleet_server.rollouts.gates import NOT_ASKED, TO_ANSWER, Counts, Fact, Standing, Witness, standing

NAMED = 10
"""Devices of each standing that a verdict names; its counts cover all of them."""

ORDER = (
    Standing.REFUSED,
    Standing.ROLLED_BACK,
    Standing.LOST,
    Standing.TIMED_OUT,
    Standing.FAILED,
    *TO_ANSWER,
    Standing.HELD,
    Standing.SKIPPED,
    Standing.OFFLINE,
    Standing.LEFT,
    Standing.SHADOWED,
    Standing.COMMITTED,
)
"""Bad answers first: they are what a reader of a verdict looks for. Devices that the rollout has not come to stand behind no verdict."""

NOT_QUARANTINED = frozenset({reason.value for reason in RETRYABLE | METADATA | {Reason.OPERATOR, Reason.WITHDRAWN}})
"""For these reasons a device goes back and does not remember the release as bad."""


def quarantined(fact: Fact) -> bool:
    """Whether the device refuses the release from now on."""
    return fact.outcome in (Outcome.REFUSED, Outcome.ROLLED_BACK) and fact.reason not in NOT_QUARANTINED


class Entry(msgspec.Struct, frozen=True):
    """One device. `fact`: None when it is none of those that the rollout has come to; `kind`: its hardware class, None before it said so;
    `serves`: whether it says that it serves the release, with whatever bytes; `ahead`: its slot, when the wave has it and did not tell it
    yet; `there`: whether it is there; `not_reached`: whether the rollout is still to come to it, in this wave or a later one.
    """

    fact: Fact | None
    kind: str | None
    serves: bool
    ahead: int | None = None
    there: bool = False
    not_reached: bool = False


class Tally:
    """`shadow`: the rollout has mode shadow."""

    def __init__(self, *, shadow: bool = False) -> None:
        self._shadow = shadow
        self._entries: dict[str, Entry] = {}
        self._standing: dict[Standing, list[str]] = {one: [] for one in ORDER}
        self._refused: dict[str, list[str]] = {}
        self._serving: collections.Counter[str] = collections.Counter()
        self._asked: collections.Counter[str] = collections.Counter()
        self._ahead: dict[int, set[str]] = {}
        self._there = [0] * EVERYONE
        self._not_reached = 0

    def put(self, device: str, entry: Entry) -> None:
        """The device is like that from now on."""
        if self._entries.get(device) == entry:
            return
        self.drop(device)
        if (
            entry.fact is None
            and entry.ahead is None
            and not entry.not_reached
            and not (entry.serves and entry.kind is not None)
        ):
            return  # nothing to remember
        self._entries[device] = entry
        self._not_reached += entry.not_reached
        if entry.ahead is not None:
            self._ahead.setdefault(entry.ahead, set()).add(device)
            self._there[entry.ahead] += entry.there
        if entry.fact is not None:
            where = standing(entry.fact, shadow=self._shadow)
            bisect.insort(self._standing[where], device)
            if entry.kind is not None and where not in NOT_ASKED:
                self._asked[entry.kind] += 1
            if entry.kind is not None and quarantined(entry.fact):
                bisect.insort(self._refused.setdefault(entry.kind, []), device)
        if entry.serves and entry.kind is not None:
            self._serving[entry.kind] += 1

    def drop(self, device: str) -> None:
        """The device counts no more."""
        entry = self._entries.pop(device, None)
        if entry is None:
            return
        self._not_reached -= entry.not_reached
        if entry.ahead is not None:
            self._ahead[entry.ahead].discard(device)
            self._there[entry.ahead] -= entry.there
        if entry.fact is not None:
            where = standing(entry.fact, shadow=self._shadow)
            _remove(self._standing[where], device)
            if entry.kind is not None and where not in NOT_ASKED:
                self._asked[entry.kind] -= 1
            if entry.kind is not None and quarantined(entry.fact):
                _remove(self._refused[entry.kind], device)
                if not self._refused[entry.kind]:
                    del self._refused[entry.kind]
        if entry.serves and entry.kind is not None:
            self._serving[entry.kind] -= 1
            if not self._serving[entry.kind]:
                del self._serving[entry.kind]

    @property
    def counts(self) -> Counts:
        found = {where.value: len(devices) for where, devices in self._standing.items()}
        return Counts(**found, not_reached=self._not_reached)

    @property
    def witnesses(self) -> list[Witness]:
        """The first few devices of each standing, bad answers first."""
        return [
            Witness(device, where, fact.reason, fact.message)
            for where in ORDER
            for device in self._standing[where][:NAMED]
            if (fact := self._entries[device].fact) is not None
        ]

    @property
    def serving(self) -> Mapping[str, int]:
        """Hardware class → how many devices of it say that they serve the release."""
        return self._serving

    @property
    def asked(self) -> Mapping[str, int]:
        """Hardware class → how many devices of it the wave is judged by."""
        return self._asked

    @property
    def ahead(self) -> Sequence[int]:
        """For each slot, how many devices are there that the wave has and did not tell yet."""
        return self._there

    def without(self, kinds: Collection[str]) -> Counts:
        """How the devices of all other hardware classes stand. Walks all of them."""
        found: collections.Counter[str] = collections.Counter()
        for entry in self._entries.values():
            if entry.fact is not None and entry.kind not in kinds:
                found[standing(entry.fact, shadow=self._shadow).value] += 1
        return Counts(**found)

    def below(self, reach: int) -> set[str]:
        """The devices that the wave has and did not tell yet whose slot is below `reach`, whether they are there or not."""
        return {device for slot, devices in self._ahead.items() if slot < reach for device in devices}

    def refused(self, least: int) -> dict[str, list[Fact]]:
        """Hardware class → the facts of its devices that quarantine the release, for classes with at least so many."""
        return {
            kind: [fact for device in devices if (fact := self._entries[device].fact) is not None]
            for kind, devices in self._refused.items()
            if len(devices) >= least
        }


def _remove(ordered: list[str], device: str) -> None:
    del ordered[bisect.bisect_left(ordered, device)]
