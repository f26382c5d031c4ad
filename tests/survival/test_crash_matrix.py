"""Every phase of an update meets every fault, at every place where the fault makes a difference.

A place is where the update is about to change something or to hear from somebody: a file below the store that is opened for writing,
renamed or removed, a call to `serve`, a trial. A run without a fault counts the places; then each place has its turn with each fault:

    killed_sync     `sync` dies there, and starts again on what is on the disk
    killed_serve    `serve` dies there, and starts again with what is selected on the disk
    killed_both     the machine goes down there
    exception       a bug of ours, there
    full, io_error, read_only   the disk refuses every write from there on, for half a minute

For each case the chain of phases that the disk showed is known exactly, up to the fault (✕) and from there to the end. What serves at the
end follows from it: the new release after `steady`, the one before after `quarantined`. In between nothing serves that may not, and
`serve` is never left with nothing.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.common import files
from agent.contract.acceptance import CanaryRules, ShadowRules, WatchRules
from agent.contract.assignment import Rollout, Window
from agent.contract.reasons import Reason
from agent.contract.reports import Outcome, Phase
from agent.store import Selection
from agent.sync.problems import Problem
from agent.sync.serving import ServeAway
from tests import audit
from tests.sync.bench import MODEL, Bench, Killed, numbers

pytestmark = pytest.mark.survival

SHADOW = ShadowRules(required=True, duration_s=3.0, max_duration_s=6.0)
CANARY = CanaryRules(duration_s=3.0, max_duration_s=60.0, min_requests=0)
WATCH = WatchRules(duration_s=5.0, max_duration_s=60.0)
REPAIRED_AFTER_S = 30.0
AT_REST = {Phase.STEADY, Phase.QUARANTINED}

# -- what happens without a fault ------------------------------------------------------------------------------------------------


def good(bench: Bench) -> None:
    bench.release(2, watch=WATCH)
    bench.want(2)


def careful(bench: Bench) -> None:
    """It is looked at on copies of requests, then on a share of them, before it is activated."""
    bench.release(2, watch=WATCH, shadow=SHADOW, canary=CANARY)
    bench.want(2)


def stopped_as_canary(bench: Bench) -> None:
    bench.release(2, watch=WATCH, canary=CANARY)
    bench.serve.numbers[2] = numbers(10, run=90)
    bench.want(2)


def windowed(bench: Bench) -> None:
    """The window opens in two hours."""
    local = dt.datetime.fromtimestamp(bench.clock.wall()).astimezone()
    minute = (local.hour * 60 + local.minute + 120) % 1440
    window = Window(start_minute=minute, end_minute=(minute + 60) % 1440)
    bench.release(2, watch=WATCH)
    bench.want(1, rollout=Rollout(id="tonight", release=2, previous=1, permille=1000, window=window))


def refused(bench: Bench) -> None:
    bench.release(2, watch=WATCH)
    bench.trial = _says_no
    bench.want(2)


def rolled_back(bench: Bench) -> None:
    bench.release(2, watch=WATCH)
    bench.serve.numbers[2] = numbers(10, run=90)
    bench.want(2)


SCENARIOS = {begin.__name__: begin for begin in (good, careful, windowed, refused, stopped_as_canary, rolled_back)}


def _says_no(*_: object) -> dict[str, Any]:
    raise Problem(Reason.GOLDEN_MISMATCH, "the trial says no", {"agreement": 0.1})


# -- the places ------------------------------------------------------------------------------------------------------------------


class Places:
    """Counts the places that an update passes; does something to it at one of them."""

    def __init__(self, bench: Bench, at: int, fault: Callable[[str], None]) -> None:
        self._bench = bench
        self._at = at
        self._fault = fault
        self.passed: list[tuple[str, str]] = []
        """(the phase on the disk, the place)."""
        self.over = False
        """After a death no fault comes any more."""
        self._busy = False
        """While a place is noted: what that opens is no place of the update."""

    @contextlib.contextmanager
    def watched(self) -> Iterator[Places]:
        bench, trial = self._bench, self._bench.trial
        bench.serve.fault = lambda action, version: self._pass("serve", action if version is None else f"{action} {version}")
        bench.trial = lambda *arguments: (self._pass("trial", ""), trial(*arguments))[1]
        with audit.listening(self._hear):
            yield self

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy:
            return
        if event == "open" and isinstance(arguments[0], str) and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            what = "write"
        elif event in {"os.rename", "os.remove", "os.mkdir"}:
            what = event[3:]
        else:
            return
        path, root = os.fspath(arguments[0]), self._bench.store.root
        if path.startswith(f"{root}/"):
            self._pass(what, Path(path).relative_to(root).as_posix())

    def _pass(self, what: str, name: str) -> None:
        busy, self._busy = self._busy, True
        try:
            place = (on_disk(self._bench), f"{what} {name}")
            if place in self.passed and name in {"status", "shadow numbers"}:
                return  # once in each phase is enough
            self.passed.append(place)
            if len(self.passed) >= self._at > 0 and not self.over:
                self._fault(what)
        finally:
            self._busy = busy


def on_disk(bench: Bench) -> str:
    state = bench.records.states.read(MODEL)
    return state.phase.value if state else "damaged"


# -- the faults ------------------------------------------------------------------------------------------------------------------


class Broken(Exception):
    """A bug of ours."""


class Fault:
    """Breaks in at one place; `end` is what happens after the process that was hit is gone or has gone on."""

    def __init__(self, bench: Bench, kind: str) -> None:
        self._bench = bench
        self._kind = kind
        self._since: float | None = None

    def __call__(self, what: str) -> None:
        first = self._since is None
        if first:
            self._since = self._bench.clock.monotonic()
        if self._kind in DISK:
            self._refuse(what)
        elif self._kind in {"killed_sync", "killed_both"}:
            raise Killed  # also whatever the dying process would do in its last moments
        elif first and self._kind == "killed_serve":
            self._bench.serve.start()
            if what == "serve":
                raise ServeAway("serve closed the connection", sent=True)
        elif first:
            raise Broken

    def _refuse(self, what: str) -> None:
        assert self._since is not None
        number, refused = DISK[self._kind]
        if what in refused and self._bench.clock.monotonic() <= self._since + REPAIRED_AFTER_S:
            raise OSError(number, os.strerror(number))


DISK = {
    "full": (errno.ENOSPC, {"write", "mkdir"}),
    "io_error": (errno.EIO, {"write", "mkdir", "rename", "remove"}),
    "read_only": (errno.EROFS, {"write", "mkdir", "rename", "remove"}),
}
FAULTS = ("killed_sync", "killed_serve", "killed_both", "exception", *DISK)

# -- the cases -------------------------------------------------------------------------------------------------------------------


class Case:
    """One update with a fault at its `at`th place (0: without any)."""

    def __init__(self, folder: Path, scenario: str, at: int = 0, kind: str = "killed_sync") -> None:
        self.bench = bench = Bench(folder)
        bench.install(1)
        self.kind = kind
        self.chain: list[str] = []
        self.hit: str | None = None
        SCENARIOS[scenario](bench)
        self.places = Places(bench, at, Fault(bench, kind))
        self._at = at

    def after(self) -> str:
        """The phases from the fault on."""
        return " ".join(self.chain[self.chain.index("✕") + 1 :])

    def run(self) -> None:
        with self.places.watched():
            for _ in range(1500):
                self._look()
                if self._over():
                    break
                self._step()
            else:
                raise AssertionError(f"no end: {self.chain}; {self.bench.updater.problem}")
            for _ in range(5):
                self._step()
        self._look()
        bench, state = self.bench, self.bench.updater.state
        files.sweep(bench.store.root, older_than_s=0)
        assert bench.serving == (2 if state.phase is Phase.STEADY else 1)
        assert bench.serve.loaded[MODEL].keys() == {bench.serving}, "nothing else is left in memory"
        assert state.answers[-1].release == 2
        assert not list(bench.store.staging.iterdir()), "nothing is left half fetched"
        assert not [path for path in bench.store.root.rglob(".*") if path.is_file()], "nothing is left half written"

    def _step(self) -> None:
        try:
            self.bench.step()
        except Killed:
            self._mark()
            self._start_again()
        except Exception as error:  # as the thread of a model treats it
            if not isinstance(error, (Broken, OSError)):
                raise
            self.bench.clock.pass_(5)
        self._mark()

    def _start_again(self) -> None:
        self.places.over = True
        if self.kind == "killed_both":
            self.bench.serve.start()
        self.bench.again()

    def _mark(self) -> None:
        """Where the fault was, in the chain."""
        if self.hit is None and len(self.places.passed) >= self._at > 0:
            self.hit = self.places.passed[self._at - 1][0]
            if not self.chain or self.chain[-1] != self.hit:
                self.chain.append(self.hit)
            self.chain.append("✕")

    def _look(self) -> None:
        """What must be so at any time."""
        bench, phase = self.bench, on_disk(self.bench)
        if not self.chain or self.chain[-1] != phase:
            self.chain.append(phase)
        selection = bench.store.selection(MODEL)
        assert isinstance(selection, Selection)
        assert bench.store.release(MODEL, selection.active), "what a serve that starts now would load is whole"
        assert bench.serving in {1, 2}
        if bench.trial.__name__ == "_says_no":
            assert bench.serving == 1

    def _over(self) -> bool:
        state = self.bench.records.states.read(MODEL)
        assert state is not None
        answered = any(answer.release == 2 and answer.outcome is not Outcome.FAILED for answer in state.answers)
        return answered and state.phase in AT_REST


def without_a_fault(folder: Path, scenario: str) -> Case:
    case = Case(folder, scenario)
    case.run()
    return case


CLEAN = {
    "good": "steady fetching trialing activating watching steady",
    "careful": "steady fetching trialing shadowing canarying activating watching steady",
    "windowed": "steady fetching trialing waiting activating watching steady",
    "refused": "steady fetching trialing quarantined",
    "stopped_as_canary": "steady fetching trialing canarying rolling_back quarantined",
    "rolled_back": "steady fetching trialing activating watching rolling_back quarantined",
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_without_a_fault(scenario: str, in_memory: Path) -> None:
    assert " ".join(without_a_fault(in_memory, scenario).chain) == CLEAN[scenario]


REASONS = {"refused": "golden_mismatch", "stopped_as_canary": "error_ratio", "rolled_back": "error_ratio"}
"""Why, also when the disk takes that down late."""


def expected(scenario: str, before: list[str], fault: str) -> set[str]:
    """What may come after a fault, given the phases before it, of which the last is where it came."""
    clean = CLEAN[scenario].split()
    assert before == clean[: len(before)], "until then nothing was out of the ordinary"
    again, onwards = " ".join(clean[len(before) - 1 :]), " ".join(clean[len(before) :])
    if fault not in {"killed_serve", "killed_both"}:
        # The phase is done again; a disk that is full lets what was written get its name, and old files be removed.
        return {again, onwards} if fault == "full" else {again}
    ends = {again} if fault == "killed_both" else {again, onwards}  # without `serve`, `sync` just goes on, or asks again
    return ends | COUNTED.get(before[-1], set())


COUNTED = {
    # once the release runs in a `serve`, the death of that one counts against it
    "shadowing": {"shadowing quarantined"},
    "canarying": {"canarying rolling_back quarantined"},
    "activating": {"activating watching rolling_back quarantined", "watching rolling_back quarantined"},
    "watching": {"watching rolling_back quarantined"},
}


@pytest.mark.timeout(400)  # dozens of whole updates: over a minute of a processor that nobody else uses
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_at_every_place(scenario: str, fault: str, in_memory: Path) -> None:
    places = without_a_fault(in_memory / "clean", scenario).places.passed
    seen: Counter[str] = Counter()
    for at in range(1, len(places) + 1):
        case = Case(in_memory / str(at), scenario, at, fault)
        case.run()
        cut = case.chain.index("✕")
        assert case.after() in expected(scenario, case.chain[:cut], fault), (places[at - 1], " ".join(case.chain))
        if fault in DISK:
            assert case.bench.answer.reason == REASONS.get(scenario), places[at - 1]
        seen[f"{fault} in {case.chain[cut - 1]}: {case.after()}"] += 1
    for chain, times in seen.items():
        print(f"{times:4} × {chain}")


def test_every_phase_was_met() -> None:
    """A new phase needs a scenario here."""
    assert {phase for chain in CLEAN.values() for phase in chain.split()} == {phase.value for phase in Phase}
