"""The phases of an update, made of what they need, and the updaters of this device's models."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from agent.config import SyncSettings
from agent.contract.reports import Phase
from agent.store import Store
from agent.sync.fetching.downloader import Downloader
from agent.sync.ports import Clock, Deliveries, Releases, Teller
from agent.sync.serving import ServingPort
from agent.sync.trials.trial import Trials
from agent.sync.trust.desired import Desired
from agent.sync.trust.leases import Leases
from agent.sync.updating.admission import Admission
from agent.sync.updating.canarying import Canarying
from agent.sync.updating.device import Device
from agent.sync.updating.endings import Endings
from agent.sync.updating.manifests import Manifests
from agent.sync.updating.model import ModelUpdate
from agent.sync.updating.preparing import Preparing
from agent.sync.updating.records import Records
from agent.sync.updating.resting import Resting
from agent.sync.updating.retention import Housekeeping
from agent.sync.updating.rollingback import RollingBack
from agent.sync.updating.selected import Selected
from agent.sync.updating.shadowing import Shadowing
from agent.sync.updating.stopping import Stopping
from agent.sync.updating.switching import Switching
from agent.sync.updating.team import Teams
from agent.sync.updating.trialing import Trialing
from agent.sync.updating.updater import ModelUpdater, Step
from agent.sync.updating.waiting import Waiting
from agent.sync.updating.wanted import WantedReleases
from agent.sync.updating.watching import Watching


@dataclass(frozen=True)
class Fleet:
    """What is heard from the fleet, and told to it."""

    desired: Callable[[], Desired | None]
    leases: Leases
    deliveries: Deliveries
    teller: Teller
    releases: Releases


class Machine:
    """Everything that brings releases to serve on this device; one for all its models."""

    def __init__(
        self,
        fleet: Fleet,
        device: Device,
        store: Store,
        records: Records,
        downloader: Downloader,
        trials: Trials,
        serving: ServingPort,
        settings: SyncSettings,
        clock: Clock,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._records = records
        self._teller = fleet.teller
        self._clock = clock
        self.housekeeping = housekeeping = Housekeeping(store, settings.keep_releases, records.holds.held)
        manifests = Manifests(store)
        wanted = WantedReleases(fleet.desired, records.holds, device.hardware, clock)
        admission = Admission(wanted, manifests, records.approvals, fleet.leases, settings, clock)
        endings = Endings(wanted, admission, records.quarantine, housekeeping, clock, jitter)
        selected = Selected(store, serving, housekeeping)
        self.teams = teams = Teams(records.states, store, fleet.teller, clock, wanted, endings)
        self._stopping = Stopping(admission, selected, teams, store, serving)
        resting = Resting(wanted, selected, records.quarantine, records.approvals, housekeeping, serving, clock)
        preparing = Preparing(
            wanted,
            admission,
            endings,
            manifests,
            fleet.releases,
            downloader,
            records.quarantine,
            housekeeping,
            store,
            device.hardware,
        )
        trialing = Trialing(admission, endings, manifests, trials, store, settings, device.engine_threads)
        waiting = Waiting(wanted, admission, endings, teams, selected, records.quarantine, fleet.deliveries, serving, clock)
        shadowing = Shadowing(wanted, admission, endings, serving, settings, device)
        canarying = Canarying(wanted, admission, endings, manifests, serving, settings, clock, device)
        switching = Switching(wanted, admission, teams, manifests, serving, fleet.deliveries, settings, clock, device)
        rolling_back = RollingBack(teams, records.quarantine, housekeeping, serving, clock, jitter)
        watching = Watching(
            wanted,
            admission,
            teams,
            rolling_back,
            manifests,
            housekeeping,
            serving,
            fleet.deliveries,
            fleet.teller,
            settings,
            clock,
            device,
        )
        self._steps: Mapping[Phase, Step] = {
            Phase.STEADY: resting.step,
            Phase.QUARANTINED: resting.step,
            Phase.FETCHING: preparing.step,
            Phase.TRIALING: trialing.step,
            Phase.SHADOWING: shadowing.step,
            Phase.WAITING: waiting.step,
            Phase.CANARYING: canarying.step,
            Phase.ACTIVATING: switching.step,
            Phase.WATCHING: watching.step,
            Phase.ROLLING_BACK: rolling_back.step,
        }

    def updater(self, model: str) -> ModelUpdater:
        """An updater that goes on where the model's stored state says. One of a model at a time.  Raises: OSError."""
        one = ModelUpdate(model, self._records, self._teller, self._clock)
        if one.state.phase is Phase.FETCHING or one.state.waiting_for == "retry":
            self.housekeeping.fetching(model, None)
        self.teams.add(one)
        return ModelUpdater(one, self._steps, self._stopping.step, self._records.holds, self.teams.lock)
