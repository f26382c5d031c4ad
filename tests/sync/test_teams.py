"""Releases that switch together: all of them or none, wherever the process dies and whichever of them is bad."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.common import files
from agent.contract.acceptance import WatchRules
from agent.contract.codec import encode
from agent.contract.reasons import Reason
from agent.contract.reports import Outcome, Phase
from agent.store import Choice, Selection, SelectionFiles, Store
from agent.sync.operator import overview
from agent.sync.problems import Problem
from agent.sync.serving import ServeAway, ServeRefused
from agent.sync.trust.desired import Desired
from agent.sync.updating.states import States
from agent.sync.updating.update import UpdateState
from tests.sync.bench import Killed, numbers
from tests.sync.team_bench import TeamBench

P = Phase
WATCH = WatchRules(duration_s=10.0, max_duration_s=60.0)
OLD, NEW = {"arm": 1, "eye": 2}, {"arm": 3, "eye": 4}


@pytest.fixture
def bench(tmp_path: Path) -> TeamBench:
    bench = TeamBench(tmp_path)
    bench.begin()
    for model, version in NEW.items():
        bench.release(version, model=model, watch=WATCH)
    bench.tried.clear()
    bench.serve.calls.clear()
    return bench


def wanted(bench: TeamBench) -> None:
    bench.desire(NEW, team=("arm", "eye"))


def test_all_are_tried_first_and_then_switched_at_once(bench: TeamBench):
    wanted(bench)
    bench.all_in(P.WATCHING)
    switched = [action for action, _ in bench.serve.calls if action.startswith("activate")]
    assert switched == ["activate_team"]
    assert sorted(bench.tried) == ["arm:3", "eye:4"]
    assert bench.runs == NEW
    bench.all_in(P.STEADY)

    assert bench.runs == bench.on_disk() == NEW
    for updater in bench.updaters.values():
        assert updater.state.answers[-1].outcome is Outcome.COMMITTED
        assert updater.state.team == ()


def test_one_that_is_late_is_waited_for(bench: TeamBench):
    def slow(request, *_):
        if request.release.startswith("eye"):
            raise Problem(Reason.STORE_FAILED, "not now")
        return {}

    bench.trial = slow
    wanted(bench)
    bench.rounds(40)
    assert bench.updaters["arm"].state.waiting_for == "team"
    assert "eye:4" in (bench.updaters["arm"].problem or "")
    desired = bench.desired()
    files.make_directory(bench.store.private / "trust")
    for written in (
        encode(desired),
        encode(desired).replace(b'"teams":', b'"together":'),
    ):  # as it is now, and as it was in 0.1.0
        (bench.store.private / "trust/desired.json").write_bytes(written)
        assert "waits for eye:4, of its team" in overview.text(overview.read(bench.store))
    assert bench.runs == OLD
    bench.trial = lambda *_: {}
    bench.all_in(P.STEADY, within=4000)
    assert bench.runs == NEW


def test_one_that_fails_its_trial_keeps_all_where_they_are(bench: TeamBench):
    bench.trial = bad_for("eye")
    wanted(bench)
    bench.rounds(100)

    assert bench.runs == bench.on_disk() == OLD
    assert bench.updaters["eye"].state.phase is P.QUARANTINED
    assert bench.updaters["arm"].state.phase is P.WAITING


def test_nobody_waits_for_a_refused_one_with_what_nobody_may_run(bench: TeamBench):
    bench.trial = bad_for("eye")
    wanted(bench)
    bench.rounds(100)
    bench.desire(NEW, team=("arm", "eye"), withdrawn={"arm": (1,)})
    bench.rounds(20)

    assert bench.serve.active.get("arm") is None
    assert bench.serve.active["eye"] == 2
    assert bench.on_disk() == {"arm": None, "eye": 2}


def test_one_that_fails_its_watch_takes_all_back(bench: TeamBench):
    bench.serve.numbers = {1: numbers(1000), 2: numbers(1000), 3: numbers(1000)}
    wanted(bench)
    bench.all_in(P.WATCHING)
    bench.serve.calls.clear()
    bench.serve.numbers[4] = numbers(50, run=50)
    bench.rounds(5)
    assert ("activate_team", None) in bench.serve.calls
    assert bench.runs == bench.on_disk() == OLD
    bench.rounds(60)

    arm, eye = bench.updaters["arm"].state, bench.updaters["eye"].state
    assert [answer.reason for answer in eye.answers if answer.release == 4] == [Reason.ERROR_RATIO.value]
    assert [answer.reason for answer in arm.answers if answer.release == 3] == [Reason.TOGETHER.value]
    assert "eye:4" in arm.answers[-1].message
    assert bench.records.quarantine.entries("arm") == ()
    assert [entry.answer.release for entry in bench.records.quarantine.entries("eye")] == [4]
    assert bench.runs == OLD, "what was not bad itself waits for the others, and is not switched alone"


def test_one_that_cannot_be_loaded_keeps_all_where_they_are(bench: TeamBench):
    def refuse(action: str, version: int | None) -> None:
        if (action, version) == ("load", 4):
            raise ServeRefused(422, "model_invalid", "not a model")

    bench.serve.fault = refuse
    wanted(bench)
    bench.rounds(80)

    assert bench.runs == bench.on_disk() == OLD
    assert bench.updaters["eye"].state.answers[-1].reason == Reason.LOAD_FAILED.value
    assert bench.updaters["arm"].state.answers[-1].reason == Reason.TOGETHER.value


def test_without_memory_for_all_of_them_nothing_is_switched(bench: TeamBench):
    def full(action: str, version: int | None) -> None:
        if (action, version) == ("load", 4):
            raise ServeRefused(507, "no_memory", "full")

    bench.serve.fault = full
    wanted(bench)
    bench.rounds(60)
    assert bench.runs == bench.on_disk() == OLD
    assert all(action != "swap" for action, _ in bench.serve.calls)
    bench.serve.fault = lambda *_: None
    bench.all_in(P.STEADY, within=4000)
    assert bench.runs == NEW


@pytest.mark.parametrize("gone", ["arm", "eye"])
def test_one_that_is_wanted_no_more_takes_all_back(gone: str, bench: TeamBench):
    wanted(bench)
    bench.all_in(P.WATCHING)
    bench.desire({**NEW, gone: OLD[gone]}, withdrawn={gone: (NEW[gone],)})
    bench.rounds(3)
    assert bench.on_disk() == OLD
    bench.all_in(P.STEADY, within=2000)
    bench.rounds(5)

    assert bench.runs[gone] == OLD[gone]


def test_one_that_is_held_holds_all(bench: TeamBench):
    bench.records.holds.hold("eye", 2)
    wanted(bench)
    bench.rounds(60)
    assert bench.runs == OLD
    bench.records.holds.unhold("eye")
    bench.all_in(P.STEADY, within=2000)
    bench.rounds(10)
    bench.all_in(P.STEADY, within=2000)
    assert bench.runs == NEW


def test_one_that_is_there_already_is_not_waited_for(bench: TeamBench):
    bench.desire({"arm": 3, "eye": 2})
    bench.rounds(2)
    bench.all_in(P.STEADY)
    wanted(bench)
    bench.rounds(2)
    bench.all_in(P.STEADY)

    assert bench.runs == NEW


def test_models_that_serve_for_the_first_time(tmp_path: Path):
    bench = TeamBench(tmp_path)
    for model, version in NEW.items():
        bench.release(version, model=model, watch=WATCH)
    wanted(bench)
    bench.rounds(2)
    bench.all_in(P.WATCHING)
    bench.serve.numbers[4] = numbers(0, run=100)
    bench.rounds(10)
    assert bench.on_disk() == {"arm": None, "eye": None}
    assert bench.runs == {"arm": None, "eye": None}


def test_it_is_committed_when_the_fleet_has_heard_of_all(bench: TeamBench):
    bench.link_up = True
    bench.rounds(2)
    wanted(bench)
    bench.all_in(P.WATCHING)
    bench.link_up = False
    bench.rounds(60)
    assert all(updater.state.phase is P.WATCHING for updater in bench.updaters.values())
    bench.link_up = True
    bench.all_in(P.STEADY)
    assert bench.runs == NEW


def test_a_team_that_cannot_be_reported_goes_back_as_one(bench: TeamBench):
    bench.link_up = True
    bench.rounds(2)
    wanted(bench)
    bench.all_in(P.WATCHING)
    bench.link_up = False
    bench.all_in(P.WAITING, within=5000)
    assert bench.runs == bench.on_disk() == OLD
    bench.all_in(P.STEADY, within=5000)
    assert bench.runs == NEW, "it was the network"


class Turning(TeamBench):
    """The fleet wants OLD again from the `turn`-th time on that somebody looks at what it wants."""

    turn: int | None = None

    def desired(self) -> Desired | None:
        if self.turn is not None:
            self.turn -= 1
            if self.turn <= 0:
                self.turn = None
                self.desire(OLD)
        return super().desired()


@pytest.mark.parametrize("turn", range(1, 31))
def test_one_is_not_switched_alone_when_the_team_is_dissolved_between_two_looks(turn: int, tmp_path: Path):
    bench = Turning(tmp_path)
    bench.begin()
    for model, version in NEW.items():
        bench.release(version, model=model, watch=WATCH)
    bench.desire({"arm": 1, "eye": 4})
    bench.trial = bad_for("eye")
    bench.all_in(P.STEADY, P.QUARANTINED)
    bench.serve.calls.clear()
    wanted(bench)
    bench.turn = turn
    for _ in range(40):
        bench.round()
        assert set(bench.phases_on_disk()) == set(NEW), "what is stored can be read"

    assert bench.turn is None
    assert bench.runs == bench.on_disk() == OLD
    assert [call for call in bench.serve.calls if call[0] in ("load", "activate", "rollback")] == []
    assert [answer for answer in bench.updaters["arm"].state.answers if answer.release == 3] == []


def bad_for(model: str) -> Callable:
    """A trial that the releases of this model do not pass."""

    def trial(request, *_):
        if request.release.startswith(model):
            raise Problem(Reason.GOLDEN_MISMATCH, "wrong")
        return {}

    return trial


# -- any instruction ---------------------------------------------------------------------------------------------------------------


class Death:
    """Kills the process at the n-th thing it does that lasts: a file written or removed, or a word to `serve`; before it or after it."""

    def __init__(self, patch: pytest.MonkeyPatch, bench: TeamBench) -> None:
        self.left: int | None = None
        self.counted = 0
        for name in ("write", "remove"):
            patch.setattr(files, name, self._deadly(getattr(files, name)))
        bench.serve.fault = lambda action, _: self.moment() if action != "status" else None

    def _deadly(self, act: Callable) -> Callable:
        def acting(*arguments, **options):
            self.moment()
            done = act(*arguments, **options)
            self.moment()
            return done

        return acting

    def moment(self) -> None:
        self.counted += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                raise Killed


def until_still(bench: TeamBench) -> None:
    for _ in range(3000):
        bench.round()
        if all(u.state.phase in (P.STEADY, P.QUARANTINED) for u in bench.updaters.values()) and bench.runs in (OLD, NEW):
            bench.rounds(3)
            return
    raise AssertionError(f"{bench.runs} {bench.phases_on_disk()}")


def killed_at(folder: Path, moment: int, *, bad: bool, serve_too: bool, patch: pytest.MonkeyPatch) -> bool:
    """One life that ends at that moment, and what follows. Whether it ended there at all."""
    bench = TeamBench(folder)
    bench.begin()
    for model, version in NEW.items():
        bench.release(version, model=model, watch=WATCH)
    bench.serve.numbers = {
        1: numbers(1000),
        2: numbers(1000),
        3: numbers(1000),
        4: numbers(50, run=50) if bad else numbers(1000),
    }
    wanted(bench)
    death = Death(patch, bench)
    death.left = moment
    try:
        bench.rounds(120)
    except Killed:
        pass
    else:
        return False
    assert bench.on_disk() in (OLD, NEW), f"a serve that starts now has a mixture: {bench.on_disk()}"
    phases = set(bench.phases_on_disk().values())
    switching = {P.ACTIVATING, P.WATCHING, P.ROLLING_BACK}
    assert len(phases) == 1 or not phases & switching, f"apart: {phases}"
    if serve_too:
        bench.serve.start()
        assert bench.runs in (OLD, NEW)
    bench.again()
    if bad:
        for _ in range(150):
            bench.round()
            assert bench.on_disk() in (OLD, NEW)
        assert bench.runs == OLD
    else:
        until_still(bench)
        assert bench.runs == bench.on_disk()
        assert bench.runs == NEW or serve_too  # a serve that dies in a watch counts against the releases
    return True


@pytest.mark.no_cover  # it would take two or three times as long
@pytest.mark.parametrize("serve_too", [False, True], ids=["sync", "both"])
@pytest.mark.parametrize("bad", [False, True], ids=["good", "bad"])
def test_killed_at_many_instructions(bad: bool, serve_too: bool, tmp_path: Path):
    kill_everywhere(tmp_path, bad=bad, serve_too=serve_too, step=11)


@pytest.mark.long
@pytest.mark.parametrize("serve_too", [False, True], ids=["sync", "both"])
@pytest.mark.parametrize("bad", [False, True], ids=["good", "bad"])
def test_killed_at_any_instruction(bad: bool, serve_too: bool, tmp_path: Path):
    kill_everywhere(tmp_path, bad=bad, serve_too=serve_too, step=1)


def kill_everywhere(tmp_path: Path, *, bad: bool, serve_too: bool, step: int) -> None:
    moment = 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            if not killed_at(tmp_path / str(moment), moment, bad=bad, serve_too=serve_too, patch=patch):
                break
        moment += step
    assert moment > 60


@pytest.mark.parametrize("restarted", [False, True], ids=["loaded", "restarted"])
@pytest.mark.parametrize("nothing", [(), ("arm",), ("eye",), ("arm", "eye")], ids=lambda models: "+".join(models) or "none")
def test_all_go_back_at_one_word_to_serve(bench: TeamBench, nothing: tuple[str, ...], restarted: bool):
    """Whatever served before, also where `serve` was started meanwhile and has only what is selected."""
    old = {model: None if model in nothing else version for model, version in OLD.items()}
    bench.desire(old)
    bench.rounds(5)
    assert bench.runs == old
    wanted(bench)
    bench.all_in(P.WATCHING)
    if restarted:
        bench.serve.start()
        assert bench.runs == NEW
    ran = []
    bench.serve.fault = lambda *_: ran.append(bench.runs)
    bench.desire(old)
    bench.all_in(P.STEADY)
    bench.rounds(3)
    assert bench.runs == bench.on_disk() == old
    assert [runs for runs in ran if runs not in (NEW, old)] == []


def test_all_go_back_one_by_one_where_there_is_no_room_for_all(bench: TeamBench):
    def full(action: str, version: int | None) -> None:
        if (action, version) == ("load", OLD["eye"]):
            raise ServeRefused(507, "no_memory", "no room")

    wanted(bench)
    bench.all_in(P.WATCHING)
    bench.serve.start()
    bench.serve.fault = full
    bench.desire(OLD)
    bench.all_in(P.STEADY)
    assert bench.runs == bench.on_disk() == OLD
    assert bench.serve.loaded.keys() == OLD.keys()


def test_serve_away_while_all_go_back(bench: TeamBench):
    bench.serve.numbers = {1: numbers(1000), 2: numbers(1000), 4: numbers(50, run=50)}
    wanted(bench)
    bench.all_in(P.WATCHING)
    bench.serve.fault = lambda action, _: (_ for _ in ()).throw(ServeAway("away", sent=False)) if action != "status" else None
    bench.rounds(10)
    assert bench.on_disk() == OLD
    bench.serve.fault = lambda *_: None
    bench.rounds(10)
    assert bench.runs == OLD


# -- the store and the states --------------------------------------------------------------------------------------------------------


def test_several_selections_are_one_for_every_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = Store.create(tmp_path / "store")
    old = {m: Selection(model=m, active=Choice(version=1, variant="cpu")) for m in ("a", "b")}
    new: dict[str, Selection | None] = {
        "a": Selection(model="a", active=Choice(version=2, variant="cpu")),
        "b": None,
        "c": old["a"],
    }
    for selection in old.values():
        store.select(selection)
    put, died = SelectionFiles.put, []

    def dies(self, model, selection):
        died.append(model)
        if len(died) == 2:
            raise Killed
        put(self, model, selection)

    monkeypatch.setattr(SelectionFiles, "put", dies)
    with pytest.raises(Killed):
        store.select_team(new)
    monkeypatch.setattr(SelectionFiles, "put", put)
    reader = Store(store.root)
    assert set(reader.selections()) == {"a", "c"}
    assert reader.selection("b") is None
    assert reader.selection("a") == new["a"]

    Store.create(store.root)
    assert not (store.root / "models" / ".team.json").exists()
    assert json.loads((store.root / "models" / "a.json").read_bytes())["active"]["version"] == 2
    assert not (store.root / "models" / "b.json").exists()


def test_several_states_are_one_for_every_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    states = States(tmp_path / "updates")
    team = [UpdateState(model=model, phase=P.WATCHING) for model in ("a", "b")]
    write, count = States.write, []

    def dies(self, state):
        count.append(1)
        if len(count) == 2:
            raise Killed
        write(self, state)

    monkeypatch.setattr(States, "write", dies)
    with pytest.raises(Killed):
        states.save_team(team)
    monkeypatch.setattr(States, "write", write)
    again = States(tmp_path / "updates")
    assert [again.load(model).phase for model in ("a", "b")] == [P.WATCHING, P.WATCHING]
    again.save(UpdateState(model="b", phase=P.STEADY))

    assert [States(tmp_path / "updates").load(model).phase for model in ("a", "b")] == [P.WATCHING, P.STEADY]
    assert not (tmp_path / "updates/.team.json").exists()
    assert sorted(again.models()) == ["a", "b"]


def test_a_lease_that_is_renewed_while_a_release_waits_keeps_no_other_model(tmp_path: Path):
    bench = TeamBench(tmp_path)
    stopped = Selection(model="arm", active=Choice(version=1, variant="cpu"))
    waits = UpdateState(model="arm", phase=Phase.WAITING, waiting_for="window", target=2, stopped=stopped)
    bench.records.states.save(waits)
    bench.records.states.save(UpdateState(model="eye", phase=Phase.WAITING, waiting_for="window", target=3))
    bench.again()
    arm, eye = bench.updaters["arm"], bench.updaters["eye"]
    loading, let_go, stepped = threading.Event(), threading.Event(), threading.Event()

    def load(*_):
        loading.set()
        let_go.wait(20.0)
        raise ServeAway("serve went away", sent=True)

    bench.serve.load = load  # type: ignore[method-assign]
    loads = threading.Thread(target=lambda: arm.step(lambda: False))
    other = threading.Thread(target=lambda: (eye.step(lambda: False), stepped.set()))
    loads.start()
    try:
        assert loading.wait(10.0)
        other.start()
        assert stepped.wait(5.0)
    finally:
        let_go.set()
        loads.join(10.0)
        other.join(10.0)
