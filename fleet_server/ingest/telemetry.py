"""Telemetry of devices → the tables: what each said last, figures by time, pasts, and the samples that rollouts under way take.

What it costs follows from what was told, not from how many devices or rollouts there are. Figures of releases that this fleet never
published are left out: a device could make up any number of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import select, tuple_
from sqlalchemy.orm import Session

from agent.contract import codec
from agent.contract.telemetry import Figures, ModelFigures, Telemetry
from fleet_server.devices import shared_identity
from fleet_server.ingest.reported import Changes, Known
from fleet_server.rollouts import pasts, rows
from fleet_server.rollouts.health import HealthRules, HealthTest
from fleet_server.rollouts.pasts import Past
from fleet_server.sections import TelemetrySettings
from fleet_server.storage import changes
from fleet_server.storage.models import ReleaseRow, RolloutRow, ToldDevice
from fleet_server.storage.telemetry_models import DeviceTelemetry, FiguresRow, HealthSampleRow, PastRow

MINUTES_S, HOUR_S, DAY_S = LENGTHS_S = (300, 3600, 86400)
AHEAD_S = 600.0
"""How far a device's clock may be ahead."""

MAX_COUNTER = 2**63 - 1
Of = tuple[str, int]


def fault(device: Known, told: Telemetry, now: float, max_age_s: float) -> tuple[str, str] | None:
    """Why the telemetry does not count, as a stable word and in words; None when it does."""
    if not device.told < told.counter <= MAX_COUNTER:
        return "replayed", f"telemetry {told.counter} of {device.id!r} is not newer than {device.told}"
    if told.at > now + AHEAD_S:
        return "bad_clock", f"telemetry of {device.id!r} is from {told.at - now:.0f} s ahead: its clock is wrong"
    if told.at < now - max_age_s:
        return "stale", f"telemetry of {device.id!r} is {now - told.at:.0f} s old; at most {max_age_s:.0f} s are taken"
    if shared_identity.are_several(device.shared, now):
        return "identity_shared", f"several machines report as {device.id!r}: what they do says nothing of one device"
    return None


def counters(session: Session, devices: Iterable[str]) -> dict[str, int]:
    """Of the last telemetry of these devices."""
    query = select(DeviceTelemetry.device, DeviceTelemetry.counter).where(DeviceTelemetry.device.in_(list(devices)))
    return {row.device: row.counter for row in session.execute(query)}


