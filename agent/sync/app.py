"""The composition root of `edge-agent sync`: everything is made and wired here, in this order, and ended in the reverse.

 1. the store, and a lock on it: two of us would undo each other's work;
 2. the identity: without it there is no fleet, and the command says so;
 3. the outbox, counters and reporter: from here on whatever happens can be told;
 4. trust, download, trial, the port to `serve`;
 5. an updater per model that was ever updated here, each in its own thread: a watch goes on while another model downloads,
    and an interrupted update goes on before the network is even asked;
 6. the follower, a thread that learns what the fleet wants: it asks at intervals and hears what pokes carry;
 7. the MQTT link, because nothing else needs it, and the mover, which follows a fleet server that moves.

The main thread reports and feeds the watchdog. Every thread but it may block on a network or a disk; all state is on disk
before it matters, so ending never waits for them.
"""

from __future__ import annotations

import logging
import threading

from agent.common import files, systemd
from agent.config import AgentConfig
from agent.contract.reasons import Reason
from agent.contract.reports import Phase
from agent.diary import Diary
from agent.host.boot import boot_id
from agent.host.clock import LastKnownGood, SignedClock, SystemClock
from agent.host.hardware import Probed
from agent.host.signals import Ending
from agent.store import Store, StoreError
from agent.sync import identity
from agent.sync.addresses import Known
from agent.sync.exclusive import exclusive
from agent.sync.fetching import factory
from agent.sync.fetching.imports import Imports
from agent.sync.fetching.mqtt import MqttBlobs, MqttDocuments, Transfers, sized
from agent.sync.fetching.sharing import Sharing
from agent.sync.fetching.spool import NoNetwork
from agent.sync.fleet import link, takeovers
from agent.sync.fleet.authorities import AuthorityFollower
from agent.sync.fleet.connecting import Connector
from agent.sync.fleet.counters import Counter
from agent.sync.fleet.deliveries import Deliveries
from agent.sync.fleet.moving import Mover
from agent.sync.fleet.outbox import Outbox
from agent.sync.fleet.renewal import Renewal, by_transfers
from agent.sync.fleet.reports import Reporter, Signer, model_states
from agent.sync.fleet.telemetry import Collector
from agent.sync.http import FleetHttp
from agent.sync.identity import Identity
from agent.sync.ports import Clock
from agent.sync.proxy import Way
from agent.sync.serving import ServeAway, ServeClient, ServeRefused
from agent.sync.trials.trial import TrialProcesses
from agent.sync.trust.client import Trust
from agent.sync.trust.follower import Follower
from agent.sync.trust.leases import Leases
from agent.sync.trust.metadata import Documents
from agent.sync.trust.pokes import place
from agent.sync.updating.device import Device
from agent.sync.updating.machine import Fleet, Machine
from agent.sync.updating.records import Records
from agent.sync.updating.worker import Workers

log = logging.getLogger(__name__)

GOODBYE_S = 3.0
"""How long an orderly end waits for threads. What they do is on disk already, so the rest may be cut off."""

REPORT_PAUSE_S = 0.2
"""Changes that come this close together share a report."""

LOOKS_PER_LEASE = 4
"""How often the fleet is asked within the shortest lease of a model, so that a few answers may be lost."""


