"""Messages of devices → the database.

A state report or an event counts only when it is signed with the key of a certificate that was issued to the device of its
topic, and names that device; a report also only when its counter is above the last one's, an event only once. Everything else
that does not fit is counted by cause, logged once per cause, and dropped: no message of a device can stop the intake.

A batch is read, judged and written as a whole, because the database's cost is per statement. Most reports say what the last one
said: a digest of that stands in the device's row, and where it is the same nothing is read or written but the report itself. What
differs is numbered as a change (`storage.changes`), and rollouts of the models that it is about are judged anew.
"""

from __future__ import annotations

import collections
import logging
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from sqlalchemy import select
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from agent.contract import topics
from agent.contract.codec import ContractError, decode
from agent.contract.reports import (
    EVENT_PAYLOAD_TYPE,
    MAX_EVENT_BYTES,
    MAX_REPORT_BYTES,
    STATE_PAYLOAD_TYPE,
    Event,
    Presence,
    StateReport,
)
from agent.contract.telemetry import MAX_TELEMETRY_BYTES, TELEMETRY_PAYLOAD_TYPE, Telemetry
from fleet_server.devices import envelopes, shared_identity
from fleet_server.errors import Refused
from fleet_server.ingest import reported, telemetry
from fleet_server.ingest.reported import Changes, Known
from fleet_server.journal import Happening, Journal
from fleet_server.sections import TelemetrySettings
from fleet_server.storage import changes
from fleet_server.storage.database import Database
from fleet_server.storage.models import Certificate, Device, DeviceModel

_log = logging.getLogger(__name__)

MAX_PRESENCE_BYTES = 4 * 1024
MAX_MODELS = 256
MAX_INTEGER = 2**63 - 1
NUL = re.compile(
    rb"(?<!\\)((?:\\\\)*)\\u0000"
)  # in JSON; PostgreSQL keeps no such character, and it means nothing in a message
STRANGERS = ("unknown_device", "bad_signature")  # causes that a device may have without being at fault, see `devices.adoption`
MAX_NAME, MAX_VARIANT = 64, 128  # the widths of their columns


class Message(msgspec.Struct, frozen=True):
    topic: str
    payload: bytes


class Dropped(Exception):
    """The message does not count. `cause` is a stable word, the text says what was wrong."""

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause


class Intake:
    def __init__(
        self, database: Database, journal: Journal, clock: Callable[[], float], silence_s: float,
        settings: TelemetrySettings | None = None,
    ) -> None:  # fmt: skip
        """`silence_s`: without a word for so long a device counts as offline."""
        self._database, self._journal, self._clock, self._silence_s = database, journal, clock, silence_s
        self._lock, self._counting, self._telemetry = threading.Lock(), threading.Lock(), settings or TelemetrySettings()
        self.on_stranger: Callable[[str], None] = lambda _device: None
        """Told of a device that is not known, or signed with a key that is not. Must not block."""
        self.accepted = 0
        self.dropped: collections.Counter[str] = collections.Counter()

    def store(self, batch: Sequence[Message]) -> Changes:
        """Stores a batch in one transaction and tells whoever reads along; what it changed, for the rollouts to be judged
        again.

        Raises: OperationalError when the database stores nothing now (disk full, locked, unreachable); nothing is lost then.
        """
        with self._lock:
            try:
                changed, drops = self._store(batch)
            except OperationalError:
                raise
            except (SQLAlchemyError, ValueError, OverflowError) as error:
                if len(batch) == 1:
                    changed, drops = Changes(), [(batch[0].topic, Dropped("cannot_store", str(error)))]
                else:  # one of them cannot be stored: each on its own, so that only that one is lost
                    changed, drops = self._store_one_by_one(batch)
            self.accepted += len(batch) - len(drops)
        for topic, drop in drops:
            self.drop(topic, drop)
        self._journal.announce(changed.events)
        if changed.devices:
            self._journal.changed("devices")
        return changed

    def _store_one_by_one(self, batch: Sequence[Message]) -> tuple[Changes, list[tuple[str, Dropped]]]:
        changed, drops = Changes(), []
        for message in batch:
            try:
                one, dropped = self._store([message])
            except OperationalError:
                raise
            except (SQLAlchemyError, ValueError, OverflowError) as error:
                one, dropped = Changes(), [(message.topic, Dropped("cannot_store", str(error)))]
            changed.models |= one.models
            changed.devices |= one.devices
            changed.arrived |= one.arrived
            changed.events += one.events
            drops += dropped
        return changed, drops

    def drop(self, topic: str, drop: Dropped) -> None:
        """Counts a message that does not count. Waits for no batch that is being stored: whoever reads from the broker calls
        this for each message of a flood.
        """
        with self._counting:
            self.dropped[drop.cause] += 1
            first = self.dropped[drop.cause] == 1
        where = topics.parse_up(topic)
        if where is not None and drop.cause in STRANGERS:
            self.on_stranger(where[0])
        if first:
            _log.warning(
                "dropped a message on %r: %s (further ones of cause %r are only counted)", topic[:200], drop, drop.cause
            )

    def _store(self, batch: Sequence[Message]) -> tuple[Changes, list[tuple[str, Dropped]]]:
        changed, drops, events = Changes(), [], list[Event]()
        parsed = [(message, topics.parse_up(message.topic)) for message in batch]
        with self._database.session() as session:
            known = self._load(session, {where[0] for _, where in parsed if where is not None})
            told = {where[0] for _, where in parsed if where is not None and where[1] == "telemetry"} & known.keys()
            for device, counter in telemetry.counters(session, told).items() if told else ():
                known[device].told = counter
            for message, where in parsed:
                try:
                    self._judge(known, message, where, events)
                except Dropped as drop:  # noqa: PERF203 - one bad message must not undo the others
                    drops.append((message.topic, drop))
            heard = [device for device in known.values() if device.heard]
            changed.devices |= {device.id for device in heard}
            changed.arrived |= {device.id for device in heard if device.arrived and device.present}
            telemetry.store(session, heard, self._clock(), self._telemetry, changed)
            self._write(session, heard, changed)
            self._note_several(session, [device for device in known.values() if device.several], changed)
            changed.events += self._journal.record_from_devices(session, events)
        return changed, drops

    def _judge(self, known: dict[str, Known], message: Message, where: tuple[str, str] | None, events: list[Event]) -> None:
        """Adds one message to what is known.  Raises: Dropped, with nothing added."""
        if where is None or where[1] != "telemetry" or where[0] not in known:
            _judge(known, message, where, events)
            return
        device = known[where[0]]
        told = _verified(device, message.payload, TELEMETRY_PAYLOAD_TYPE, Telemetry, MAX_TELEMETRY_BYTES)
        fault = telemetry.fault(device, told, self._clock(), self._telemetry.max_age_s)
        if fault is not None:
            raise Dropped(*fault)
        device.told, device.heard = told.counter, True
        device.telemetry.append(told)

    # -- reading and writing -----------------------------------------------------------------------------------------------

    def _load(self, session: Session, devices: set[str]) -> dict[str, Known]:
        """The devices of a batch that are in the fleet and not shut out, with the keys that may sign for them."""
        columns = (
            Device.id, Device.counter, Device.session, Device.present, Device.last_seen, Device.runs, Device.shared, Device.said,
            Device.hardware_class, Device.problem, Device.trouble, Device.agent_version,
        )  # fmt: skip
        query = select(*columns).where(Device.id.in_(devices), Device.revoked.is_(False))
        rows: Any = session.execute(query)
        known = {row.id: Known(*row) for row in rows}
        for one in known.values():
            one.was_present = one.present
        good = select(Certificate.device, Certificate.pem).where(
            Certificate.device.in_(known), Certificate.revoked.is_(None), Certificate.expires > self._clock()
        )
        for device, pem in session.execute(good):
            known[device].keys.append(envelopes.key_of(pem))
        return known

    def _write(self, session: Session, heard: list[Known], changed: Changes) -> None:
        now = self._clock()
        said = [(d, d.report) for d in heard if d.report is not None]
        differ = [(d, report, digest) for d, report in said if (digest := reported.digest_of(report)) != d.said]
        others = {d.id for d in heard if self._is_change(d, now)} - {d.id for d, _, _ in differ}
        number = changes.take(session) if differ or others else 0
        here = {d.id: {"key": d.id, "present": d.present, "session": d.session, "last_seen": now} for d in heard}
        reported.update_devices(session, [here[d.id] for d in heard if d.report is None])
        reported.update_devices(session, [{**here[d.id], "counter": report.counter, "state": report} for d, report in said])
        reported.update_versions(session, said)
        reported.update_devices(session, [{"key": d.id, "runs": d.runs} for d in heard if d.runs_changed])
        reported.update_devices(session, [{"key": device, "change": number} for device in others])
        if differ:
            reported.update_summaries(session, differ, number)
            reported.write_models(session, [(device, report) for device, report, _ in differ], changed)

    def _is_change(self, device: Known, now: float) -> bool:
        """Whether it counts as there or not in another way than before. One that was silent for half the time after which it
        counts as offline may be offline by the clock of whoever judges.
        """
        last = device.last_seen
        return device.present != device.was_present or last is None or not 0 <= now - last < self._silence_s / 2

    def _note_several(self, session: Session, devices: list[Known], changed: Changes) -> None:
        """Said once, and again after a time without signs."""
        now = self._clock()
        for device in devices:
            if not shared_identity.are_several(device.shared, now):
                message = (
                    f"several machines report as {device.id}: a card or a state folder was copied after it had been enrolled; what they "
                    "report counts as nobody's success until each is a device of its own"
                )
                happening = Happening(name="identity_shared", message=message, device=device.id, reason="identity_shared")
                changed.events.append(self._journal.record(session, happening))
                changed.models |= set(session.scalars(select(DeviceModel.model).where(DeviceModel.device == device.id)))
            changed.devices.add(device.id)
        if devices:
            number = changes.take(session)
            reported.update_devices(session, [{"key": device.id, "shared": now, "change": number} for device in devices])


