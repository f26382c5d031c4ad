"""What devices would do when what the fleet runs is changed, before it is: going on to a wave, going back, withdrawing."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy.orm import Session

from agent.contract.assignment import Mode, ModelAssignment, Wanted, wanted
from agent.contract.manifest import Variant
from agent.contract.names import ReleaseRef
from fleet_server.releases import catalogue
from fleet_server.rollouts import facts, preview
from fleet_server.rollouts.facts import Hearing
from fleet_server.rollouts.preview import CAUSES_NAMED, DRAW, Fetches, Fits
from fleet_server.rollouts.tally import quarantined

Told = Mapping[str, ModelAssignment]
"""What devices are told: model → what the assignment says of it."""


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """Devices that would be told to run another release of a model than now. `release`: which one, None for none; in mode shadow they only try
    it. `devices`: how many are told so, of which `changing` then run something else; `online` of those are there now. Of the others
    `serving` run it already, `held` are kept by an operator on what they run, `refusing` quarantined it and do not try it again, `unfit`
    have no variant of it (`unfit_classes`: how many of which hardware class), and `unknown` never said what they are. `fetch_bytes`: what
    those that change fetch together at most, less the blocks of what they run and of what they ran before.
    """

    model: str
    release: int | None
    mode: Mode
    devices: int = 0
    changing: int = 0
    online: int = 0
    serving: int = 0
    held: int = 0
    refusing: int = 0
    unfit: int = 0
    unknown: int = 0
    fetch_bytes: int = 0
    unfit_classes: dict[str, int] = {}


class ChangePreview(msgspec.Struct, frozen=True, kw_only=True):
    """What a change would do. `says`: what would be told of it; `moves`: what becomes of the devices that are told something else, none where
    nobody is; `worries`: what a person should know first.
    """

    says: str
    moves: tuple[Move, ...]
    worries: tuple[str, ...]


def of(session: Session, says: str, before: Told, after: Told, hearing: Hearing, now: float) -> ChangePreview:
    """Of devices that are told `after` where they were told `before`."""
    moves, worries = list[Move](), list[str]()
    for model in sorted({*before, *after}):
        old, new = before.get(model, ModelAssignment()), after.get(model, ModelAssignment())
        for target in _targets(session, model, old, new, hearing, now) if old != new else ():
            moves.append(target.move())
            worries += target.worries()
    return ChangePreview(says=says, moves=tuple(moves), worries=tuple(worries))


class _Target:
    """Where devices go: a release of a model, or none."""

    def __init__(self, session: Session, model: str, to: Wanted) -> None:
        self._model, self.to = model, to
        self._counts, self._classes, self._why = (collections.Counter[str]() for _ in range(3))
        if to.release is not None:
            manifest = catalogue.manifest_of(catalogue.find(session, ReleaseRef(model, to.release)))
            self._fits, self._fetches = Fits(manifest), Fetches(session, model, manifest)

    def add(self, row: Any, to: Wanted, never: set[int], *, online: bool) -> None:
        """A device, by its row of `preview.rows`, that is told so. `never`: the withdrawn releases, which nobody is held on."""
        said = row if row.phase is not None else None
        serving = said.serving if said is not None else None
        self._counts["devices"] += 1
        if serving == to.release:
            self._counts["serving"] += 1
        elif said is not None and said.held and serving not in never:
            self._counts["held"] += 1
        elif to.release is None:
            self._change(online)
        elif self._refuses(row, said, to):
            self._counts["refusing"] += 1
        elif row.hardware is None:
            self._counts["unknown"] += 1
        else:
            self._fetch(row, serving, online)

    def _refuses(self, row: Any, said: Any, to: Wanted) -> bool:
        assert to.release is not None
        own = [one["attempt"] for one in row.retries or () if (one["model"], one["release"]) == (self._model, to.release)]
        attempt = max([to.attempt, *own])
        return quarantined(facts.fact_of(row.id, True, said, to.release, {}, to.rollout or DRAW, attempt))

    def _fetch(self, row: Any, serving: int | None, online: bool) -> None:
        variant: Variant | None
        variant, reason = self._fits.of(row.hardware)
        if variant is None:
            self._counts["unfit"] += 1
            self._classes[row.hardware_class or "-"] += 1
            self._why[reason] += 1
        else:
            self._change(online)
            self._counts["fetch_bytes"] += self._fetches.bytes_of(variant, serving, row.previous)

    def _change(self, online: bool) -> None:
        self._counts["changing"] += 1
        self._counts["online"] += online

    def move(self) -> Move:
        classes = dict(self._classes.most_common())
        return Move(model=self._model, release=self.to.release, mode=self.to.mode, unfit_classes=classes, **self._counts)

    def worries(self) -> Iterator[str]:
        named, counts = f"{self._model}:{self.to.release}", self._counts
        if self.to.release is None and counts["changing"]:
            yield f"devices that would run no release of {self._model} any more: {counts['changing']}"
        for reason, number in self._why.most_common(CAUSES_NAMED):
            yield f"devices that no variant of {named} fits: {number} ({reason})"
        if counts["refusing"]:
            yield f"devices that quarantined {named} before and refuse it again: {counts['refusing']}"
        if counts["held"]:
            yield f"devices of {self._model} that are held on what they run: {counts['held']}"


def _targets(
    session: Session, model: str, old: ModelAssignment, new: ModelAssignment, hearing: Hearing, now: float
) -> Sequence[_Target]:
    """Where devices of the model go, the most of them first."""
    found: dict[tuple[int | None, Mode], _Target] = {}
    never, withdrawn = set(new.withdrawn), {*new.withdrawn} - {*old.withdrawn}
    for row in session.execute(preview.rows(model)):
        who = (row.id, row.groups, row.hardware_class or "", row.labels or {})
        was, to = wanted(old, *who), wanted(new, *who)
        if (was.release, was.mode) == (to.release, to.mode) and (row.phase is None or row.serving not in withdrawn):
            continue
        target = found.get((to.release, to.mode))
        if target is None:
            target = found[to.release, to.mode] = _Target(session, model, to)
        target.add(row, to, never, online=preview.is_online(row, hearing, now))
    return sorted(found.values(), key=lambda target: -target.move().devices)
