"""`edge-fleet decide`: several may run, one leads. The leader judges rollouts, signs, certifies, and does what operators ask for.

A term begins with the lead and ends with it. Its parts are made anew each time and recover from the database as a server does that
was started, so that nothing of an earlier term is believed. Each writing transaction of a term checks its fencing number.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import ssl
import threading

from sqlalchemy.exc import SQLAlchemyError

from agent.common.systemd import notify
from agent.contract import addresses
from fleet_server import descriptors, housekeeping, listeners
from fleet_server.api.connections import Limits
from fleet_server.api.internal import Internal
from fleet_server.api.operator import app as operator_api
from fleet_server.api.tls import CIPHERS, ClientCertificateProtocol, Listener
from fleet_server.app import Fleet, locked
from fleet_server.broker import choice, sessions
from fleet_server.broker_host import BrokerHost
from fleet_server.config import FleetConfig, Folder, load
from fleet_server.devices.renewals import Renewals
from fleet_server.errors import FleetError, Unavailable
from fleet_server.metrics import Metrics, Sample
from fleet_server.processes import aside
from fleet_server.processes.common import CRL, Common, soon, until_signalled
from fleet_server.releases.delegations import ASSIGNMENTS
from fleet_server.releases.metadata_files import RepositoryDamaged
from fleet_server.releases.online_keys import ONLINE
from fleet_server.releases.repository import Repository
from fleet_server.running import LEASES_READ_S, RENEW_EVERY_S, RENEWALS_PER_LEASE, grouping_of, until_stopped
from fleet_server.status import software_version
from fleet_server.storage.database import Database, DatabaseError
from fleet_server.storage.documents import FolderDocuments, StoredDocuments, copy
from fleet_server.storage.leadership import Leadership
from fleet_server.timers import guarded, watchdog

_log = logging.getLogger(__name__)

CANDIDATE_EVERY_S = 0.5
AFTER_FAILURE_S = 5.0
"""After a term that could not begin: another process may be able to."""
FORGET_AFTER_S = 1.0
CONNECTIONS = 200


def decide(folder: Folder, *, metrics: str | None = None) -> None:
    """Runs until SIGTERM or SIGINT. `metrics`: HOST:PORT of a plain listener for health and metrics.

    Raises: ConfigError, Unavailable (locked, a port is taken, what several processes need is missing), DatabaseError.
    """
    config = load(folder)
    descriptors.raise_limit()
    if config.broker.kind == "rabbitmq":
        choice.check(config)
    with locked(folder):
        asyncio.run(Deciding(folder, config, metrics).run())


class Deciding:
    """One process that leads, or waits to."""

    def __init__(self, folder: Folder, config: FleetConfig, metrics: str | None) -> None:
        self._common = Common(folder, config, "decide")
        self._leadership = Leadership(self._common.database, self._common.id, config.decide.address)
        self._term: Term | None = None
        self._own = Metrics()
        leads, number = lambda: [Sample(self._leadership.leads)], lambda: [Sample(self._leadership.number or 0)]
        self._own.add("edge_fleet_leads", "1 while this process decides", leads)
        self._own.add("edge_fleet_fencing_number", "the number with which this process leads; 0 while it does not", number)
        self._said, self._is_migrated = "", False
        self._stop, self._wake = asyncio.Event(), asyncio.Event()
        self._aside = aside.listener(metrics, self._metrics, lambda: "") if metrics is not None else None
        self._common.detail = lambda: {"leads": self._leadership.leads, "number": self._leadership.number}

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        until_signalled(loop, self._stop)
        self._common.others.on_leader = soon(loop, self._wake.set)
        self._common.start()
        tasks = [asyncio.create_task(watchdog())]
        if self._aside is not None:
            sock = listeners.bind(self._aside.host, self._aside.port)
            tasks.append(asyncio.create_task(self._aside.run_aside(sock), name="listener"))
        try:
            notify("READY=1")  # who waits to lead is of use, too
            _log.info("ready: %s leads when nobody else does", self._common.id)
            while not self._stop.is_set():
                if await asyncio.to_thread(self._lead):
                    await self._serve_term()
                else:
                    await self._pause(CANDIDATE_EVERY_S)
        finally:
            notify("STOPPING=1")
            _log.info("stopping")
            if self._aside is not None:
                self._aside.should_exit = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(self._common.stop)

    def _metrics(self) -> str:
        """Of this process, and while it leads of all that the leader counts."""
        term = self._term
        return self._own.text() + (term.fleet.metrics.text() if term is not None else "")

    def _lead(self) -> bool:
        """Whether this process leads now. What keeps it from that is said once."""
        try:
            if not self._is_migrated:
                self._common.database.migrate()
                self._is_migrated = True
            led = self._leadership.take()
        except (SQLAlchemyError, DatabaseError, FleetError) as error:
            problem = str(error).partition("\n")[0]
            if problem != self._said:
                _log.warning("nobody can lead from here now: %s", problem)
            self._said = problem
            return False
        self._said = ""
        return led

    async def _serve_term(self) -> None:
        loop, lost = asyncio.get_running_loop(), asyncio.Event()
        self._leadership.hold(soon(loop, lost.set))
        number = self._leadership.number
        _log.warning("%s leads with number %s", self._common.id, number)
        database, failed = term_database(self._common, self._leadership), False
        try:
            self._term = term = await asyncio.to_thread(Term, self._common, database)
            await term.run(self._stop, lost)
        except (SQLAlchemyError, DatabaseError, FleetError, RepositoryDamaged, OSError) as error:
            failed = not lost.is_set() and not self._stop.is_set()
            (_log.error if failed else _log.warning)("the term with number %s ends: %s", number, error)
        finally:
            self._term = None
            await asyncio.to_thread(self._leadership.give_back)
            database.close()
            if lost.is_set():
                _log.error(
                    "%s led with number %s and leads no more: %s. It decides and signs nothing until it leads again",
                    self._common.id, number, self._leadership.lost_because,
                )  # fmt: skip
            self._common.others.tell_of_leader()
            self._common.pulse.beat()
        if failed:
            await self._pause(AFTER_FAILURE_S)

    async def _pause(self, seconds: float) -> None:
        self._wake.clear()
        stopped, woken = asyncio.ensure_future(self._stop.wait()), asyncio.ensure_future(self._wake.wait())
        _, pending = await asyncio.wait({stopped, woken}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for one in pending:
            one.cancel()


def term_database(common: Common, leadership: Leadership) -> Database:
    """The database of a term: each writing transaction checks that this process still leads."""
    database = common.new_database()
    database.at_beginning.append(leadership.check)
    return database


class Term:
    """What the leader does while it leads."""

    def __init__(self, common: Common, database: Database) -> None:
        """Recovers, in the calling thread.  Raises: FleetError, SQLAlchemyError, RepositoryDamaged, OSError."""
        self._common, self._config = common, common.config
        take_over_folder(common.folder, database)
        self.fleet = fleet = common.fleet(database, signs=True)
        use_trusted_keys(fleet.repository)
        self._models: set[str] = set()
        self._wake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listening: Listener | None = None
        self._broker = broker = of_broker(common, fleet)
        fleet.inventory.link, fleet.assignment.poker = broker, broker
        fleet.inventory.heard_since = common.others.heard_since
        fleet.inventory.on_crl = lambda: fleet.repository.documents.write(CRL, fleet.authority.crl.read_bytes())
        common.signals.on("models", self._hear_of_models)
        common.signals.on_again("models", lambda: self._hear_of_models(""))
        fleet.recover()

    async def run(self, stop: asyncio.Event, lost: asyncio.Event) -> None:
        """Until one of the two is set.  Raises: Unavailable when a port is taken, or the listener ended."""
        self._loop = asyncio.get_running_loop()
        listener = self._listening = self._listener()
        sock = listeners.bind(listener.host, listener.port)
        serving = asyncio.create_task(listener.run_aside(sock), name="listener")
        repeated = (self._ticks(), self._judging(), self._renewals(), self._housekeeping(), grouping_of(self.fleet).run())
        timers = [asyncio.create_task(one) for one in repeated]
        ended = asyncio.Event()
        either = [asyncio.create_task(_pass_on(one, ended)) for one in (stop, lost)]
        self._common.others.tell_of_leader()
        self._common.pulse.beat()
        try:
            self._broker.start()
            await until_stopped(ended, [serving])
        finally:
            listener.should_exit = True
            for task in (*timers, *either):
                task.cancel()
            await asyncio.gather(serving, *timers, *either, return_exceptions=True)
            await asyncio.to_thread(self._broker.stop)
            self._loop = None

    def _listener(self) -> Listener:
        fleet, decide = self.fleet, self._config.decide
        operators = operator_api.build(fleet, title=f"{self._config.fleet} fleet", version=software_version())
        authority = fleet.authority
        tls = {
            "ssl_certfile": authority.server_cert, "ssl_keyfile": authority.server_key, "ssl_ciphers": CIPHERS,
            "ssl_ca_certs": str(authority.ca_path), "ssl_cert_reqs": ssl.CERT_REQUIRED,
        }  # fmt: skip
        limits = Limits(total=CONNECTIONS, per_address=CONNECTIONS, per_device=CONNECTIONS)
        return listeners.listener(
            Internal(fleet, operators), decide.listen, decide.port, limits, "decide", http=ClientCertificateProtocol,
            proxy_headers=True, forwarded_allow_ips="*", **tls,
        )  # fmt: skip

    def _hear_of_models(self, model: str) -> None:
        """Rollouts of the model are to be judged anew; of all models, where it is not said."""
        loop = self._loop
        self._models.add(model)
        if loop is not None:
            loop.call_soon_threadsafe(self._wake.set)

    # -- timers ------------------------------------------------------------------------------------------------------------

    async def _judging(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            models, self._models = self._models, set()
            if models:
                asked = None if "" in models else models
                await guarded(functools.partial(self.fleet.judge.evaluate, asked), "rollouts could not be judged")

    async def _ticks(self) -> None:
        while True:
            await asyncio.sleep(self._config.rollouts.tick_s)
            await guarded(self.fleet.judge.evaluate, "rollouts could not be judged")

    async def _housekeeping(self) -> None:
        while True:
            await guarded(self.fleet.housekeeping.run, "what nobody needs could not be removed")
            await asyncio.sleep(housekeeping.EVERY_S)

    async def _renewals(self) -> None:
        expiry = self._config.expiry
        interval = min(RENEW_EVERY_S, min(expiry.assignments_s, expiry.snapshot_s, expiry.timestamp_s) / 8)
        while True:
            await asyncio.sleep(min(interval, LEASES_READ_S))
            await guarded(self._renew, "metadata could not be renewed")
            await guarded(self._renew_own, "the server's own certificates could not be renewed")

    def _renew_own(self) -> None:
        """Of this machine; those of the others are copied to them."""
        if self.fleet.authority.renew_own(self._config.own_names) and self._listening is not None:
            self._listening.renew()
            self._broker.renew()
            _log.warning(
                "the server's own certificates are new: copy them to the machines that answer and ingest, and restart those"
            )

    def _renew(self) -> None:
        lease_s = self.fleet.assignment.shortest_lease_s()
        if self.fleet.repository.renew(oldest_s=lease_s / RENEWALS_PER_LEASE if lease_s is not None else None):
            self._broker.poke_all(self.fleet.assignment.signed().version)


def of_broker(common: Common, fleet: Fleet) -> BrokerElsewhere | BrokerCluster:
    """Raises: Unavailable that says what is missing on this machine."""
    return BrokerCluster(common, fleet) if fleet.config.broker.kind == "rabbitmq" else BrokerElsewhere(common, fleet)


class BrokerCluster:
    """A cluster that the leader speaks with itself; it publishes, and others store."""

    def __init__(self, common: Common, fleet: Fleet) -> None:
        self._signals = common.signals
        self._host = BrokerHost(fleet, lambda _models: None, Renewals(fleet.inventory, fleet.enrolment), stores=False)

    def start(self) -> None:
        """Waits for nothing. With the connection all devices are poked: the one that led before may have left that to this one."""
        self._host.start()

    def stop(self) -> None:
        self._host.stop()

    def renew(self) -> None:
        self._host.renew()

    def poke_all(self, assignment_version: int) -> None:
        self._host.pokes.poke_all(assignment_version)

    def poke_device(self, device: str) -> None:
        self._host.poke_device(device)

    def admit(self, device: str) -> None:
        self._host.admit(device)

    def shut_out(self, device: str) -> None:
        self._signals.send("shut_out", device)  # for who answers devices
        self._host.shut_out(device)


class BrokerElsewhere:
    """What the leader asks of whoever runs the broker, by signals."""

    def __init__(self, common: Common, fleet: Fleet) -> None:
        self._signals, self._fleet = common.signals, fleet

    def start(self) -> None:
        """Who runs the broker started it."""

    def stop(self) -> None: ...

    def renew(self) -> None: ...

    def poke_all(self, assignment_version: int) -> None:
        del assignment_version  # who pokes reads it
        self._signals.send("poke_all")

    def poke_device(self, device: str) -> None:
        self._signals.send("poke", device)

    def admit(self, device: str) -> None:
        self._signals.send("admit", device)

    def shut_out(self, device: str) -> None:
        self._signals.send("shut_out", device)
        threading.Timer(FORGET_AFTER_S, self._forget, (device,)).start()

    def _forget(self, device: str) -> None:
        """Ends what the broker keeps of the device; for that one needs the key of the CA. Nothing depends on it."""
        host, port = addresses.split(self._fleet.config.broker_address)
        try:
            sessions.forget(device, self._fleet.authority, host, port)
        except (OSError, FleetError) as error:
            _log.warning("what the broker keeps for %s cannot be cleared now: %s", device, error)


def take_over_folder(folder: Folder, database: Database) -> None:
    """Moves what is signed from the folder into the database, the first time that this fleet's server is several processes."""
    if StoredDocuments.are_in(database):
        return
    here, stored = FolderDocuments(folder.repository), StoredDocuments(database)
    with stored.together():  # others begin when there is something, so all that they need is there then
        copied = copy(here, stored)
        if copied:
            stored.write(CRL, (folder.pki / CRL).read_bytes())
    if not copied:
        raise Unavailable(
            f"neither the database nor {folder.repository} has the fleet's signed metadata; restore it from a backup"
        )
    _log.warning(
        "what is signed (%d documents) is in the database from now on; %s is a copy of this moment", copied, folder.repository
    )


def use_trusted_keys(repository: Repository) -> None:
    """Raises: Unavailable when this machine does not have the keys that devices are told of."""
    root, targets = repository.root_role().signed, repository.targets_role().signed
    keyids = {role: (targets if role == ASSIGNMENTS else root).get_delegated_role(role).keyids for role in ONLINE}
    missing = [role for role in ONLINE if not repository.online.keys.holds(role, keyids[role])]
    if missing:
        raise Unavailable(
            f"the folder keys of this machine lacks the key in use for {', '.join(missing)}: copy it from the machine that led before",
            code="no_key",
        )
    repository.online.keys.adopt(keyids)


async def _pass_on(one: asyncio.Event, other: asyncio.Event) -> None:
    await one.wait()
    other.set()
