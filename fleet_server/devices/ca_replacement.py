"""Replacing the fleet's CA without a visit to any device: the steps, who has followed, and who is left.

Every step is made durable first (`ca_steps`); what follows from it is made by `apply`, at once and again at every start. So a server
that is killed anywhere goes on from the step that it has written.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

import msgspec
from sqlalchemy import ColumnElement, and_, exists, func, or_, select, update

from agent.contract.authorities import Authorities
from fleet_server.access import SERVER, Actor
from fleet_server.config import FleetConfig
from fleet_server.devices.ca import Ca
from fleet_server.devices.ca_steps import SETTLED, Event, Step, after
from fleet_server.devices.inventory import Inventory
from fleet_server.devices.pki import Authority
from fleet_server.errors import Conflict
from fleet_server.journal import Happening, Journal
from fleet_server.metrics import Metrics, Sample
from fleet_server.storage.database import Database
from fleet_server.storage.models import Certificate, Device, EnrolmentToken

_log = logging.getLogger(__name__)

AT_ONCE = 500  # certificates that are ended in one transaction
NAMED = 1000  # devices that are left and are named
SWITCH_AFTER_S = 7 * 86400.0
MAX_SWITCH_AFTER_S = 365 * 86400.0
LONGEST_SPREAD_S = 7 * 86400.0  # as devices bound it
WARN_BEFORE_S = 400 * 86400.0  # a year for the devices that are away, and a month to begin


class AuthorityView(msgspec.Struct, frozen=True, kw_only=True):
    """A CA that is believed. `devices`: how many have a certificate of it that is good."""

    sha256: str
    name: str
    begins: float
    ends: float
    shown: bool
    devices: int
    pem: str


class Left(msgspec.Struct, frozen=True):
    """Devices that have not followed, at most a thousand of them by name."""

    count: int
    devices: list[str]


class CaView(msgspec.Struct, frozen=True, kw_only=True):
    """The fleet's CAs, the newest first, and how far its replacement is. `followed`: devices with a certificate of the newest.
    `here`: those that were heard of since they had to follow, and did not: an earlier agent, or something is wrong. `away`: those
    that were not heard of since. `ended`: those whose certificates have ended, who could not come back in any case. `tokens`:
    enrolment strings that end with the switch.
    """

    step: Step
    authorities: list[AuthorityView]
    since: float | None
    switch_at: float | None
    followed: int
    here: Left
    away: Left
    ended: Left
    tokens: int


class Outside(Protocol):
    """What believes CAs, and shows certificates, besides this process's own parts."""

    def trust_changed(self, *, dropped: bool) -> None:
        """Other CAs are believed, or other certificates shown, than before; `dropped`: one is believed no more."""


