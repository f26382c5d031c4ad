"""The composition root: every part of a fleet server, made and wired. `running` starts the processes and sockets around them."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator

import msgspec
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from agent.contract.addresses import Addresses
from agent.contract.authorities import Authorities
from agent.contract.codec import convert
from fleet_server.access import Access
from fleet_server.api.health import Health
from fleet_server.config import FleetConfig, Folder
from fleet_server.devices.adoption import Adoption
from fleet_server.devices.ca_replacement import CaReplacement
from fleet_server.devices.enrolment import Enrolment
from fleet_server.devices.groups import Groups
from fleet_server.devices.inventory import Inventory
from fleet_server.devices.pki import Authority
from fleet_server.devices.survey import Survey
from fleet_server.devices.told import Told
from fleet_server.errors import Unavailable
from fleet_server.housekeeping import Housekeeping
from fleet_server.ingest.intake import Intake
from fleet_server.ingest.pokes import LONGEST_SPREAD_S
from fleet_server.journal import Journal
from fleet_server.live import Hub, SharedHub
from fleet_server.metrics import Metrics, Sample
from fleet_server.releases.catalogue import Catalogue
from fleet_server.releases.key_changes import KeyChanges
from fleet_server.releases.online_keys import NoKeys, OnlineKeys
from fleet_server.releases.repository import Repository
from fleet_server.releases.trust import Trust
from fleet_server.rollouts import group_uses
from fleet_server.rollouts.assignment import FleetAssignment
from fleet_server.rollouts.bundles import Bundles
from fleet_server.rollouts.commands import Rollouts
from fleet_server.rollouts.decisions import Decisions
from fleet_server.rollouts.evidence import Recorder
from fleet_server.rollouts.health import HealthRules
from fleet_server.rollouts.judging import Judge
from fleet_server.rollouts.retention import Retention
from fleet_server.rollouts.views import Views
from fleet_server.sign_in import SignIns, WrongTokens
from fleet_server.status import Status
from fleet_server.storage import once
from fleet_server.storage.blobs import Blobs
from fleet_server.storage.database import Database, DatabaseError
from fleet_server.storage.documents import Documents, FolderDocuments, StoredDocuments
from fleet_server.storage.object_store import shelf_of

_log = logging.getLogger(__name__)


SEVERAL = (
    "this fleet's server runs as several processes, and what it signs is in its database: run `edge-fleet decide`, `ingest` and `api`, not this. "
    "`edge-fleet gather FOLDER` makes one process of them again"
)


CA_OF_SEVERAL = (
    "this fleet's server runs as several processes, whose certificates stand on several machines: take this step with one process "
    "(docs/how-to/replace-the-ca.md)"
)


class Shared(msgspec.Struct, frozen=True):
    """What one of several processes is made with. `signs`: whether this one has the keys."""

    database: Database
    documents: StoredDocuments
    hub: SharedHub
    signs: bool


class Fleet:
    """Every part that works on one data folder, without the processes and sockets around them."""

    def __init__(
        self, folder: Folder, config: FleetConfig, clock: Callable[[], float] = time.time, *, shared: Shared | None = None
    ) -> None:
        """`shared`: what it is given as one of several processes.

        Raises: NotFound, Invalid (keys), DatabaseError; Unavailable when the fleet's server is several processes and this is none
        of them.
        """
        self.folder, self.config = folder, config
        self.metrics = Metrics()
        self.hub: Hub = shared.hub if shared is not None else Hub()
        self.database = shared.database if shared is not None else Database(folder.database_url(config), must_exist=True)
        self.database.at_beginning.append(once.check)
        documents: Documents = FolderDocuments(folder.repository)
        if shared is not None:
            documents = shared.documents
        elif self.database.is_shared and "documents" in self.database.tables() and StoredDocuments.are_in(self.database):
            raise Unavailable(SEVERAL, code="several_processes")
        self.authority = Authority(folder.pki)
        self.blobs = Blobs(shelf_of(folder, config.blobs), folder.uploads)
        keys = OnlineKeys.read(folder.keys) if shared is None or shared.signs else NoKeys()
        self.repository = Repository(documents, keys, config.expiry, clock)
        self.access = Access(self.database, clock, session_s=config.session_s)
        self.journal = Journal(self.database, self.hub, clock, events_kept=config.events_kept)
        self.sign_ins = SignIns(self.database, self.access, self.journal, clock)
        self.wrong_tokens = WrongTokens(self.database, self.journal, clock)
        self.inventory = Inventory(self.database, self.authority, self.repository, self.journal, config, clock)
        self.adoption = Adoption(self.database, self.authority, self.journal, clock)
        self.inventory.adopt = self.adoption.adopt
        self.survey = Survey(self.database, self.inventory, clock)
        self.groups = Groups(self.database, self.inventory, self.journal, clock)
        self.groups.named_by = group_uses.of
        self.enrolment = Enrolment(self.database, self.authority, self.repository, self.inventory, self.journal, config, clock)
        self.ca_replacement = CaReplacement(self.database, self.authority, self.inventory, self.journal, config, clock)
        self.ca_replacement.tell = self._tell_authorities
        if shared is not None:
            self.ca_replacement.impossible = CA_OF_SEVERAL
        self.key_changes = KeyChanges(self.repository, clock)
        self.trust = Trust(self.database, self.repository, self.key_changes, self.journal, clock)
        self.catalogue = Catalogue(self.database, self.repository, self.blobs, self.journal, clock)
        self.assignment = FleetAssignment(self.database, self.repository, self.journal, config.fleet, clock)
        decisions = Decisions(self.database, self.assignment, self.journal)
        self.judge = Judge(self.database, self.inventory, self.assignment, decisions, config.rollouts, clock)
        self.judge.health = convert(msgspec.to_builtins(config.health), HealthRules)
        self.recorder = Recorder(self.database)
        self.views = Views(self.database, self.inventory, self.judge.calendar, clock)
        self.rollouts = Rollouts(self.repository, self.inventory, self.journal, decisions, self.judge, self.views, clock)
        self.retention = Retention(decisions, self.catalogue, self.journal, config.keep.releases)
        self.bundles = Bundles(
            self.database, self.repository, self.inventory, self.survey, self.catalogue, self.assignment, self.blobs, self.journal,
            config.fleet, clock,
        )  # fmt: skip
        self.intake = Intake(self.database, self.journal, clock, config.rollouts.silence_s, config.telemetry)
        self.inventory.on_groups_changed = self.judge.evaluate
        self.status = Status(config, self.authority, self.repository, self.survey, self.intake, clock)
        self.status.restored = lambda: self.adoption.window
        self.status.authorities = self.ca_replacement.warnings
        self.status.database_problem = lambda: self.database.problem
        self.status.stalled = self.views.stalled
        self.status.refusals = self.views.refusals
        self.told = Told(self.database, config.telemetry, clock)
        self.housekeeping = Housekeeping(
            self.blobs, self.catalogue, self.retention, self.journal, config.keep, clock, self.told
        )
        self._count()

    def _count(self) -> None:
        self.ca_replacement.count(self.metrics)
        add, database = self.metrics.add, self.database
        refused = "transactions that the database did not take"
        add("edge_fleet_database_refused_total", refused, lambda: [Sample(database.refused)])
        add("edge_fleet_database_ok", "1 when the last transaction was stored", lambda: [Sample(not database.problem)])
        files, pending = "files that were uploaded and no release names yet", self.blobs.pending
        add("edge_fleet_pending_uploads", files, lambda: [Sample(pending.held()[0])])
        add("edge_fleet_pending_uploads_bytes", f"bytes of {files}", lambda: [Sample(pending.held()[1])])
        removed = self.housekeeping.removed
        add(
            "edge_fleet_removed_total",
            "what was removed because nobody needs it",
            lambda: [Sample(removed[what], {"what": what}) for what in ("uploads", "releases", "events", "audit", "figures")],
        )
        outcomes = self.sign_ins.outcomes
        add(
            "edge_fleet_sign_ins_total",
            "attempts to open a browser session, by outcome",
            lambda: [Sample(outcomes[one], {"outcome": one}) for one in ("opened", "denied", "throttled")],
        )
        wrong = self.wrong_tokens.outcomes
        add(
            "edge_fleet_wrong_tokens_total",
            "requests with an access token that is not known or was revoked, by outcome",
            lambda: [Sample(wrong[one], {"outcome": one}) for one in ("denied", "throttled")],
        )

    def recover(self) -> None:
        """Makes good what an interrupted server left, so that disk, database and signed documents say the same."""
        self.database.migrate()
        self.ca_replacement.recover()
        if self.key_changes.finish():
            _log.warning("a change of keys that was interrupted is complete now")
        self.repository.check()
        for ref in self.catalogue.reconcile():
            _log.warning("release %s was published but not indexed; it is now", ref)
        if self.assignment.catch_up():
            _log.warning("the database is older than what is signed (a backup?); it was brought to what devices were told last")
        if self.assignment.tell(self.addresses()):
            _log.warning("devices are told to come to %s, broker %s", self.config.device_url, self.config.broker_address)
        self.assignment.tell_authorities(self.authority.told())
        self.assignment.publish()
        self.repository.renew()

    def _tell_authorities(self, authorities: Authorities | None) -> None:
        if self.assignment.tell_authorities(authorities):
            self.assignment.publish()

    def addresses(self) -> Addresses:
        """Where devices are to reach this server."""
        spread_s = round(self.survey.count().total / self.config.looks_per_s, 3)
        return Addresses(
            device_url=self.config.device_url, broker=self.config.broker_address, spread_s=min(LONGEST_SPREAD_S, spread_s)
        )

    def health(self) -> Health:
        """Whether requests may be sent here: nobody can be answered without the database."""
        try:
            with self.database.reading() as session:
                session.execute(select(1))
        except (SQLAlchemyError, DatabaseError) as error:
            return Health(False, f"the database does not answer: {type(error).__name__}")
        return Health(True, "")

    def close(self) -> None:
        self.database.close()


@contextlib.contextmanager
def locked(folder: Folder, name: str | None = None) -> Iterator[None]:
    """Keeps every other server off the folder; with a `name`, of this kind.  Raises: Unavailable naming the one that has it."""
    try:
        fd = os.open(folder.root / name if name is not None else folder.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Unavailable(f"{folder.root} cannot be used: {error}") from error
    with os.fdopen(fd, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read().strip() or "unknown"
            raise Unavailable(
                f"another edge-fleet (process {holder}) works on {folder.root}; stop it first", code="locked"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
