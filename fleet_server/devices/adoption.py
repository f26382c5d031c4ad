"""Certificates that this server issued and does not remember: it was restored from a backup, and they are younger.

A device shows one in a handshake that proved its key, and only the fleet's own CA can have signed it. So whoever enrolled or renewed
between the backup and the restore is known again as soon as it asks, without a visit. What was decided about it in that time is lost
with the rest: its groups, and that it was shut out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from cryptography import x509
from sqlalchemy.orm import Session

from fleet_server.devices import pki
from fleet_server.errors import Invalid
from fleet_server.journal import Happening, Journal
from fleet_server.storage.database import Database
from fleet_server.storage.models import Certificate, Device, Setting

_log = logging.getLogger(__name__)

TAKEN, RESTORED = "backup_taken", "restored"  # rows of `settings`
SLACK_S = 60.0  # of the clock between issuing a certificate and taking the backup


def open_window(session: Session, *, taken: float, restored: float) -> None:
    """Notes that this server is one of the time `taken`, and was restored at `restored`. Of several backups the oldest counts as
    long as devices may hold certificates of its time.
    """
    for name, value in ((TAKEN, taken), (RESTORED, restored)):
        row = session.get(Setting, name)
        if row is None:
            session.add(Setting(name=name, value=repr(value)))
        else:
            row.value = repr(min(float(row.value), value) if name == TAKEN else value)


def window(session: Session) -> tuple[float, float] | None:
    """When the backup was taken and when it was restored, seconds since the epoch; None for a server that never was."""
    found = [session.get(Setting, name) for name in (TAKEN, RESTORED)]
    if found[0] is None or found[1] is None:
        return None
    return float(found[0].value), float(found[1].value)


class Adoption:
    """Knows forgotten certificates again. Safe between threads."""

    def __init__(self, database: Database, authority: pki.Authority, journal: Journal, clock: Callable[[], float]) -> None:
        self._database, self._authority, self._journal, self._clock = database, authority, journal, clock
        self._window: tuple[float, float] | None = None
        self._read = False

    @property
    def window(self) -> tuple[float, float] | None:
        if not self._read:
            with self._database.reading() as session:
                self._window = window(session)
            self._read = True
        return self._window

    def adopt(self, certificate: x509.Certificate) -> bool:
        """Makes the certificate one that is known, with its device if that is not known either; whether it did."""
        if self.window is None:
            return False
        taken, restored = self.window
        issued, expires = (
            (certificate.not_valid_before_utc + pki.CLOCK_SKEW).timestamp(),
            certificate.not_valid_after_utc.timestamp(),
        )
        by = self._authority.issuer_of(certificate)
        if by is None or not taken - SLACK_S <= issued <= restored or expires <= self._clock():
            return False
        try:
            device = pki.check_device_id(pki.common_name(certificate))
        except Invalid:
            return False
        with self._database.session() as session:
            row = session.get(Device, device)
            if row is not None and row.revoked:
                return False
            serial = pki.serial_hex(certificate)
            if session.get(Certificate, serial) is not None:
                return row is not None  # by another thread, a moment ago
            if row is None:
                session.add(
                    Device(
                        id=device, created=self._clock(), groups=[], labels={}, serial=int(self._clock()), revoked=False, counter=-1,
                        session=-1, present=False, stale_groups=True,
                    )
                )  # fmt: skip
            pem = pki.pem_of(certificate).decode()
            session.add(
                Certificate(serial=serial, device=device, pem=pem, issued=issued, expires=expires, authority=by.fingerprint)
            )
            message = (
                f"{device} is known again by its certificate: it joined after the backup was taken, and its groups are lost"
                if row is None
                else f"{device} is known again by its certificate, which it got after the backup was taken"
            )
            event = self._journal.record(session, Happening(name="device_adopted", message=message, device=device))
        _log.warning("%s", message)
        self._journal.announce([event])
        self._journal.changed("devices")
        return True
