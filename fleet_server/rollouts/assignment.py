"""What devices are told: the assignment, made from the database, signed, and poked about.

The database decides. The signed document follows from it, so a crash between a decision and its signature is made good at the
next start.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.contract.addresses import Addresses
from agent.contract.assignment import Assignment, ModelAssignment, format_of, read_assignment
from agent.contract.authorities import Authorities
from agent.contract.codec import encode
from fleet_server.access import SERVER
from fleet_server.journal import Journal
from fleet_server.releases import catalogue
from fleet_server.releases.repository import Repository
from fleet_server.rollouts import exclusions, rows, rules, steps, teams
from fleet_server.rollouts.machine import Event
from fleet_server.storage.database import Database
from fleet_server.storage.models import ModelRow, ReleaseRow, RolloutRow, RuleRow


class Poker(Protocol):
    """Who tells devices that there is something new."""

    def poke_all(self, assignment_version: int) -> None: ...


class FleetAssignment:
    """The assignment of one fleet. Safe between threads."""

    def __init__(
        self, database: Database, repository: Repository, journal: Journal, fleet: str, clock: Callable[[], float]
    ) -> None:
        self._database, self._repository, self._journal = database, repository, journal
        self._fleet, self._clock = fleet, clock
        self._lock = threading.RLock()
        self._read: tuple[bytes, Assignment] | None = None
        self._addresses: Addresses | None = None
        self._authorities: Authorities | None = None
        self.poker: Poker | None = None

    def signed(self) -> Assignment:
        """The assignment as it is signed now."""
        data = self._repository.assignment_bytes()
        read = self._read
        if read is None or read[0] != data:
            self._read = read = (data, read_assignment(data))
        return read[1]

    def tell(self, addresses: Addresses, *, anew: bool = False) -> bool:
        """Says where devices reach the server, from the next `publish` on; whether that is another place than they know. When the
        server began to say so (`since`) is found here; `anew`: it does now, though it is the same place as was signed last.
        """
        with self._lock:
            signed = self.signed()
            known = signed.addresses
            if known is not None and known.is_same_place(addresses) and not anew:
                return False
            since = max(self._clock(), known.since + 1 if known is not None else 0.0)
            self._addresses = msgspec.structs.replace(addresses, since=since)
            with self._database.session() as session:
                steps.next_version(session, at_least=signed.version + 1)
                self._journal.audit(
                    session, SERVER, "addresses.change", self._fleet, devices=addresses.device_url, broker=addresses.broker
                )
            return True

    def tell_authorities(self, authorities: Authorities | None) -> bool:
        """Says which CAs vouch for the server, from the next `publish` on; whether devices were told others before."""
        with self._lock:
            signed = self.signed()
            if authorities is None or authorities == signed.authorities:
                return False
            self._authorities = authorities
            with self._database.session() as session:
                steps.next_version(session, at_least=signed.version + 1)
            return True

    def publish(self) -> None:
        """Signs the assignment when the database makes a newer one necessary than is signed, and pokes every device."""
        with self._lock:
            with self._database.reading() as session:
                wanted = rows.assignment_version(session)
                if wanted <= self.signed().version:
                    return
                document = self._document(session, wanted)
            self._repository.assign(encode(document))
        if self.poker:
            self.poker.poke_all(wanted)

    def catch_up(self) -> bool:
        """Brings a database that is older than the signed assignment (restored from a backup) to what devices were told last;
        whether it had to.

        Otherwise every decision would get a version that devices have seen already, and no device would follow it. What is
        signed wins, above all what was withdrawn; a rollout of which only one side knows is over.
        """
        with self._lock, self._database.session() as session:
            signed = self.signed()
            if signed.version <= rows.assignment_version(session):
                return False
            for model, said in signed.models.items():
                self._adopt(session, model, said)
            steps.next_version(session, at_least=signed.version + 1)
            self._journal.audit(session, SERVER, "database.caught_up", self._fleet, assignment=signed.version)
            return True

    def _adopt(self, session: Session, model: str, said: ModelAssignment) -> None:
        row = steps.model_row(session, model)
        if row.release != said.release:
            older = row.release is not None and said.release is not None and row.release < said.release
            row.release, row.previous = said.release, row.release if older else None
        for number in said.withdrawn:
            if (release := session.get(ReleaseRow, (model, number))) is not None:
                release.withdrawn = True
        if row.previous in said.withdrawn:
            row.previous = None
        self._adopt_rules(session, model, said)
        known = {rollout.id for rollout in said.rollouts()}
        for active in session.scalars(select(RolloutRow).where(RolloutRow.model == model, RolloutRow.state.in_(rows.BEGUN))):
            if active.id not in known:
                reason = "the database was restored from an older backup"
                steps.apply(session, [active], Event.ABORT, self._clock(), reason=reason)

    @staticmethod
    def _adopt_rules(session: Session, model: str, said: ModelAssignment) -> None:
        told = {rules.stored(rule.scope): rule.release for rule in said.rules if rule.release is not None}
        for row in session.scalars(select(RuleRow).where(RuleRow.model == model)).all():
            if row.scope not in told:
                session.delete(row)
            elif row.release != told[row.scope]:
                row.release, row.previous = told[row.scope], None
            told.pop(row.scope, None)
        session.add_all(RuleRow(model=model, scope=scope, release=release, previous=None) for scope, release in told.items())

    def _document(self, session: Session, version: int) -> Assignment:
        models = {row.model: row for row in session.scalars(select(ModelRow))}
        told = of_models(session)
        return Assignment(
            fleet=self._fleet,
            version=version,
            format=format_of(told.values()),
            teams=teams.assigned(session, models),
            addresses=self._addresses or self.signed().addresses,
            authorities=self._authorities or self.signed().authorities,
            models=told,
        )

    def shortest_lease_s(self) -> float | None:
        """The shortest lease, in seconds, of a release that some device may be told to run; None when none has one."""
        with self._database.reading() as session:
            bases: list[ModelRow | RuleRow] = [*session.scalars(select(ModelRow)), *session.scalars(select(RuleRow))]
            refs = [(base.model, number) for base in bases for number in (base.release, base.previous)]
            for row in session.scalars(select(RolloutRow).where(RolloutRow.state.in_(rows.ACTIVE))):
                refs += [
                    (row.model, number) for number in (row.release, *(kept.release for kept in rows.as_assigned(row).kept))
                ]
            found = [session.get(ReleaseRow, (model, number)) for model, number in refs if number is not None]
            leases = [catalogue.summary_of(row).lease_s for row in found if row is not None]
        return min((lease for lease in leases if lease is not None), default=None)


def of_models(session: Session) -> dict[str, ModelAssignment]:
    """Model → what devices are told of it, by what the database says."""
    models = {row.model: row for row in session.scalars(select(ModelRow))}
    query = select(RolloutRow).where(RolloutRow.state.in_(rows.BEGUN), RolloutRow.scope == "")
    active, scoped = {row.model: row for row in session.scalars(query)}, rules.of_models(session)
    withdrawn: dict[str, list[int]] = {}
    for model, number in session.execute(select(ReleaseRow.model, ReleaseRow.version).where(ReleaseRow.withdrawn.is_(True))):
        withdrawn.setdefault(model, []).append(number)
    told = {
        model: ModelAssignment(
            release=models[model].release if model in models else None,
            rollout=rows.as_assigned(active[model]) if model in active else None,
            withdrawn=tuple(sorted(withdrawn.get(model, []))),
            rules=scoped.get(model, ()),
        )
        for model in sorted({*models, *active, *scoped})
    }
    excluded = exclusions.in_force(session, {model: one.named() for model, one in told.items()})
    return {model: msgspec.structs.replace(one, excluded=excluded.get(model, ())) for model, one in told.items()}
