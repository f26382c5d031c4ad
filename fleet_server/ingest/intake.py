"""Messages of devices → the database.

A state report counts only when it is signed with the key of a certificate that was issued to the device of its topic, names that
device, and its counter is above the last one's. Everything else that does not fit is counted by cause, logged once per cause, and
dropped: no message of a device can stop the intake.
"""

from __future__ import annotations

import collections
import functools
import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from cryptography import x509
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import FormatError, VerificationError
from securesystemslib.signer import Key  # type: ignore[attr-defined]
from sqlalchemy import delete, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from agent.contract import topics
from agent.contract.codec import ContractError, decode
from agent.contract.reports import MAX_REPORT_BYTES, STATE_PAYLOAD_TYPE, Event, Presence, StateReport
from fleet_server.journal import Journal
from fleet_server.releases import keys
from fleet_server.storage.database import Database
from fleet_server.storage.models import Certificate, Device, DeviceModel

_log = logging.getLogger(__name__)

MAX_ENVELOPE_BYTES = 2 * MAX_REPORT_BYTES  # base64 and the signature around a report
MAX_EVENT_BYTES = 64 * 1024
MAX_PRESENCE_BYTES = 4 * 1024
MAX_MODELS = 256
MAX_ANSWERS = 64
MAX_INTEGER = 2**63 - 1


class Message(msgspec.Struct, frozen=True):
    topic: str
    payload: bytes


class Dropped(Exception):
    """The message does not count. `cause` is a stable word, the text says what was wrong."""

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause


class Changes(msgspec.Struct):
    """What a batch changed."""

    models: set[str] = msgspec.field(default_factory=set)
    devices: set[str] = msgspec.field(default_factory=set)
    events: list[dict[str, Any]] = msgspec.field(default_factory=list)