class SyncApp:
    """`edge-agent sync`. Construct, then `run` in the main thread; or `start` and `stop` from a test."""

    def __init__(
        self, config: AgentConfig, who: Identity, store: Store, clock: Clock | None = None, *, networked: bool = True
    ) -> None:
        """`networked` False: only bundles are read, and nobody is told anything."""
        self._networked = networked
        self._config = config
        self._who = who
        self._store = store
        files.make_directory(store.private / "approvals", mode=0o700)  # ours, so that we can end what root gave
        known = LastKnownGood(store.private / "trust" / "clock.json", floor=who.not_before)
        self._clock = clock = SignedClock(clock or SystemClock(), known)
        self._due = threading.Event()
        self._hardware = Probed()
        settings, private = config.sync, store.private

        self.outbox = Outbox(private / "outbox.db")
        self._sessions = Counter(private / "session.json", clock)
        deliveries = Deliveries(clock)
        self._reporter = tells = Reporter(
            who.device, Signer(who.key), self.outbox, Counter(private / "counter.json", clock), clock, lambda: self._hardware.known,
            deliveries,
        )  # fmt: skip
        self._transfers = Transfers(
            lambda ask: self.link.ask(ask),  # noqa: PLW0108 - the link comes later
            lambda: self.link.connected,
            **sized(settings.bandwidth_limit_bytes_per_s),
        )
        self._connector = Connector(who, clock, way := Way.configured(settings))
        self._mover = Mover(who.folder, who.known, clock, place(who.device), self._connector.answers, self._has_moved)
        self._fleet_http = self._http()
        self._authorities = follows = AuthorityFollower(
            lambda: self._who, clock, place(who.device),
            lambda at: self.follower.look_by(at),  # noqa: PLW0108 - the follower comes later
            self._other_authorities,
        )  # fmt: skip
        self._renewal = Renewal(clock, self._http, by_transfers(self._transfers), self._mover.told, follows.wants_renewal)
        sources = factory.sources(settings, self._http, clock, who.ca_file, clock.unset, way)
        if settings.mqtt_transfers:
            sources.append(MqttBlobs(self._transfers))
        downloads = factory.downloader(
            store, settings, clock, [source for source in sources if networked or not source.metered]
        )
        self._imports = Imports(store, who.device, downloads.sources, self._tell)
        self._trust = Trust(private / "trust", who, self._fleet_http if networked else NoNetwork(), clock, self._ways)
        self.follower = Follower(
            self._trust,
            settings.poll_interval_s,
            self._fleet_said,
            self._renew_when_due if networked else lambda: None,
            at_most_s=lambda: self._workers.shortest_lease_s() / LOOKS_PER_LEASE,
            imported=lambda: self._imports.accept(self._trust.refresh),
            networked=networked,
            device=who.device,
        )
        self._serving = ServeClient(config.serve.socket)
        telemetry_s = settings.telemetry_interval_s if networked else 0.0
        self._telemetry = Collector(self._serving, tells, clock, telemetry_s, lambda: tells.restarts)
        self._records = Records.below(private)
        self._machine = Machine(
            Fleet(
                desired=lambda: self.follower.current,
                leases=Leases(private / "lease.json", clock, lambda: self.follower.current),
                deliveries=deliveries,
                teller=self,
                releases=self._trust,
            ),
            Device(
                boot=boot_id(),
                lives=Diary(config.diary_folder).read,
                hardware=self._hardware.get,
                engine_threads=config.serve.engine_threads,
            ),
            store,
            self._records,
            downloads,
            TrialProcesses(clock, settings.trial_socket, scratch=private / "scratch"),
            self._serving,
            settings,
            clock,
        )
        self._workers = Workers(self._machine.updater)
        self._sharing: Sharing | None = None
        self._follow = threading.Thread(target=self.follower.run, name="follower", daemon=True)
        self.link = link.Link(
            who.device,
            link.Broker(who.known.used.broker_host, who.known.used.broker_port, self._connector.tls, way),
            self.outbox,
            self._sessions.next,
            on_poke=self.follower.poked,
            on_change=self._link_changed,
            on_delivered=deliveries.delivered,
            on_blocks=self._transfers.received,
            busy=lambda: self._transfers.active,
            on_taken_over=self._taken_over,
        )
        self._shared: str | None = None
        """Why this device is taken for one of several with its identity."""

    # -- Teller: what updaters say ------------------------------------------------------------------------------------------

    def changed(self) -> None:
        self._due.set()

    def say(self, name: str, message: str, *, model: str, release: int | None = None, reason: str | None = None) -> None:
        log.info("model %s: %s: %s", model, name, message)
        try:
            self._reporter.event(name, message, model=model, release=release, reason=reason)
        except OSError as error:
            log.warning("the event could not be kept for the fleet: %s", error)

    def _tell(self, name: str, message: str) -> None:
        log.info("%s: %s", name, message)
        try:
            self._reporter.event(name, message)
        except OSError as error:
            log.warning("the event could not be kept for the fleet: %s", error)

    def _link_changed(self, connected: bool) -> None:
        self._mover.connected(connected)
        self._due.set()

    def _taken_over(self, certain: bool) -> None:
        try:
            takeovers.note(self._store.private, self._clock.wall(), certain=certain)
            found = takeovers.finding(self._store.private, self._clock.wall())
        except OSError as error:
            log.warning("the broker gave this device's place to another connection, which could not be noted: %s", error)
            return
        if found is None:
            return
        log.warning("%s", found)
        if self._shared is None:
            self._tell("identity-shared", found)
        self._shared = found

    # -- life ---------------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Works until SIGTERM or SIGINT. Only in the main thread."""
        with Ending() as ending:
            self._run(ending)

    def _run(self, ending: Ending) -> None:
        self.start()
        _notify("READY=1")
        beat_s = min(self._config.sync.heartbeat_s, systemd.watchdog_interval_s() or self._config.sync.heartbeat_s)
        last_report = float("-inf")
        while not ending.is_set():
            _notify("WATCHDOG=1")
            if self._due.is_set() or self._clock.monotonic() - last_report >= self._config.sync.heartbeat_s:
                last_report = self._clock.monotonic()
                self.report()
            self._pause(beat_s, ending)
        _notify("STOPPING=1")
        self.stop()

    def start(self) -> None:
        """Starts every thread; returns at once."""
        for model in self._records.states.models():
            self._workers.begin(model)
        self._fleet_said()
        self._follow.start()
        threading.Thread(target=self._probe, name="probe", daemon=True).start()
        if self._networked:
            self.link.start()
            threading.Thread(target=self._mover.run, name="mover", daemon=True).start()
            self._lend()

    def stop(self, timeout_s: float = GOODBYE_S) -> None:
        """Ends everything in an order in which nobody waits for the network."""
        if self._sharing is not None:
            self._sharing.stop()
        self._mover.stop()
        self.follower.stop()
        threads = [*self._workers.stop(), self._follow]
        end = self._clock.monotonic() + timeout_s
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, end - self._clock.monotonic()))
        self.report()
        self.link.stop(timeout_s)
        if all(not thread.is_alive() for thread in threads):
            self._trust.close()
            self.outbox.close()

    def report(self) -> None:
        """Tells the fleet how things stand."""
        self._due.clear()
        self._imports.tidy(self._busy_with)
        begun = self._clock.monotonic()
        try:
            status = self._serving.status()
        except (ServeAway, ServeRefused):
            status = None
        try:
            self._reporter.report(
                model_states(self._workers.updaters(), status, self._records.quarantine, self._store),
                status,
                self.follower.current,
                self.link.session,
                self._problem(),
                begun,
            )
        except OSError as error:
            log.warning("the state report could not be kept for the fleet: %s", error)
        self._telemetry.collect()

    # -- inside -------------------------------------------------------------------------------------------------------------

    def _fleet_said(self) -> None:
        """Makes sure that every model the fleet names has a worker, and wakes them all."""
        desired = self.follower.current
        for model in desired.models() if desired else ():
            self._workers.begin(model)
        self._mover.told(desired.assignment.addresses if desired else None)
        self._authorities.told(desired)
        self._workers.wake()
        self._due.set()

    def _lend(self) -> None:
        """Begins to lend to neighbours. A port that is taken must not keep this device from its updates."""
        settings = self._config.sync
        if not settings.neighbour_listen:
            return
        try:
            self._sharing = Sharing(self._store, self._clock, settings.neighbour_listen, settings.neighbour_limit_bytes_per_s)
        except (OSError, OverflowError) as error:
            log.warning("neighbours get nothing: cannot listen on %s: %s", settings.neighbour_listen, error)
            return
        self._sharing.start()

    def _renew_when_due(self) -> None:
        self._authorities.told(self.follower.current)
        self._who = self._renewal.renewed(self._who)

    def _ways(self) -> list[Documents]:
        """The ways to the fleet's documents while its server cannot be reached."""
        broker = [MqttDocuments(self._transfers)] if self._config.sync.mqtt_transfers and self.link.connected else []
        return [*broker, *self._imports.ways(), *([self._connector.unproven(self._fleet_http)] if self._networked else [])]

    def _busy_with(self, model: str, version: int) -> bool:
        """Whether the release may still have to be fetched."""
        desired = self.follower.current
        if desired is not None and desired.wanted(model).release != version:
            return False
        updater = self._workers.find(model)
        if updater is None or (state := updater.state).phase not in {Phase.STEADY, Phase.QUARANTINED}:
            return True
        if state.phase is Phase.QUARANTINED:
            return state.wanted != version
        try:
            selection = self._store.selection(model)
        except StoreError:
            return True
        return selection is None or selection.active.version != version

    def _problem(self) -> str | None:
        """The one thing that an operator should know first."""
        if self._shared is not None:
            self._shared = takeovers.finding(self._store.private, self._clock.wall())
        if self._shared is not None:
            return f"identity_shared: {self._shared}"
        problem = self.follower.problem
        if problem is not None and problem.reason is not Reason.DOWNLOAD_FAILED:
            return f"{problem.reason.value}: {problem.message}"
        if self.follower.current is not None and (refused := self.follower.current.contradicted()):
            names = ", ".join(map(str, refused))
            return (
                f"{Reason.WITHDRAWN.value}: the fleet wants {names}, which was withdrawn: this device refuses it until its publisher "
                "signs otherwise (edge-fleet reinstate)"
            )
        if (found := self._workers.problem()) is not None:
            return found
        return f"{problem.reason.value}: {problem.message}" if problem else None

    def _pause(self, seconds: float, ending: Ending) -> None:
        """Waits until something is due, the time has passed, or the process ends."""
        end = self._clock.monotonic() + seconds
        while not ending.is_set() and self._clock.monotonic() < end:
            if self._imports.news():
                self.follower.look_soon()
            if self._due.wait(min(REPORT_PAUSE_S, max(0.0, end - self._clock.monotonic()))):
                ending.wait(REPORT_PAUSE_S)
                return

    def _probe(self) -> None:
        """Finds out the hardware in a thread of its own: engines that start slowly must not keep the watchdog or the first
        report waiting.
        """
        self._hardware.get()
        self._due.set()

    def _http(self) -> FleetHttp:
        return self._connector.http(self._mover.known.used.device_url)

    def _other_authorities(self, change: str, dropped: bool) -> None:
        self._tell("ca-changed", change)
        if dropped:  # who was believed because of it is believed no more
            self.link.move(self.link.broker.host, self.link.broker.port)

    def _has_moved(self, known: Known) -> None:
        used = known.used
        self._fleet_http.point_at(used.device_url)
        self.link.move(used.broker_host, used.broker_port)
        self._tell("server-moved", f"the fleet server is found at {used.device_url}, broker {used.broker}, from now on")
        self.follower.look_soon()


def main(config: AgentConfig) -> None:
    """The whole life of the process.  Raises: StoreError, IdentityError, OSError before it has begun."""
    store = Store.create(config.store)
    with exclusive(store):
        SyncApp(config, identity.load(config.sync.identity), store).run()


def _notify(message: str) -> None:
    try:
        systemd.notify(message)
    except OSError as error:
        log.warning("systemd could not be told %s: %s", message, error)
