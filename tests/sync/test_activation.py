"""Activating: memory for one or for two, and a `serve` that is away or refuses."""

from __future__ import annotations

import pytest

from agent.contract.reasons import Reason
from agent.contract.reports import Outcome, Phase
from agent.store import Choice
from agent.sync.serving import ServeAway, ServeRefused
from agent.sync.updating import update
from tests.sync.bench import MODEL, Bench, Killed, numbers
from tests.sync.fleet import DAY
from tests.sync.stories import selected

P = Phase


def test_serve_short_of_memory_is_asked_again(on_one: Bench):
    def full(action: str, version: int | None) -> None:
        if action in ("load", "swap"):
            raise ServeRefused(507, "no_memory", "it does not fit")

    on_one.serve.fault = full
    on_one.want(2)
    on_one.step()
    on_one.until(P.WAITING)
    assert on_one.answer.outcome is Outcome.FAILED
    assert selected(on_one).active.version == 1
    assert not on_one.updater.state.activated
    on_one.serve.fault = lambda *_: None
    on_one.until(P.STEADY)

    assert on_one.serving == 2


def no_room_for_two(action: str, version: int | None) -> None:
    if action == "load" and version == 2:
        raise ServeRefused(507, "no_memory", "both do not fit")


def test_without_memory_for_two_what_serves_makes_room(on_one: Bench):
    on_one.serve.fault = no_room_for_two
    on_one.want(2)
    on_one.step()
    on_one.until(P.STEADY)

    assert on_one.serve.calls[:2] == [("load", 2), ("swap", 2)]
    assert (on_one.serving, on_one.answer.outcome) == (2, Outcome.COMMITTED)
    assert selected(on_one).previous == Choice(version=1, variant="cpu")


def test_killed_while_one_makes_room_for_the_other(on_one: Bench):
    """The machine dies in the middle of it: `serve` starts with what is selected, and the update goes on from there."""
    selections = []

    def die(action: str, version: int | None) -> None:
        no_room_for_two(action, version)
        if action == "swap":
            selections.append(selected(on_one).active.version)
            raise Killed

    on_one.serve.fault = die
    on_one.want(2)
    on_one.step()
    with pytest.raises(Killed):
        on_one.until(P.STEADY)
    assert selections == [2], "persist, then act"
    on_one.serve.fault = lambda *_: None
    on_one.boot = "boot-2"
    on_one.serve.start()
    on_one.again()
    on_one.until(P.STEADY)

    assert (on_one.serving, on_one.answer.outcome) == (2, Outcome.COMMITTED)


def test_going_back_after_a_swap(on_one: Bench):
    on_one.serve.fault = no_room_for_two
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.serve.numbers[2] = numbers(ok=1, run=50)
    on_one.until(P.QUARANTINED)

    assert (on_one.serving, on_one.answer.outcome) == (1, Outcome.ROLLED_BACK)


def test_serve_away_at_activation_is_waited_for(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.ACTIVATING)
    on_one.serve.away = True
    for _ in range(10):
        on_one.step()
    assert on_one.phase is P.ACTIVATING
    on_one.serve.away = False
    on_one.until(P.STEADY)

    assert on_one.serving == 2


def test_serve_away_for_long_puts_the_activation_off(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.ACTIVATING)
    on_one.serve.away = True
    on_one.until(P.WAITING)

    assert on_one.answer.outcome is Outcome.FAILED
    assert on_one.records.quarantine.entries(MODEL) == ()


@pytest.mark.parametrize(
    ("action", "code", "reason"),
    [("load", "model_invalid", Reason.LOAD_FAILED), ("activate", "internal", Reason.ACTIVATION_FAILED)],
)
def test_serve_refusing_the_release(action, code, reason, on_one: Bench):
    def refuse(asked: str, version: int | None) -> None:
        if (asked, version) == (action, 2):
            raise ServeRefused(422, code, "it cannot be loaded")

    on_one.serve.fault = refuse
    on_one.want(2)
    on_one.step()
    on_one.until(P.QUARANTINED)

    assert on_one.answer.reason == reason.value
    assert on_one.serving == 1
    assert selected(on_one).active.version == 1


def test_a_release_whose_loading_takes_serve_down_again_and_again(on_one: Bench):
    def die(action: str, version: int | None) -> None:
        if (action, version) == ("load", 2):
            on_one.serve.start()
            raise ServeAway("connection reset", sent=True)

    on_one.serve.fault = die
    on_one.want(2)
    on_one.step()
    on_one.until(P.QUARANTINED)

    assert on_one.answer.reason == Reason.INTERRUPTED_TOO_OFTEN.value
    assert on_one.serve.calls.count(("load", 2)) == update.MAX_INTERRUPTIONS + 1
    assert on_one.serving == 1


def test_a_commit_that_serve_did_not_hear_is_told_again(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)

    def deaf(action: str, version: int | None) -> None:
        if action == "commit":
            raise ServeAway("gone", sent=False)

    on_one.serve.fault = deaf
    on_one.until(P.STEADY)
    assert on_one.serve.previous[MODEL] == 1
    on_one.serve.fault = lambda *_: None
    on_one.step()

    assert on_one.serve.previous[MODEL] is None


def died_after(bench: Bench, action: str):
    """`serve` does what it is asked, and its answer is lost."""

    def fault(asked: str, version: int | None) -> None:
        if asked == action:
            assert version is not None
            bench.serve.bring(MODEL, version, "cpu")
            raise ServeAway("no answer", sent=True)

    return fault


def test_what_serve_holds_beside_the_selected_release_is_unloaded_at_rest(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.ACTIVATING)
    on_one.serve.fault = died_after(on_one, "load")
    on_one.step()
    on_one.serve.fault = lambda *_: None
    on_one.clock.pass_(8 * DAY)  # what the fleet said has expired: put off, with 2 in memory
    on_one.until(P.WAITING)
    assert on_one.serve.loaded[MODEL].keys() == {1, 2}
    on_one.want(1)
    on_one.step()
    on_one.until(P.STEADY)
    on_one.step()

    assert on_one.serve.loaded[MODEL].keys() == {1}