class CaReplacement:
    """Safe between threads."""

    def __init__(
        self, database: Database, authority: Authority, inventory: Inventory, journal: Journal, config: FleetConfig,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._database, self._authority, self._inventory = database, authority, inventory
        self._journal, self._config, self._clock = journal, config, clock
        self._lock = threading.RLock()
        self._unapplied = False
        self.outside: Outside | None = None
        self.impossible = ""
        """Why this server cannot replace its CA: there are others that believe it and are not told."""
        self.tell: Callable[[Authorities | None], None] = lambda _: None
        """Tells devices which CAs to believe."""

    # -- what is so --------------------------------------------------------------------------------------------------------

    def view(self) -> CaView:
        with self._lock:
            reached, believed, shown = self._authority.replacement, self._authority.believed, self._authority.shown
        replaced = reached.step is not Step.SETTLED
        with self._database.reading() as session:

            def count(*conditions: ColumnElement[bool]) -> int:
                query = select(func.count()).select_from(Device).where(Device.revoked.is_(False), *conditions)
                return int(session.scalar(query) or 0)

            def left(*conditions: ColumnElement[bool]) -> Left:
                if not replaced or not (found := count(~self._has(believed[0]), *conditions)):
                    return Left(0, [])
                query = select(Device.id).where(Device.revoked.is_(False), ~self._has(believed[0]), *conditions)
                return Left(found, list(session.scalars(query.order_by(Device.id).limit(NAMED))))

            now = self._clock()
            lives = Device.expires > now
            heard = and_(Device.last_seen.is_not(None), Device.last_seen > reached.since + reached.spread_s)
            usable = (EnrolmentToken.revoked.is_(False), EnrolmentToken.uses_left > 0, EnrolmentToken.expires > now)
            tokens = select(func.count()).select_from(EnrolmentToken).where(*usable, EnrolmentToken.created < reached.since)
            return CaView(
                step=reached.step, authorities=[self._seen(one, one is shown, count(self._has(one))) for one in believed],
                since=reached.since if replaced else None,
                switch_at=reached.switch_at if reached.step is Step.INTRODUCED else None, followed=count(self._has(believed[0])),
                here=left(lives, heard), away=left(lives, ~heard), ended=left(or_(Device.expires.is_(None), ~lives)),
                tokens=int(session.scalar(tokens) or 0) if replaced else 0,
            )  # fmt: skip

    def _has(self, one: Ca) -> ColumnElement[bool]:
        """Whether the device has a good certificate of that CA."""
        return exists().where(
            Certificate.device == Device.id, Certificate.authority == one.fingerprint, Certificate.revoked.is_(None),
            Certificate.expires > self._clock(),
        )  # fmt: skip

    @staticmethod
    def _seen(one: Ca, shown: bool, devices: int) -> AuthorityView:
        certificate = one.certificate
        return AuthorityView(
            sha256=one.fingerprint, name=certificate.subject.rfc4514_string(), begins=certificate.not_valid_before_utc.timestamp(),
            ends=one.ends, shown=shown, devices=devices, pem=one.pem.decode(),
        )  # fmt: skip

    def warnings(self) -> list[str]:
        """What a person must do something about."""
        reached, now = self._authority.replacement, self._clock()
        if reached.step is Step.INTRODUCED:
            days = max(0.0, reached.switch_at - now) / 86400
            found = (
                f"the fleet's CA is being replaced, and the server shows certificates of the new one in {days:.1f} days: until then every "
                "operator runs `edge-fleet ca trust`, and browsers are given the new CA; `edge-fleet ca status` says which devices are left"
            )
        elif reached.step is Step.SWITCHED:
            found = "the fleet's CA is being replaced: `edge-fleet ca status` says which devices are left, `edge-fleet ca finish` ends it"
        elif (left_s := self._authority.present.ends - now) < WARN_BEFORE_S:
            found = (
                f"the fleet's CA ends in {left_s / 86400:.0f} days, and nobody can connect then: `edge-fleet ca replace` "
                "(docs/how-to/replace-the-ca.md)"
            )
        else:
            return []
        return [found]

    def count(self, metrics: Metrics) -> None:
        def devices() -> list[Sample]:
            if self._authority.replacement.step is Step.SETTLED:
                return []
            view = self.view()
            left = {"here": view.here.count, "away": view.away.count, "ended": view.ended.count}
            return [Sample(number, {"state": state}) for state, number in {"followed": view.followed, **left}.items()]

        metrics.add(
            "edge_fleet_ca_devices",
            "devices by whether they have a certificate of the newest CA: followed; here, away, ended: not yet",
            devices,
        )
        ends = lambda: [Sample(one.ends, {"sha256": one.fingerprint[:16]}) for one in self._authority.believed]  # noqa: E731
        metrics.add("edge_fleet_ca_ends_seconds", "when each CA that is believed ends, in seconds since the epoch", ends)

    # -- steps -------------------------------------------------------------------------------------------------------------

    def replace(self, actor: Actor, *, switch_after_s: float = SWITCH_AFTER_S, spread_s: float | None = None) -> CaView:
        """Makes a new CA and has it believed beside the present one, by the server and by devices, which renew under it within
        `spread_s` seconds. With `switch_after_s` 0 the server's own certificates are of the new one at once.

        Raises: Conflict when one is being replaced already, or when the clock is wrong.
        """
        with self._lock:
            authority, now = self._authority, self._clock()
            self._check_alone()
            step = after(authority.replacement.step, Event.REPLACE)
            if now < authority.present.certificate.not_valid_before_utc.timestamp():
                raise Conflict(
                    "this machine's clock says a time before the present CA was made; set it first", code="wrong_clock"
                )
            if spread_s is None:
                spread_s = self._spread_s()
            made = authority.prepare(self._config.fleet)
            begun = msgspec.structs.replace(
                SETTLED, step=step, since=now, switch_at=now + switch_after_s, spread_s=min(LONGEST_SPREAD_S, spread_s)
            )
            authority.enter(begun)
            message = f"the fleet's CA is being replaced: devices are told of a new one, {made.fingerprint}"
            self._note(actor, "ca.replace", made, message)
            self.apply()
            if switch_after_s <= 0:
                self.switch(actor)
        return self.view()

    def switch(self, actor: Actor) -> CaView:
        """Has the server show certificates of the new CA.  Raises: Conflict."""
        with self._lock:
            self._check_alone()
            reached = self._authority.replacement
            self._authority.enter(msgspec.structs.replace(reached, step=after(reached.step, Event.SWITCH)))
            shown = self._authority.shown
            self._note(
                actor, "ca.switch", shown, f"the server shows certificates of the new CA, {shown.fingerprint}, from now on"
            )
            self.apply()
        return self.view()

    def finish(self, actor: Actor, *, leave_behind: bool) -> CaView:
        """Has the old CA believed no more. Devices that have not followed have to be enrolled anew then.

        Raises: Conflict that names them, unless they may be left behind.
        """
        with self._lock:
            self._check_alone()
            reached = self._authority.replacement
            step = after(reached.step, Event.FINISH)
            view = self.view()
            left = [*view.here.devices, *view.away.devices]
            if left and not leave_behind:
                count, more = view.here.count + view.away.count, ", …" if len(left) > 20 else ""
                raise Conflict(
                    f"{count} devices have no certificate of the new CA and would have to be enrolled anew: {', '.join(left[:20])}{more}; "
                    "finish with --yes to leave them behind",
                    code="devices_left",
                )
            self._authority.enter(msgspec.structs.replace(reached, step=step))
            present = self._authority.present
            self._note(actor, "ca.finish", present, f"the CA {present.fingerprint} is the only one that is believed now")
            self.apply()
        return self.view()

    def _check_alone(self) -> None:
        if self.impossible:
            raise Conflict(self.impossible, code="not_alone")

    def tick(self) -> None:
        """Does again what could not be done, and switches when it is time."""
        if self._unapplied:
            self.apply()
        reached = self._authority.replacement
        if reached.step is Step.INTRODUCED and self._clock() >= reached.switch_at and not self.impossible:
            self.switch(SERVER)

    # -- what follows from the step ----------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Makes good what an interrupted server left; before anything listens, and before devices are told."""
        with self._lock:
            with self._database.session() as session:  # of before it was noted, when there was one CA
                first = update(Certificate).where(Certificate.authority.is_(None))
                session.execute(first.values(authority=self._authority.present.fingerprint))
            self._make_good()
            self._authority.settle()

    def apply(self) -> None:
        """Brings everything to what the step says. What fails is tried again by `tick`."""
        with self._lock:
            self._unapplied = True
            self._make_good()
            if self.outside is not None:
                self.outside.trust_changed(dropped=self._authority.replacement.step is Step.FINISHING)
            self.tell(self._authority.told())
            self._authority.settle()  # last: until then the step says that all of it is to be done
            self._unapplied = False

    def _make_good(self) -> None:
        self._authority.write_trusted()
        self._authority.renew_own(self._config.own_names)
        self._end_certificates()
        self._inventory.write_crl()

    def _end_certificates(self) -> None:
        """A certificate of a CA that is believed no more opens nothing; so that lists say so as well. Devices that have another
        notice nothing.
        """
        believed = [one.fingerprint for one in self._authority.believed]
        query = select(Certificate).where(Certificate.revoked.is_(None), Certificate.authority.not_in(believed))
        while True:
            with self._database.session() as session:
                rows = session.scalars(query.limit(AT_ONCE)).all()
                for row in rows:
                    row.revoked = self._clock()
            if len(rows) < AT_ONCE:
                return

    def _spread_s(self) -> float:
        with self._database.reading() as session:
            devices = int(session.scalar(select(func.count()).select_from(Device).where(Device.revoked.is_(False))) or 0)
        return round(devices / self._config.looks_per_s, 3)

    def _note(self, actor: Actor, action: str, ca: Ca, message: str) -> None:
        with self._database.session() as session:
            self._journal.audit(session, actor, action, ca.fingerprint)
            event = self._journal.record(session, Happening(name=action.replace(".", "_"), message=message))
        self._journal.announce([event])
        _log.warning("%s", message)
