"""One model's updater with everything around it real or in memory: store, states and quarantine on disk, a fake `serve`, scripted trials."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

from agent.config import SyncSettings
from agent.contract.acceptance import ShadowRules
from agent.contract.assignment import Assignment, DeviceRecord, ModelAssignment, Retry, Rollout
from agent.contract.codec import encode
from agent.contract.manifest import ReleaseManifest
from agent.contract.names import ReleaseRef
from agent.contract.reasons import Reason
from agent.contract.reports import Hardware, Phase
from agent.lives import Life
from agent.store import Store
from agent.sync.fetching.downloader import Downloader
from agent.sync.fleet.deliveries import Deliveries
from agent.sync.ports import Signed
from agent.sync.problems import Problem
from agent.sync.serving import (
    CanaryStatus,
    Failed,
    Latency,
    ModelStatus,
    ServeAway,
    ServeRefused,
    ServeStatus,
    ShadowStatus,
    VersionStats,
    VersionStatus,
)
from agent.sync.trust.desired import Desired
from agent.sync.trust.leases import Leases
from agent.sync.updating.device import Device
from agent.sync.updating.machine import Fleet, Machine
from agent.sync.updating.records import Records
from tests.sync.blobs import MemoryBlobs
from tests.sync.conftest import FakeClock
from tests.sync.fleet import DAY, DEVICE, FLEET, script_release, sha

MODEL = "crane"
BOUNDS = (0.1, 1.0, 10.0, 100.0)


class MemoryServe:
    """ServingPort in memory. `fault` is asked before every call and may raise."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.away = False
        self.calls: list[tuple[str, int | None]] = []
        self.fault: Callable[[str, int | None], None] = lambda _action, _version: None
        self.numbers: dict[int, VersionStats] = {}
        self.lives = 0
        self.agent_version = "0.1.0"
        self.boot = "boot-1"
        self.diary: list[Life] = []
        self.start()

    def start(self) -> None:
        """Begins (anew); the life before, if it did not `end`, was a crash or went with its machine."""
        self.lives += 1
        self.diary.append(Life(instance=f"life-{self.lives}", boot=self.boot))
        self.active: dict[str, int | None] = {}
        self.previous: dict[str, int | None] = {}
        self.loaded: dict[str, dict[int, str]] = {}
        self.shadows: dict[str, int] = {}
        self.canaries: dict[str, CanaryStatus] = {}
        for model, selection in self.store.selections().items():
            self.bring(model, selection.active.version, selection.active.variant)  # type: ignore[union-attr]
            self.active[model] = selection.active.version  # type: ignore[union-attr]

    def end(self) -> None:
        """Ends in order."""
        self.diary[-1] = Life(instance=f"life-{self.lives}", boot=self.boot, ended=True)
        self.away = True

    def restart(self) -> None:
        self.end()
        self.away = False
        self.start()

    def _call(self, action: str, version: int | None) -> None:
        if self.away:
            raise ServeAway("serve does not answer", sent=False)
        if action not in ("status", "shadow numbers"):
            self.calls.append((action, version))
        self.fault(action, version)

    def bring(self, model: str, version: int, variant: str) -> None:
        release = self.store.release(model, _choice(version, variant))
        self.loaded.setdefault(model, {})[version] = release.manifest.files[release.variant.file].sha256

    def status(self) -> ServeStatus:
        self._call("status", None)
        models = {
            model: ModelStatus(
                active=self.active.get(model),
                canary=self.canaries.get(model),
                previous=self.previous.get(model),
                versions={
                    str(v): VersionStatus(
                        version=v, variant="cpu", state="READY", sha256=digest, stats=self.numbers.get(v, VersionStats())
                    )
                    for v, digest in versions.items()
                },
            )
            for model, versions in self.loaded.items()
        }
        return ServeStatus(f"life-{self.lives}", self.agent_version, models)

    def load(self, model: str, version: int, variant: str) -> VersionStatus:
        self._call("load", version)
        self.bring(model, version, variant)
        return VersionStatus(version=version, variant=variant, state="READY", sha256=self.loaded[model][version])

    def activate(self, model: str, version: int) -> None:
        self._call("activate", version)
        if version not in self.loaded.get(model, {}):
            raise ServeRefused(409, "not_loaded", f"version {version} is not loaded")
        self.shadows.pop(model, None)
        self.canaries.pop(model, None)
        if self.active.get(model) != version:
            self.previous[model], self.active[model] = self.active.get(model), version

    def activate_team(self, versions: Mapping[str, int | None]) -> None:
        self._call("activate_team", None)
        for model, version in versions.items():
            if version is not None and version not in self.loaded.get(model, {}):
                raise ServeRefused(409, "not_loaded", f"version {version} of {model} is not loaded")
        for model, version in versions.items():
            if version is None:
                self._forget(model)
            elif self.active.get(model) != version:
                self.previous[model], self.active[model] = self.active.get(model), version

    def swap(self, model: str, version: int, variant: str) -> None:
        self._call("swap", version)
        self.bring(model, version, variant)
        self.active[model], self.previous[model] = version, None
        self.loaded[model] = {version: self.loaded[model][version]}

    def rollback(self, model: str, version: int) -> None:
        self._call("rollback", version)
        self.canaries.pop(model, None)
        self.bring(model, version, "cpu")
        self.active[model], self.previous[model] = version, None
        self.loaded[model] = {version: self.loaded[model][version]}

    def commit(self, model: str) -> None:
        self._call("commit", None)
        self.previous[model] = None
        active = self.active[model]
        assert active is not None
        self.loaded[model] = {active: self.loaded[model][active]}

    def unload(self, model: str, version: int | None = None) -> None:
        self._call("unload", version)
        if model not in self.loaded:
            raise ServeRefused(404, "unknown_model", f"no model {model!r}")
        if version is not None:
            self.loaded[model].pop(version, None)
            self.shadows.pop(model, None)
            return
        self._forget(model)

    def _forget(self, model: str) -> None:
        for memory in (self.loaded, self.active, self.previous):
            memory.pop(model, None)  # type: ignore[attr-defined]

    def shadow(self, model: str, version: int, rules: ShadowRules) -> ShadowStatus:
        self._call("shadow", version)
        if version not in self.loaded.get(model, {}):
            raise ServeRefused(409, "not_loaded", f"version {version} is not loaded")
        self.shadows[model] = version
        self.compared = ShadowStatus(state="running", version=version)
        return self.compared

    def shadow_numbers(self, model: str) -> ShadowStatus:
        self._call("shadow numbers", None)
        return self.compared if model in self.shadows else ShadowStatus()

    def canary(self, model: str, version: int, share: float) -> None:
        self._call("canary", version)
        self.canaries.pop(model, None)
        if share:
            self.canaries[model] = CanaryStatus(version=version, share=share)