def store(session: Session, heard: Iterable[Known], now: float, settings: TelemetrySettings, changed: Changes) -> None:
    """Stores what these devices told. Before the first row of a device is written: a sample is a change that is numbered."""
    devices = {device.id: device.telemetry for device in heard if device.telemetry}
    if not devices:
        return
    published = _published(
        session, {(one.model, one.release) for told in devices.values() for each in told for one in each.figures}
    )
    taking = _Taking(session, devices, {model for model, _ in published}, now, settings.window_s)
    pieces: dict[tuple[str, str, int, int, int], Figures] = {}
    last = {row.device: row for row in session.scalars(select(DeviceTelemetry).where(DeviceTelemetry.device.in_(devices)))}
    for device, told in devices.items():
        for each in told:
            counted = [one for one in each.figures if (one.model, one.release) in published and one.figures]
            taking.take(device, each, counted)
            for one in counted:
                for length in LENGTHS_S:
                    key = (device, one.model, one.release, length, int(min(each.at, now)) // length * length)
                    pieces[key] = pieces[key].plus(one.figures) if key in pieces else one.figures
        row = last.get(device) or DeviceTelemetry(device=device)
        row.counter, row.received, row.document = told[-1].counter, now, pasts.stored(told[-1])
        session.add(row)
    _add_pieces(session, pieces)
    taking.write(changed)


def _published(session: Session, named: set[Of]) -> set[Of]:
    query = select(ReleaseRow.model, ReleaseRow.version).where(ReleaseRow.model.in_({model for model, _ in named}))
    return {(model, version) for model, version in session.execute(query)} & named


def _add_pieces(session: Session, pieces: Mapping[tuple[str, str, int, int, int], Figures]) -> None:
    """Adds figures to those of their time that are there."""
    columns = (FiguresRow.device, FiguresRow.model, FiguresRow.release, FiguresRow.length_s, FiguresRow.start)
    there = {}
    keys = list(pieces)
    for begin in range(0, len(keys), 100):
        for row in session.scalars(select(FiguresRow).where(tuple_(*columns).in_(keys[begin : begin + 100]))):
            there[row.device, row.model, row.release, row.length_s, row.start] = row
    for key, figures in pieces.items():
        found = there.get(key)
        if found is None:
            device, model, release, length, start = key
            session.add(
                FiguresRow(
                    device=device, model=model, release=release, length_s=length, start=start, figures=pasts.stored(figures)
                )
            )
        else:
            found.figures = pasts.stored(read_figures(found.figures).plus(figures))


def read_figures(value: Any) -> Figures:
    """Figures as they stand in a column."""
    return codec.convert(value, Figures, str_keys=True)


class _Taking:
    """Keeps up the pasts of some devices, and takes samples of rollouts under way."""

    def __init__(self, session: Session, devices: Iterable[str], models: set[str], now: float, window_s: float) -> None:
        self._session, self._now, self._window_s = session, now, window_s
        names = list(devices)
        query = select(PastRow).where(PastRow.device.in_(names), PastRow.model.in_(models))
        self._rows: dict[str, dict[str, dict[int, PastRow]]] = {name: {} for name in names}
        for row in session.scalars(query):
            self._rows[row.device].setdefault(row.model, {})[row.release] = row
        active = select(RolloutRow.id, RolloutRow.model, RolloutRow.release, RolloutRow.health).where(
            RolloutRow.state.in_(rows.ACTIVE), RolloutRow.model.in_(models)
        )
        self._rollouts: dict[Of, dict[str, HealthRules]] = {}
        for rollout, model, release, rules in session.execute(active):
            if rules is not None:
                self._rollouts.setdefault((model, release), {})[rollout] = codec.convert(rules, HealthRules)
        self._taken: dict[tuple[str, str], set[HealthTest]] = {}
        if self._rollouts:
            ids = [rollout for found in self._rollouts.values() for rollout in found]
            known = select(HealthSampleRow.rollout, HealthSampleRow.device, HealthSampleRow.test).where(
                HealthSampleRow.rollout.in_(ids), HealthSampleRow.device.in_(names)
            )
            for rollout, device, test in session.execute(known):
                self._taken.setdefault((rollout, device), set()).add(HealthTest(test))
        several = [rollout for found in self._rollouts.values() if len(found) > 1 for rollout in found]
        asked = select(ToldDevice.rollout, ToldDevice.device).where(
            ToldDevice.rollout.in_(several), ToldDevice.device.in_(names)
        )
        self._asked = {(rollout, device) for rollout, device in session.execute(asked)} if several else set()
        """Which rollout told which device, where several bring one release, each to devices of its own."""
        self._found: list[HealthSampleRow] = []
        self._models: set[str] = set()

    def take(self, device: str, told: Telemetry, figures: Iterable[ModelFigures]) -> None:
        before = {
            model: max((row.counter for row in found.values()), default=-1) for model, found in self._rows[device].items()
        }
        for one in figures:
            self._add(device, told, one, before.get(one.model, -1))
        for one in figures:
            self._sample(device, one)

    def write(self, changed: Changes) -> None:
        if not self._found:
            return
        number = changes.take(self._session)
        for row in self._found:
            row.change = number
        self._session.add_all(self._found)
        changed.models |= self._models

    def _add(self, device: str, told: Telemetry, one: ModelFigures, before: int) -> None:
        """`before`: the counter of the last telemetry that told of the model at all."""
        found = self._rows[device].setdefault(one.model, {})
        row = found.get(one.release)
        past, comes = (pasts.read(row.past), row.counter < before) if row is not None else (Past(), True)
        past = past.plus(one.figures, told.seconds, int(self._now // self._window_s), comes=comes)
        if row is None:
            row = found[one.release] = PastRow(device=device, model=one.model, release=one.release)
            self._session.add(row)
        row.counter, row.at, row.past = told.counter, self._now, pasts.stored(past)

    def _sample(self, device: str, one: ModelFigures) -> None:
        rollouts = self._rollouts.get((one.model, one.release), {})
        for rollout, rules in rollouts.items():
            if len(rollouts) == 1 or (rollout, device) in self._asked:
                self._sample_for(rollout, rules, device, one)

    def _sample_for(self, rollout: str, rules: HealthRules, device: str, one: ModelFigures) -> None:
        found = self._rows[device][one.model]
        others = sorted((row for release, row in found.items() if release != one.release), key=lambda row: -row.counter)
        taken = self._taken.setdefault((rollout, device), set())
        now = pasts.read(found[one.release].past)
        for sample in list(pasts.samples(device, rules, now, (pasts.read(row.past) for row in others), taken)):
            taken.add(sample.test)
            self._models.add(one.model)
            row = HealthSampleRow(rollout=rollout, device=device, test=sample.test.value, at=self._now)
            row.before, row.now, row.of_before, row.of_now = sample.before, sample.now, sample.of_before, sample.of_now
            self._found.append(row)
