"""Everything before a release may serve: fetching, trying, waiting. Nothing here changes what `serve` does."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Literal

from agent.contract.reasons import Reason
from agent.contract.reports import Outcome
from agent.store import Choice, StoreError
from agent.sync.gates import windows
from agent.sync.gates.variants import choose, needed_files, passed_over
from agent.sync.ports import Signed
from agent.sync.problems import NoEngine, Problem, Stopped, store_problem
from agent.sync.trials.trial import make_request
from agent.sync.updating import update
from agent.sync.updating.joining import Joining
from agent.sync.updating.journal import Gate
from agent.sync.updating.model import REST_S, versions
from agent.sync.updating.update import Event, WaitsFor


class Preparing(Joining):
    """FETCHING, TRIALING, WAITING."""

    # -- fetching ----------------------------------------------------------------------------------------------------------

    def _fetch(self) -> float:
        if (left := self._left_behind()) is not None:
            return left
        if (expired := self._expired()) is not None:
            return self._put_off(expired)
        signed: Signed | None = None
        try:
            signed = self._proved_in_store() or self._s.releases.manifest(self._ref)
            return self._bring(signed)
        except Problem as problem:
            if signed is None or problem.retryable:
                return self._put_off(problem)
            return self._refuse(problem, signed.sha256)
        except OSError as error:
            return self._put_off(store_problem(error, f"fetching release {self._ref}"))
        except Stopped:
            return self._stopped()

    def _bring(self, signed: Signed) -> float:
        known = self._s.quarantine.find(self.model, signed.manifest.version, signed.sha256)
        if known is not None:
            return self._refuse(
                Problem(Reason(known.reason), f"refused before: {known.message}", known.evidence), signed.sha256
            )
        hardware = self._s.hardware()
        if not hardware.runtimes:
            raise NoEngine(Reason.NO_VARIANT, "no inference engine was found to work here: see `edge-agent doctor`")
        variant = choose(signed.manifest, hardware)
        others = "; ".join(passed_over(signed.manifest, variant, hardware))
        needed = needed_files(signed.manifest, variant)
        wanted = [signed.manifest.files[name] for name in needed]
        self._s.housekeeping.fetching(self.model, [file.sha256 for file in wanted])
        downloader = self._s.downloader
        if downloader.shortage_bytes(wanted) > 0:
            self._s.housekeeping.need(self.model, versions(self._s.store.selection(self.model)))
            self._s.housekeeping.collect(short_of_space=True)
            downloader.require_space(wanted)
        missing, priority = downloader.missing(wanted), signed.manifest.acceptance.priority
        total, done = sum(file.size_bytes for file in missing) or 1, 0
        brought: Counter[str] = Counter()
        for file in missing:
            brought.update(downloader.fetch(file, self._showing(done, total), self._should_stop, priority))
            done += file.size_bytes
        self._s.store.write_manifest(signed.data, needed)
        choice = Choice(version=signed.manifest.version, variant=variant.name)
        self._note(
            "fetch",
            "passed",
            f"variant {variant.name!r}" + (f" ({others})" if others else ""),
            evidence={
                **{f"from {source}_bytes": count for source, count in sorted(brought.items())},
                "already_here_bytes": max(0, sum(file.size_bytes for file in wanted) - brought.total()),
                "manifest": signed.sha256,
            },
        )
        event = Event.FETCHED_KNOWN if self._proved_here(signed, choice) else Event.FETCHED
        self._apply(
            update.after(
                self.state, event, self._s.clock.wall(),
                manifest=signed.sha256, variant=variant.name, waiting_for=None, retry_at=None, failure=None,
            )
        )  # fmt: skip
        self._s.housekeeping.need(self.model, {*versions(self._s.store.selection(self.model)), choice.version})
        self._s.housekeeping.fetched(self.model)
        return 0.0

    def _proved_in_store(self) -> Signed | None:
        """The target's manifest from our own store, for a hold: its signature was verified when it was stored, and it was committed here.
        So an operator can go back without any network. What the fleet wants is always asked for anew.
        """
        if not self.held:
            return None
        try:
            data, manifest = self._s.store.manifest_bytes(self._ref), self._s.store.manifest(self._ref)
        except StoreError:
            return None
        signed = Signed(data, hashlib.sha256(data).hexdigest(), manifest)
        return signed if signed.sha256 in self.state.committed else None

    def _proved_here(self, signed: Signed, choice: Choice) -> bool:
        """Whether the trial may be skipped: this release was committed here, its file is intact, and it may serve right now."""
        if signed.sha256 not in self.state.committed or self._may_serve(signed.sha256) is not None:
            return False
        try:
            self._s.store.release(self.model, choice)
        except StoreError:
            return False
        return True

    def _showing(self, done_bytes: int, total_bytes: int) -> Callable[[int], None]:
        """Shows how much of everything is there, from how much there is of one file."""

        def show(have_bytes: int) -> None:
            self.progress = min(1.0, (done_bytes + have_bytes) / total_bytes)

        return show

    # -- trying ------------------------------------------------------------------------------------------------------------

    def _try(self) -> float:
        if (left := self._left_behind()) is not None:
            return left
        state = self.state
        if update.interrupted_too_often(state):
            message = f"its trial was cut off {state.interruptions} times by a crash or a power cut"
            return self._refuse(Problem(Reason.INTERRUPTED_TOO_OFTEN, message), state.manifest or "")
        try:
            manifest = self._s.store.manifest(self._ref)
            timeout_s = min(self._s.settings.trial_timeout_s, manifest.acceptance.max_trial_s)
            request = make_request(
                self._s.store,
                manifest,
                manifest.variant(state.variant or ""),
                memory_bytes=self._s.settings.trial_memory_bytes,
                timeout_s=timeout_s,
                threads=self._s.engine_threads,
            )
            numbers = self._s.trials.run(request, timeout_s, self._should_stop, self._trial_begins)
        except (StoreError, KeyError) as error:
            return self._put_off(Problem(Reason.STORE_FAILED, f"release {self._ref} has to be fetched again: {error}"))
        except OSError as error:
            return self._put_off(store_problem(error, f"starting the trial of release {self._ref}"))
        except Problem as problem:
            return self._put_off(problem) if problem.retryable else self._refuse(problem, state.manifest or "")
        except Stopped:
            return self._stopped()
        self._note("trial", "passed", _cases(len(request.cases)), evidence=numbers)
        self._passed()
        return 0.0

    def _trial_begins(self) -> None:
        """Its turn has come. On disk before it starts, because what it does to the machine is put down to it.  Raises: OSError."""
        self._save(self.state.but(trial_began=True), quietly=True)

    def _passed(self) -> None:
        now = self._s.clock.wall()
        why_not = self._may_serve()
        if why_not == "overtaken":
            return  # the next step sees it
        if why_not == "shadow" or self._shadows_first():
            self._apply(update.after(self.state, Event.PASSED_AS_SHADOW, now, interruptions=0))
        elif why_not is None:
            self._apply(update.after(self.state, self._to_serve(Event.PASSED), now, interruptions=0))
        else:
            self._note_waiting(why_not)
            self._apply(update.after(self.state, Event.PASSED_EARLY, now, interruptions=0, waiting_for=why_not))

    def _note_waiting(self, waits_for: WaitsFor) -> None:
        gates: dict[str, Gate] = {"approval": "approval", "window": "window", "others": "together"}
        if waits_for in gates:
            message = "waits for `edge-agent approve`" if waits_for == "approval" else "waits"
            self._note(gates[waits_for], "waits", message)

    def _may_serve(self, manifest: str | None = None) -> Literal["shadow", "overtaken"] | WaitsFor | None:
        """None when the target may serve right now; else what it waits for, or that something else is wanted since this step began.
        Windows and approvals of this device are about what is new: going back, leaving what was withdrawn, and what is held by hand do not
        wait for them.
        """
        desired = self._s.desired()
        wanted = self._wanted_by(desired)
        if wanted is None:
            return None
        if wanted.release != self.state.target:
            return "overtaken"
        if wanted.mode == "shadow":
            return "shadow"
        manifest = manifest or self.state.manifest
        new = not self.held and not self._goes_back(manifest)
        if new and self._asks_first() and not self._s.approvals.given(self.model, self._choice_version, manifest):
            return "approval"
        local = dt.datetime.fromtimestamp(self._s.clock.wall()).astimezone()
        if not windows.is_open(wanted.window, local) or (new and not windows.any_open(self._s.settings.windows, local)):
            return "window"
        return "others" if self._others(desired) is not None else None

    def _asks_first(self) -> bool:
        if self._s.settings.approval == "always":
            return True
        try:
            return self._s.store.manifest(self._ref).acceptance.approval
        except StoreError:
            return False

    def _shadows_first(self) -> bool:
        """Whether the release asks to run on copies of requests before it may serve, and something serves that has such requests."""
        shadowed = self.state.shadowed
        if shadowed is not None and shadowed.verdict != "running":
            return False
        rules = self._acceptance().shadow
        return rules is not None and rules.required and self._is_new()

    def _to_serve(self, event: Event) -> Event:
        """`event`, or TO_CANARY where the release asks for a share of the requests first and something serves the others."""
        return Event.TO_CANARY if self._acceptance().canary is not None and self._is_new() else event

    def _is_new(self) -> bool:
        return self.state.before is not None and not self.held and not self._goes_back(self.state.manifest)

    def _goes_back(self, manifest: str | None) -> bool:
        """Whether the target is an older release that was committed here, or what serves may not serve any more."""
        before, desired = self.state.before, self._s.desired()
        if before is None:
            return False
        if desired is not None and desired.withdrawn(self.model, before.version):
            return True
        return before.version > self._choice_version and manifest in self.state.committed

    # -- waiting -----------------------------------------------------------------------------------------------------------

    def _wait(self) -> float:
        if (left := self._left_behind()) is not None:
            return left
        now = self._s.clock.wall()
        if self.state.waiting_for != "retry":
            return self._wait_to_serve(now)
        left_s = (self.state.retry_at or 0.0) - now
        if self.state.judged_by not in (None, self._metadata()):
            left_s = 0.0  # what it was put off for says something else now
        if 0 < left_s <= update.longest_wait_s(self.state):
            return min(left_s, REST_S)
        failure = self.state.failure
        if self.state.unreported and (failure is None or failure.reason is not Reason.STORE_FAILED):
            return self._once_more(now)
        # What the store lost since is fetched again, and then tried again: nothing of it is taken for known any more.
        self._apply(update.after(self.state, Event.RETRY_DUE, now, waiting_for=None, retry_at=None, unreported=0))
        return 0.0

    def _wait_to_serve(self, now: float) -> float:
        why_not = self._may_serve()
        if why_not == self.state.waiting_for == "others":
            return self._join()
        if why_not is None:
            if self._expired() is None:
                self._apply(update.after(self.state, self._to_serve(Event.WINDOW_OPEN), now, waiting_for=None, failure=None))
                return 0.0
        elif why_not == "overtaken":
            return 0.0
        elif why_not not in {"shadow", self.state.waiting_for}:
            self._note_waiting(why_not)
            self._save(self.state.but(waiting_for=why_not))
            return 0.0
        return REST_S

    def _once_more(self, now: float) -> float:
        """After a release that could not be reported: everything of it is here and was tried, so no network is needed.

        When nothing could be reported since it went, either, it is not what cut the device off, and its answer says so.
        """
        state = self.state
        if not self._s.deliveries.lately(now - state.since):
            message = "no report got through while the release before served, either: the network is away"
            answer = self._answer(Outcome.FAILED, Reason.CANNOT_REPORT, message)
            state = state.but(answers=update.keep_answers(state.answers, answer))
            self._note("report", "put off", message, reason=Reason.CANNOT_REPORT)
        self._save(state.but(waiting_for="window", retry_at=None))
        return self._wait_to_serve(now)


def _cases(number: int) -> str:
    return (
        "1 golden case agrees"
        if number == 1
        else f"{number} golden cases agree"
        if number
        else "it loads and runs; it has no golden case"
    )
