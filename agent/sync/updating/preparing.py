"""FETCHING: everything that this device needs of a release is brought into the store. Nothing here changes what `serve`
does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from agent.contract.fitting import needed_files
from agent.contract.manifest import File, Variant
from agent.contract.reasons import Reason
from agent.contract.reports import Hardware
from agent.store import Choice, Store, StoreError
from agent.sync.fetching.downloader import Downloader
from agent.sync.gates.variants import choose, passed_over
from agent.sync.ports import Releases, Signed
from agent.sync.problems import NoEngine, Problem, Stopped, store_problem
from agent.sync.updating.admission import Admission
from agent.sync.updating.endings import Endings
from agent.sync.updating.manifests import Manifests
from agent.sync.updating.model import AT_ONCE, ModelUpdate
from agent.sync.updating.quarantine import Quarantine
from agent.sync.updating.retention import Housekeeping
from agent.sync.updating.update import Event
from agent.sync.updating.wanted import WantedReleases


class Preparing:
    """Finds the signed manifest, chooses the variant for this device, and downloads the files that are missing."""

    def __init__(
        self,
        wanted: WantedReleases,
        admission: Admission,
        endings: Endings,
        manifests: Manifests,
        releases: Releases,
        downloader: Downloader,
        quarantine: Quarantine,
        housekeeping: Housekeeping,
        store: Store,
        hardware: Callable[[], Hardware],
    ) -> None:
        self._wanted = wanted
        self._admission = admission
        self._endings = endings
        self._manifests = manifests
        self._releases = releases
        self._downloader = downloader
        self._quarantine = quarantine
        self._housekeeping = housekeeping
        self._store = store
        self._hardware = hardware

    def step(self, one: ModelUpdate) -> float:
        if self._endings.overtaken(one):
            return AT_ONCE
        if (expired := self._wanted.expired(one.model)) is not None:
            return self._endings.put_off(one, expired)
        signed: Signed | None = None
        try:
            signed = self._proved_in_store(one) or self._releases.manifest(one.ref)
            known = self._quarantine.find(one.model, signed.manifest.version, signed.sha256)
            if known is not None:
                problem = Problem(Reason(known.reason), f"refused before: {known.message}", known.evidence)
                return self._endings.refuse(one, problem, signed.sha256)
            self._fetch(one, signed)
        except Problem as problem:
            if signed is None or problem.retryable:
                return self._endings.put_off(one, problem)
            return self._endings.refuse(one, problem, signed.sha256)
        except OSError as error:
            return self._endings.put_off(one, store_problem(error, f"fetching release {one.ref}"))
        except Stopped:
            return self._endings.given_up(one)
        return AT_ONCE

    def _fetch(self, one: ModelUpdate, signed: Signed) -> None:
        """Raises: Problem, Stopped, OSError."""
        manifest, hardware = signed.manifest, self._hardware()
        if not hardware.runtimes:
            raise NoEngine(Reason.NO_VARIANT, "no inference engine was found to work here: see `edge-agent doctor`")
        variant = choose(manifest, hardware)
        needed = needed_files(manifest, variant)
        wanted = [manifest.files[name] for name in needed]
        self._housekeeping.fetching(one.model, [file.sha256 for file in wanted])
        self._make_room(one, wanted)
        brought = self._download(one, wanted, manifest.acceptance.priority)
        self._store.write_manifest(signed.data, needed)
        self._note(one, signed, variant, hardware, wanted, brought)
        choice = Choice(version=manifest.version, variant=variant.name)
        event = Event.FETCHED_KNOWN if self._proved_here(one, signed, choice) else Event.FETCHED
        one.to(event, manifest=signed.sha256, variant=variant.name, waiting_for=None, retry_at=None, failure=None)
        self._housekeeping.need_selected(one.model, choice.version)
        self._housekeeping.fetched(one.model)

    def _make_room(self, one: ModelUpdate, wanted: Sequence[File]) -> None:
        """Raises: Problem NO_SPACE when the files do not fit even after all that is not needed was deleted; OSError."""
        if self._downloader.shortage_bytes(wanted) > 0:
            self._housekeeping.need_selected(one.model)
            self._housekeeping.collect(short_of_space=True)
            self._downloader.require_space(wanted)

    def _download(self, one: ModelUpdate, wanted: Sequence[File], priority: int) -> Counter[str]:
        """Gives how many bytes came from which source.  Raises: Problem, Stopped, OSError."""
        missing = self._downloader.missing(wanted)
        total, done = sum(file.size_bytes for file in missing) or 1, 0
        brought: Counter[str] = Counter()
        for file in missing:
            brought.update(
                self._downloader.fetch(file, _shows(one, done, total), lambda: self._endings.should_stop(one), priority)
            )
            done += file.size_bytes
        return brought

    def _note(
        self,
        one: ModelUpdate,
        signed: Signed,
        variant: Variant,
        hardware: Hardware,
        wanted: Sequence[File],
        brought: Counter[str],
    ) -> None:
        others = "; ".join(passed_over(signed.manifest, variant, hardware))
        one.note(
            "fetch",
            "passed",
            f"variant {variant.name!r}" + (f" ({others})" if others else ""),
            evidence={
                **{f"from {source}_bytes": count for source, count in sorted(brought.items())},
                "already_here_bytes": max(0, sum(file.size_bytes for file in wanted) - brought.total()),
                "manifest": signed.sha256,
            },
        )

    def _proved_in_store(self, one: ModelUpdate) -> Signed | None:
        """The target's manifest from our own store, for a hold: its signature was verified when it was stored, and it was
        committed here. So an operator can roll back without any network. What the fleet wants is always asked for anew.
        """
        if not self._wanted.held(one.model):
            return None
        try:
            signed = self._manifests.signed(one.ref)
        except StoreError:
            return None
        return signed if signed.sha256 in one.state.committed else None

    def _proved_here(self, one: ModelUpdate, signed: Signed, choice: Choice) -> bool:
        """Whether the trial may be skipped: this release was committed here, its file is intact, and it may serve right now."""
        if signed.sha256 not in one.state.committed or self._admission.why_not(one, signed.sha256) is not None:
            return False
        try:
            self._store.release(one.model, choice)
        except StoreError:
            return False
        return True


def _shows(one: ModelUpdate, done_bytes: int, total_bytes: int) -> Callable[[int], None]:
    """Shows how much of everything is there, from how much there is of one file."""

    def show(have_bytes: int) -> None:
        one.progress = min(1.0, (done_bytes + have_bytes) / total_bytes)

    return show
