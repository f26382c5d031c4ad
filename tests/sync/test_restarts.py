"""Orderly restarts, reboots and power cuts: which of them count against a release."""

from __future__ import annotations

import pytest

from agent.contract.reasons import Reason
from agent.contract.reports import Outcome, Phase
from agent.sync.problems import Stopped
from agent.sync.serving import ServeAway
from agent.sync.updating import update
from tests.sync.bench import Bench, Killed, numbers
from tests.sync.stories import reboot, restart_both, restart_serve, restart_sync

P = Phase


@pytest.mark.parametrize("phase", [P.FETCHING, P.TRIALING, P.ACTIVATING, P.WATCHING])
@pytest.mark.parametrize("restart", [restart_serve, restart_sync, restart_both, reboot])
def test_orderly_restarts_are_nobodys_fault_however_many(restart, phase, on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(phase)
    for _ in range(update.MAX_INTERRUPTIONS + 2):
        restart(on_one)
        on_one.serve.numbers = {2: numbers(ok=5)}
        if phase is P.WATCHING:
            on_one.step()
    on_one.until(P.STEADY)

    assert (on_one.serving, on_one.answer.outcome) == (2, Outcome.COMMITTED)
    if phase is P.WATCHING and restart is not restart_sync:
        assert on_one.answer.evidence["requests"] == 5 * (update.MAX_INTERRUPTIONS + 2)


@pytest.mark.parametrize("action", ["load", "activate"])
def test_restarts_of_serve_in_the_middle_of_a_switch_are_nobodys_fault(action, on_one: Bench):
    left = update.MAX_INTERRUPTIONS + 2

    def end(asked: str, version: int | None) -> None:
        nonlocal left
        if (asked, version) == (action, 2) and left:
            left -= 1
            on_one.serve.restart()
            raise ServeAway("connection reset", sent=True)

    on_one.serve.fault = end
    on_one.want(2)
    on_one.step()
    on_one.until(P.STEADY)

    assert (left, on_one.serving, on_one.answer.outcome) == (0, 2, Outcome.COMMITTED)


def test_a_crash_among_orderly_restarts_is_found(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.step()
    on_one.serve.restart()
    on_one.serve.start()
    on_one.serve.restart()

    on_one.until(P.QUARANTINED)
    assert on_one.answer.reason == Reason.SERVE_CRASHED.value


def test_serve_stopped_for_hours_in_the_watch_is_waited_for(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.step()
    on_one.serve.end()
    on_one.clock.pass_(3 * 3600)
    for _ in range(200):
        on_one.step()
    assert on_one.phase is P.WATCHING
    on_one.serve.away = False
    on_one.serve.start()

    on_one.until(P.STEADY)
    assert (on_one.serving, on_one.answer.outcome) == (2, Outcome.COMMITTED)


def test_a_reboot_in_the_watch_is_not_the_releases_fault(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.boot = "boot-2"
    on_one.serve.start()
    on_one.again()

    on_one.until(P.STEADY)
    assert on_one.serving == 2


def test_reboot_after_reboot_in_the_watch_is(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    for n in range(update.MAX_INTERRUPTIONS + 1):
        on_one.boot = f"boot-{n + 2}"
        on_one.serve.start()
        on_one.again()
        on_one.step()

    on_one.until(P.QUARANTINED)
    assert on_one.answer.reason == Reason.INTERRUPTED_TOO_OFTEN.value


def test_power_cuts_while_its_trial_waits_for_its_turn_are_not_counted_against_the_release(on_one: Bench):
    def power_cut(_stop):
        raise Killed

    on_one.want(2)
    on_one.step()
    on_one.until(P.TRIALING)
    on_one.tried.clear()
    on_one.queue = power_cut
    for _ in range(update.MAX_INTERRUPTIONS + 3):
        with pytest.raises(Killed):
            on_one.step()
        on_one.again()
    assert on_one.tried == []
    on_one.queue = lambda _stop: None
    on_one.until(P.STEADY, P.QUARANTINED)

    assert on_one.serving == 2


def test_an_orderly_end_while_its_trial_waits_leaves_what_was_counted(on_one: Bench):
    def power_cut(*_):
        raise Killed

    def told_to_stop(_stop):
        raise Stopped

    on_one.want(2)
    on_one.step()
    on_one.until(P.TRIALING)
    on_one.trial = power_cut
    for times in range(1, 3):
        with pytest.raises(Killed):
            on_one.step()
        on_one.again()
        assert on_one.updater.state.interruptions == times
    on_one.queue = told_to_stop
    for _ in range(3):
        with pytest.raises(Stopped):
            on_one.updater.step(lambda: True)
        on_one.updater.leave()
        on_one.again()

    assert on_one.updater.state.interruptions == 2


def test_an_orderly_end_in_a_trial_is_not_counted_against_the_release(on_one: Bench):
    def told_to_stop(_request, _timeout_s, stop):
        assert stop()
        raise Stopped

    on_one.want(2)
    on_one.step()
    on_one.until(P.TRIALING)
    on_one.trial = told_to_stop
    for _ in range(update.MAX_INTERRUPTIONS + 3):
        with pytest.raises(Stopped):
            on_one.updater.step(lambda: True)
        on_one.updater.leave()
        on_one.again()
    on_one.trial = lambda *_: {}
    on_one.until(P.STEADY)

    assert on_one.serving == 2
