"""What a state report changes in the tables: columns of its device, and a row for each model that it is about.

Reports are compared with the last ones by a digest of what seldom differs; only where it does, the tables are read and written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import msgspec
from sqlalchemy import bindparam, delete, insert, select, update
from sqlalchemy.orm import Session

from agent.contract.codec import encode
from agent.contract.reports import ModelState, StateReport, hardware_class
from agent.contract.telemetry import Telemetry
from fleet_server.devices.envelopes import DeviceKey
from fleet_server.devices.views import in_trouble
from fleet_server.journal import EventView
from fleet_server.storage.models import Device, DeviceModel

MAX_ANSWERS = 64
MAX_PROBLEM, MAX_CLASS, MAX_VERSION = 256, 512, 64  # the widths of their columns

_models = DeviceModel.__table__
_COLUMNS = tuple(column.name for column in _models.columns)
_THAT_MODEL = (_models.c.device == bindparam("of"), _models.c.model == bindparam("which"))
DELETE_MODEL = delete(_models).where(*_THAT_MODEL)  # type: ignore[arg-type]
UPDATE_MODEL = update(_models).where(*_THAT_MODEL)  # type: ignore[arg-type]
UPDATE_MODEL = UPDATE_MODEL.values({name: bindparam(name) for name in _COLUMNS if name not in {"device", "model"}})


class Changes(msgspec.Struct):
    """What a batch changed: models of which a device says something else than before, devices that were heard, devices that are in a
    newer session at the broker than was heard of, new events.
    """

    models: set[str] = msgspec.field(default_factory=set)
    devices: set[str] = msgspec.field(default_factory=set)
    arrived: set[str] = msgspec.field(default_factory=set)
    events: list[EventView] = msgspec.field(default_factory=list)


class Known(msgspec.Struct):
    """What is known of a device while a batch is judged; written back once at its end."""

    id: str
    counter: int
    session: int
    present: bool
    last_seen: float | None
    runs: list[str]
    shared: float | None
    said: str | None
    hardware_class: str | None
    problem: str | None
    trouble: bool
    agent_version: str | None
    keys: list[DeviceKey] = msgspec.field(default_factory=list)
    several: bool = False
    """Whether it showed itself to be several machines in this batch."""
    was_present: bool = False
    runs_changed: bool = False
    report: StateReport | None = None
    heard: bool = False
    telemetry: list[Telemetry] = msgspec.field(default_factory=list)
    told: int = -1
    """The counter of its last telemetry."""
    arrived: bool = False
    """Whether it said that it is there, as devices do when they have connected."""


def digest_of(report: StateReport) -> str:
    """Of what is kept of a report in columns of its own, and what rollouts are judged by."""
    models = {
        name: (one.serving, one.sha256, one.variant, one.phase, one.quarantined, one.answers, one.held)
        for name, one in report.models.items()
    }
    kept = encode((models, report.hardware, report.problem, in_trouble(report)))
    return hashlib.blake2b(kept, digest_size=16).hexdigest()


def update_summaries(session: Session, reports: list[tuple[Known, StateReport, str]], number: int) -> None:
    """The columns that follow from reports which say something new. What has an index is written only where it differs."""
    rows = [{"key": device.id, "said": digest, "change": number} for device, _, digest in reports]
    hardware = [msgspec.to_builtins(report.hardware) for _, report, _ in reports]
    update_devices(session, [row for row, known in zip(rows, hardware, strict=True) if known is None])
    update_devices(
        session, [{**row, "hardware": known} for row, known in zip(rows, hardware, strict=True) if known is not None]
    )
    classes = [
        (device, kind) for device, report, _ in reports if (kind := _class_of(report)) not in {None, device.hardware_class}
    ]
    update_devices(session, [{"key": device.id, "hardware_class": kind, "stale_groups": True} for device, kind in classes])
    worries = [(device, _problem_of(report), in_trouble(report)) for device, report, _ in reports]
    update_devices(
        session,
        [
            {"key": device.id, "problem": problem, "trouble": trouble}
            for device, problem, trouble in worries
            if (problem, trouble) != (device.problem, device.trouble)
        ],
    )


def update_versions(session: Session, reports: Iterable[tuple[Known, StateReport]]) -> None:
    """The software of devices that say another version of it than before. Scopes of groups may ask about it."""
    versions = [(device, report.agent_version[:MAX_VERSION]) for device, report in reports]
    update_devices(
        session,
        [
            {"key": device.id, "agent_version": version, "stale_groups": True}
            for device, version in versions
            if version != device.agent_version
        ],
    )


def _problem_of(report: StateReport) -> str | None:
    return report.problem[:MAX_PROBLEM] if report.problem else None


def _class_of(report: StateReport) -> str | None:
    return hardware_class(report.hardware)[:MAX_CLASS] if report.hardware is not None else None


def write_models(session: Session, reports: list[tuple[Known, StateReport]], changed: Changes) -> None:
    """Writes what these reports say of models, and notes the models of which rollouts know something else now."""
    before: dict[str, dict[str, dict[str, Any]]] = {device.id: {} for device, _ in reports}
    for row in session.execute(select(*_models.columns).where(DeviceModel.device.in_(before))):
        before[row.device][row.model] = dict(zip(_COLUMNS, row, strict=True))
    gone, fresh, other = [], [], []
    for device, report in reports:
        said, had = {name: _row(device.id, name, one) for name, one in report.models.items()}, before[device.id]
        differs = {name for name in {*said, *had} if said.get(name) != had.get(name)}
        gone += [{"of": device.id, "which": name} for name in differs if name not in said]
        fresh += [said[name] for name in differs if name not in had]
        other += [{**said[name], "of": device.id, "which": name} for name in differs if name in said and name in had]
        same_class = _class_of(report) in {None, device.hardware_class}
        changed.models |= differs if same_class else {*said, *had}
    for statement, rows in ((DELETE_MODEL, gone), (insert(DeviceModel.__table__), fresh), (UPDATE_MODEL, other)):  # type: ignore[arg-type]
        if rows:
            session.connection().execute(statement, rows)


def _row(device: str, model: str, state: ModelState) -> dict[str, Any]:
    return {
        "device": device, "model": model, "serving": state.serving, "sha256": state.sha256, "variant": state.variant,
        "phase": state.phase.value, "held": state.held, "answers": msgspec.to_builtins([*state.quarantined, *state.answers][-MAX_ANSWERS:]),
    }  # fmt: skip


def update_devices(session: Session, rows: list[dict[str, Any]]) -> None:
    """Updates devices in one statement for all: `key` is the id, the other names are columns."""
    if not rows:
        return
    columns: dict[str, Any] = {name: bindparam(name) for name in rows[0] if name != "key"}
    statement = update(Device.__table__).where(Device.__table__.c.id == bindparam("key")).values(columns)  # type: ignore[arg-type]
    session.connection().execute(statement, rows)