class Intake:
    def __init__(self, database: Database, journal: Journal, clock: Callable[[], float]) -> None:
        self._database, self._journal, self._clock = database, journal, clock
        self._lock = threading.Lock()
        self.accepted = 0
        self.dropped: collections.Counter[str] = collections.Counter()

    def take(self, batch: Iterable[Message]) -> Changes:
        """Stores a batch in one transaction and tells watchers; what it changed, for the rollouts to be judged again."""
        changes = Changes()
        with self._lock, self._database.session() as session:
            for message in batch:
                try:
                    with session.begin_nested():
                        self._one(session, message, changes)
                    self.accepted += 1
                except Dropped as drop:  # noqa: PERF203 - one bad message must not undo the others
                    self._drop(drop.cause, message.topic, drop)
                except (SQLAlchemyError, ValueError, OverflowError, RecursionError) as error:
                    self._drop("cannot_store", message.topic, error)
        self._journal.announce(changes.events)
        if changes.devices:
            self._journal.changed("devices")
        return changes

    def _drop(self, cause: str, topic: str, error: Exception) -> None:
        self.dropped[cause] += 1
        if self.dropped[cause] == 1:
            _log.warning("dropped a message on %r: %s (further ones of cause %r are only counted)", topic[:200], error, cause)

    def _one(self, session: Session, message: Message, changes: Changes) -> None:
        parsed = topics.parse_up(message.topic)
        if parsed is None:
            raise Dropped("bad_topic", f"topic {message.topic!r} is not one a device may write")
        device, what = parsed
        row = session.get(Device, device)
        if row is None or row.revoked:
            raise Dropped("unknown_device", f"{device!r} is not a device of this fleet")
        if what == "state":
            self._state(session, row, message.payload, changes)
        elif what == "presence":
            self._presence(row, message.payload)
        elif what == "events":
            self._event(session, row, message.payload, changes)
        elif what != "telemetry":
            raise Dropped("bad_topic", f"devices do not report {what!r}")
        row.last_seen = self._clock()
        changes.devices.add(device)

    # -- state -------------------------------------------------------------------------------------------------------------

    def _state(self, session: Session, row: Device, payload: bytes, changes: Changes) -> None:
        report = self._verified(session, row.id, payload)
        if not row.counter < report.counter <= MAX_INTEGER:
            raise Dropped("replayed", f"report {report.counter} of {row.id!r} is not newer than {row.counter}")
        if len(report.models) > MAX_MODELS:
            raise Dropped("too_large", f"{row.id!r} reports {len(report.models)} models; at most {MAX_MODELS} are taken")
        row.counter = report.counter
        row.state = msgspec.to_builtins(report)
        if report.hardware is not None:
            row.hardware = msgspec.to_builtins(report.hardware)
        known = {m.model: m for m in session.scalars(select(DeviceModel).where(DeviceModel.device == row.id))}
        for model, state in report.models.items():
            if len(model) > 64:
                raise Dropped("bad_report", f"{row.id!r} reports a model with a name too long")
            stored = known.pop(model, None)
            if stored is None:
                stored = DeviceModel(device=row.id, model=model, phase="", answers=[])
                session.add(stored)
            stored.serving, stored.sha256, stored.variant = state.serving, state.sha256, state.variant
            stored.phase = state.phase.value
            stored.answers = msgspec.to_builtins([*state.quarantined, *state.answers][-MAX_ANSWERS:])
            changes.models.add(model)
        for model in known:
            session.execute(delete(DeviceModel).where(DeviceModel.device == row.id, DeviceModel.model == model))
            changes.models.add(model)
        session.flush()

    def _verified(self, session: Session, device: str, payload: bytes) -> StateReport:
        if len(payload) > MAX_ENVELOPE_BYTES:
            raise Dropped("too_large", f"state report of {len(payload)} bytes; at most {MAX_ENVELOPE_BYTES} are taken")
        try:
            envelope = Envelope.from_dict(msgspec.json.decode(payload))
        except (KeyError, TypeError, AttributeError, ValueError, FormatError, RecursionError) as error:
            raise Dropped("bad_envelope", f"not a signed envelope: {error}") from error
        if envelope.payload_type != STATE_PAYLOAD_TYPE:
            raise Dropped("bad_envelope", f"payload type {envelope.payload_type!r} is not {STATE_PAYLOAD_TYPE!r}")
        query = select(Certificate.pem).where(
            Certificate.device == device, Certificate.revoked.is_(None), Certificate.expires > self._clock()
        )
        found = [_key_of(pem) for pem in session.scalars(query)]
        if not found:
            raise Dropped("bad_signature", f"{device!r} has no certificate that is still good")
        try:
            envelope.verify(found, 1)
        except (VerificationError, ValueError) as error:
            raise Dropped("bad_signature", f"state report of {device!r} is not signed by its key: {error}") from error
        try:
            report = decode(envelope.payload, StateReport, limit_bytes=MAX_REPORT_BYTES)
        except ContractError as error:
            raise Dropped("bad_report", str(error)) from error
        if report.device != device:
            raise Dropped("wrong_device", f"{device!r} sent a report of {report.device!r}")
        return report

    # -- presence and events -----------------------------------------------------------------------------------------------

    def _presence(self, row: Device, payload: bytes) -> None:
        if not payload:
            return  # a cleared retained message
        presence = _decoded(payload, Presence, MAX_PRESENCE_BYTES)
        if presence.device != row.id:
            raise Dropped("wrong_device", f"{row.id!r} sent the presence of {presence.device!r}")
        if not 0 <= presence.session <= MAX_INTEGER:
            raise Dropped("bad_report", f"session {presence.session} of {row.id!r} is out of range")
        if presence.session < row.session:
            raise Dropped("old_session", f"presence of session {presence.session} of {row.id!r}; it is in {row.session}")
        row.session, row.present = presence.session, presence.online

    def _event(self, session: Session, row: Device, payload: bytes, changes: Changes) -> None:
        event = _decoded(payload, Event, MAX_EVENT_BYTES)
        if event.device != row.id:
            raise Dropped("wrong_device", f"{row.id!r} sent an event of {event.device!r}")
        stored = self._journal.record_from_device(session, event)
        if stored is not None:
            changes.events.append(stored)


def _decoded(payload: bytes, kind: type[Any], limit: int) -> Any:
    try:
        return decode(payload, kind, limit_bytes=limit)
    except ContractError as error:
        raise Dropped("bad_report", str(error)) from error


@functools.lru_cache(maxsize=16384)
def _key_of(pem: str) -> Key:
    return keys.device_key(x509.load_pem_x509_certificate(pem.encode()).public_key())