# -- judging -----------------------------------------------------------------------------------------------------------------


def _judge(known: dict[str, Known], message: Message, where: tuple[str, str] | None, events: list[Event]) -> None:
    """Adds one message to what is known.  Raises: Dropped, with nothing added."""
    if where is None:
        raise Dropped("bad_topic", f"topic {message.topic!r} is not one a device may write")
    name, what = where
    device = known.get(name)
    if device is None:
        raise Dropped("unknown_device", f"{name!r} is not a device of this fleet")
    if what == "state":
        _read_state(device, message.payload)
    elif what == "presence":
        _read_presence(device, message.payload)
    elif what == "events":
        event = _verified(device, message.payload, EVENT_PAYLOAD_TYPE, Event, MAX_EVENT_BYTES)
        if event.release is not None and abs(event.release) > MAX_INTEGER:
            raise Dropped("bad_report", f"release {event.release} is out of range")
        events.append(event)
    else:
        raise Dropped("bad_topic", f"devices do not report {what!r}")
    device.heard = True


def _read_state(device: Known, payload: bytes) -> None:
    report = _verified(device, payload, STATE_PAYLOAD_TYPE, StateReport, MAX_REPORT_BYTES)
    if not device.counter < report.counter <= MAX_INTEGER:
        device.several |= report.counter <= device.counter and shared_identity.is_stranger(device.runs, report.run)
        raise Dropped("replayed", f"report {report.counter} of {device.id!r} is not newer than {device.counter}")
    if len(report.models) > MAX_MODELS:
        raise Dropped("too_large", f"{device.id!r} reports {len(report.models)} models; at most {MAX_MODELS} are read")
    for model, state in report.models.items():
        if len(model) > MAX_NAME or len(state.variant or "") > MAX_VARIANT or len(state.sha256 or "") > MAX_NAME:
            raise Dropped("bad_report", f"{device.id!r} reports a model with a name too long")
        if state.serving is not None and abs(state.serving) > MAX_INTEGER:
            raise Dropped("bad_report", f"{device.id!r} reports version {state.serving}, which is out of range")
    if (device.counter < 0 and report.session < device.session) or device.session < report.session <= MAX_INTEGER:
        # The first word of a newly enrolled device: the session is from what an earlier device of this id left at the broker. Or
        # the birth of a session was lost, with a broker that lost its disk: who reports in it is there.
        device.session, device.present, device.arrived = report.session, True, True
    runs, back = shared_identity.heard(device.runs, report.run[:MAX_NAME])
    device.runs_changed |= runs != device.runs
    device.several |= back
    device.runs, device.counter, device.report = runs, report.counter, report


def _read_presence(device: Known, payload: bytes) -> None:
    if not payload:
        return  # a cleared retained message
    presence = _decoded(payload, Presence, MAX_PRESENCE_BYTES)
    if presence.device != device.id:
        raise Dropped("wrong_device", f"{device.id!r} sent the presence of {presence.device!r}")
    if not 0 <= presence.session <= MAX_INTEGER:
        raise Dropped("bad_report", f"session {presence.session} of {device.id!r} is out of range")
    if presence.session < device.session:
        raise Dropped("old_session", f"presence of session {presence.session} of {device.id!r}; it is in {device.session}")
    device.arrived |= presence.online
    device.session, device.present = presence.session, presence.online


def _verified(device: Known, payload: bytes, payload_type: str, kind: type[Any], limit: int) -> Any:
    """The document of type `kind` that the device signed."""
    if len(payload) > 2 * limit:  # base64 and the signature around it
        raise Dropped("too_large", f"{kind.__name__} of {len(payload)} bytes; at most {2 * limit} are read")
    try:
        words = envelopes.opened(payload, payload_type, device.keys, f"{kind.__name__} of {device.id!r}")
    except Refused as error:
        raise Dropped(error.code, str(error)) from error
    document = _decoded(NUL.sub(rb"\1\\ufffd", words), kind, limit)
    if document.device != device.id:
        raise Dropped("wrong_device", f"{device.id!r} sent a {kind.__name__} of {document.device!r}")
    return document


def _decoded(payload: bytes, kind: type[Any], limit: int) -> Any:
    try:
        return decode(payload, kind, limit_bytes=limit)
    except ContractError as error:
        raise Dropped("bad_report", str(error)) from error
