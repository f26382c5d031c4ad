"""Whether a release may serve now, and on which way it comes to serve."""

from __future__ import annotations

import datetime as dt
from typing import Literal

from agent.config import SyncSettings
from agent.contract.acceptance import Acceptance
from agent.contract.names import ReleaseRef
from agent.contract.reasons import Reason
from agent.store import StoreError
from agent.sync.gates import windows
from agent.sync.ports import Clock
from agent.sync.trust.leases import Leases
from agent.sync.updating.approvals import Approvals
from agent.sync.updating.journal import Gate
from agent.sync.updating.manifests import Manifests
from agent.sync.updating.model import ModelUpdate
from agent.sync.updating.update import Event, Failure, WaitsFor
from agent.sync.updating.wanted import WantedReleases

WhyNot = Literal["shadow", "overtaken"] | WaitsFor
"""Why a release may not serve right now. shadow: its rollout only wants it to run on copies of requests. overtaken: something
else is wanted since this step began. The others: what it waits for."""


class Admission:
    """Knows the rules for what is new here: approvals, windows, leases, and the gates that the release itself asks for."""

    def __init__(
        self,
        wanted: WantedReleases,
        manifests: Manifests,
        approvals: Approvals,
        leases: Leases,
        settings: SyncSettings,
        clock: Clock,
    ) -> None:
        self._wanted = wanted
        self._manifests = manifests
        self._approvals = approvals
        self._leases = leases
        self._settings = settings
        self._clock = clock

    def why_not(self, one: ModelUpdate, manifest: str | None = None) -> WhyNot | None:
        """None when the target may serve right now. `manifest`: the sha256 of its manifest, while the state has none yet.

        Windows and approvals of this device are about what is new: going back, leaving what was withdrawn, and what is held by
        hand do not wait for them.
        """
        desired = self._wanted.desired
        wanted = self._wanted.by(desired, one.model)
        if wanted is None:
            return None
        if wanted.release != one.state.target:
            return "overtaken"
        if wanted.mode == "shadow":
            return "shadow"
        manifest = manifest or one.state.manifest
        new = not self._wanted.held(one.model) and not self._goes_back(one, manifest)
        if new and self._asks_first(one) and not self._approvals.given(one.model, one.version, manifest):
            return "approval"
        local = dt.datetime.fromtimestamp(self._clock.wall()).astimezone()
        if not windows.is_open(wanted.window, local) or (new and not windows.any_open(self._settings.windows, local)):
            return "window"
        return "team" if self._wanted.team(one, desired) is not None else None

    def note_waiting(self, one: ModelUpdate, waits_for: WaitsFor) -> None:
        """Notes what the target waits for, once it has passed its trial."""
        gates: dict[str, Gate] = {"approval": "approval", "window": "window", "team": "team"}
        if waits_for in gates:
            message = "waits for `edge-agent approve`" if waits_for == "approval" else "waits"
            one.note(gates[waits_for], "waits", message)

    def shadows_first(self, one: ModelUpdate) -> bool:
        """Whether the release asks to run on copies of requests before it may serve, and something serves that has such
        requests.
        """
        shadowed = one.state.shadowed
        if shadowed is not None and shadowed.verdict != "running":
            return False
        rules = self.acceptance(one).shadow
        return rules is not None and rules.required and self._is_new(one)

    def to_serve(self, one: ModelUpdate, event: Event) -> Event:
        """`event`, or TO_CANARY where the release asks for a share of the requests first and something serves the others."""
        return Event.TO_CANARY if self.acceptance(one).canary is not None and self._is_new(one) else event

    def lease_over(self, one: ModelUpdate, version: int) -> Failure | None:
        """Why the release may not serve now although nothing is wrong with it; None when it may. Its lease is kept in
        `one.lease_s`.
        """
        try:
            one.lease_s = self._manifests.get(ReleaseRef(one.model, version)).acceptance.lease_s
        except StoreError:
            one.lease_s = None
        why_not = self._leases.over(one.lease_s) if one.lease_s is not None else None
        return Failure(reason=Reason.LEASE_ENDED, message=f"release {version}: {why_not}") if why_not else None

    def lease_of_either_over(self, one: ModelUpdate) -> Failure | None:
        """Why one of the two that answer requests may not serve: the target, or the release before. The shorter lease is in
        `one.lease_s`.
        """
        over, leases = [], []
        for version in (one.version, *([one.state.before.version] if one.state.before else [])):
            over.append(self.lease_over(one, version))
            leases.append(one.lease_s)
        one.lease_s = min((lease_s for lease_s in leases if lease_s is not None), default=None)
        return next((failure for failure in over if failure is not None), None)

    def lease_ran_out(self, one: ModelUpdate) -> bool:
        """Whether what serves has to stop, while one step takes long: a download waits for its hour, or trickles."""
        return one.selected_lease_s is not None and self._leases.over(one.selected_lease_s) is not None

    def acceptance(self, one: ModelUpdate) -> Acceptance:
        """What the target's publisher demands; the defaults when its manifest was damaged on disk meanwhile."""
        try:
            return self._manifests.get(one.ref).acceptance
        except StoreError as error:
            one.problem = str(error)
            return Acceptance()

    def _asks_first(self, one: ModelUpdate) -> bool:
        if self._settings.approval == "always":
            return True
        try:
            return self._manifests.get(one.ref).acceptance.approval
        except StoreError:
            return False

    def _is_new(self, one: ModelUpdate) -> bool:
        return (
            one.state.before is not None and not self._wanted.held(one.model) and not self._goes_back(one, one.state.manifest)
        )

    def _goes_back(self, one: ModelUpdate, manifest: str | None) -> bool:
        """Whether the target is an older release that was committed here, or what serves may not serve any more."""
        before = one.state.before
        if before is None:
            return False
        if self._wanted.withdrawn(one.model, before.version):
            return True
        return before.version > one.version and manifest in one.state.committed