def numbers(ok: int = 0, *, invalid: int = 0, run: int = 0, slow: int = 0) -> VersionStats:
    return VersionStats(
        requests=ok + invalid + run,
        ok=ok,
        failed=Failed(invalid=invalid, run=run),
        latency=Latency(bounds_ms=BOUNDS, counts=(ok - slow, 0, 0, slow, 0)),
    )


def _choice(version: int, variant: str):
    from agent.store import Choice

    return Choice(version=version, variant=variant)


class Killed(BaseException):
    """The process died here."""


class Bench:
    """Drives `step` by step; `again()` is a new process on the same disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store.create(folder / "store")
        self.clock = FakeClock()
        self.serve = MemoryServe(self.store)
        self.source = MemoryBlobs(b"")
        self.source.read = self._read  # type: ignore[method-assign]
        self.blobs: dict[str, bytes] = {}
        self.signed: dict[ReleaseRef, Signed] = {}
        self.manifest_problem: Problem | None = None
        self.trial: Callable[..., dict] = lambda *_: {}
        self.queue: Callable[..., None] = lambda _stop: None
        """Where a trial waits for its turn."""
        self.tried: list[str] = []
        self.news: list[str] = []
        self.reports = 0
        self.groups: tuple[str, ...] = ()
        self.retries: tuple[Retry, ...] = ()
        self.assignment = Assignment(fleet=FLEET, version=0, models={})
        self.valid_s = 7 * DAY
        self.known = False
        self.metadata = "then"
        self.deliveries = Deliveries(self.clock)
        self.link_up = False
        self.hardware = Hardware(arch="x86_64", runtimes={"script": "script 1.0"})
        self.settings = SyncSettings(disk_reserve_bytes=0, keep_releases=2)
        self.again()

    @property
    def boot(self) -> str:
        return self.serve.boot

    @boot.setter
    def boot(self, boot: str) -> None:
        self.serve.boot = boot

    def again(self) -> None:
        """The process starts (again)."""
        self.records = Records.below(self.store.private)
        self.leases = Leases(self.store.private / "lease.json", self.clock, self.desired)
        self.downloader = Downloader(self.store, [self.source], self.clock, reserve_bytes=0, min_bytes_per_s=1)
        self.machine = Machine(
            fleet=Fleet(desired=self.desired, leases=self.leases, deliveries=self.deliveries, teller=self, releases=self),
            device=Device(boot=self.boot, lives=lambda: tuple(self.serve.diary), hardware=lambda: self.hardware),
            store=self.store,
            records=self.records,
            downloader=self.downloader,
            trials=self,
            serving=self.serve,
            settings=self.settings,
            clock=self.clock,
            jitter=lambda: 1.0,
        )
        self.updater = self.machine.updater(MODEL)

    # -- what the fleet says ------------------------------------------------------------------------------------------------

    def release(self, version: int, script: str = "scale 1", **options) -> ReleaseManifest:
        manifest, contents = script_release(self.folder / "releases", version, f"{script} # {version}", **options)
        self.blobs |= {sha(data): data for data in contents.values()}
        data = encode(manifest)
        self.signed[manifest.ref] = Signed(data, sha(data), manifest)
        return manifest

    def want(self, release: int | None, *, rollout: Rollout | None = None, withdrawn: tuple[int, ...] = ()) -> None:
        models = {MODEL: ModelAssignment(release=release, rollout=rollout, withdrawn=withdrawn)}
        self.assignment = Assignment(fleet=FLEET, version=self.assignment.version + 1, models=models)
        self.verified_at, self.known = self.clock.wall(), True

    def desired(self) -> Desired | None:
        if not self.known:
            return None
        record = DeviceRecord(
            fleet=FLEET,
            device=DEVICE,
            serial=1,
            groups=self.groups,
            retries=self.retries,
            issued=self.verified_at,
            expires=self.verified_at + self.valid_s,
        )
        return Desired(
            issued=self.verified_at,
            heard_at=self.verified_at,
            assignment=self.assignment,
            record=record,
            verified_at=self.verified_at,
            metadata=self.metadata,
            valid_until=self.verified_at + self.valid_s,
        )

    # -- ports --------------------------------------------------------------------------------------------------------------

    def manifest(self, ref: ReleaseRef) -> Signed:
        if self.manifest_problem:
            raise self.manifest_problem
        if ref not in self.signed:
            raise Problem(Reason.WRONG_RELEASE, f"{ref} is not signed")
        return self.signed[ref]

    @contextlib.contextmanager
    def _read(self, sha256: str, start: int, end: int):
        self.source.asked.append((start, end))
        if sha256 not in self.blobs:
            raise Problem(Reason.DOWNLOAD_FAILED, "no such blob")
        self.source.on_chunk()
        yield start, iter([self.blobs[sha256][start:end]])

    def run(self, request, timeout_s, stop, begins):
        self.queue(stop)
        begins()
        self.tried.append(request.release)
        return self.trial(request, timeout_s, stop)

    def changed(self) -> None:
        self.reports += 1

    def say(self, name: str, message: str, *, model: str, release: int | None = None, reason: str | None = None) -> None:
        self.news.append(name)

    # -- driving ------------------------------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        return self.updater.state.phase

    @property
    def serving(self) -> int | None:
        return self.serve.active.get(MODEL)

    def deliver(self) -> None:
        """A report of this moment reaches the broker."""
        self.deliveries.put(1, self.clock.monotonic())
        self.deliveries.delivered(1)

    def step(self) -> float:
        if self.link_up:
            self.deliver()
        delay = self.updater.step(lambda: False)
        self.clock.pass_(max(delay, 0.01))
        return delay

    def until(self, *phases: Phase, steps: int = 400) -> list[Phase]:
        """Steps until the phase is one of these; the phases on the way."""
        seen = [self.phase]
        for _ in range(steps):
            if self.phase in phases:
                return seen
            self.step()
            if self.phase is not seen[-1]:
                seen.append(self.phase)
        raise AssertionError(f"still {self.phase.value}, seen {[p.value for p in seen]}: {self.updater.problem}")

    def install(self, version: int, **options) -> None:
        """From the beginning to committed."""
        self.release(version, **options)
        self.want(version)
        self.step()
        self.until(Phase.STEADY)
        self.step()
        assert self.serving == version

    @property
    def answer(self):
        return self.updater.state.answers[-1]
