"""What a release waits for before it may serve, and what an operator on the device says."""

from __future__ import annotations

import datetime as dt

import pytest

from agent.contract.assignment import Rollout, Window
from agent.contract.reasons import Reason
from agent.contract.reports import Phase
from agent.store import StoreError
from agent.sync.operator import actions
from agent.sync.problems import Problem
from tests.sync.bench import MODEL, Bench
from tests.sync.fleet import DAY

P = Phase


def test_a_window_is_waited_for(on_one: Bench):
    local = dt.datetime.fromtimestamp(on_one.clock.wall()).astimezone()
    minute = (local.hour * 60 + local.minute + 120) % 1440
    window = Window(start_minute=minute, end_minute=(minute + 60) % 1440)
    on_one.want(1, rollout=Rollout(id="tonight", release=2, previous=1, permille=1000, window=window))
    on_one.step()
    on_one.until(P.WAITING)
    assert on_one.serving == 1
    assert on_one.updater.state.waiting_for == "window"
    on_one.again()
    on_one.until(P.STEADY, steps=2000)

    assert on_one.serving == 2
    assert on_one.answer.rollout == "tonight"
    waited_s = on_one.clock.wall() - local.timestamp()
    assert 118 * 60 < waited_s < 125 * 60


def test_a_shadow_rollout_is_tried_and_does_not_serve_until_it_may(on_one: Bench):
    shadow = Rollout(id="look-first", release=2, previous=1, permille=1000, mode="shadow")
    on_one.want(1, rollout=shadow)
    on_one.step()
    on_one.until(P.SHADOWING)
    for _ in range(5):
        on_one.step()
    assert on_one.phase is P.SHADOWING
    assert on_one.serving == 1
    assert on_one.tried == ["crane:2"]
    on_one.want(1, rollout=Rollout(id="look-first", release=2, previous=1, permille=1000))
    on_one.until(P.STEADY)

    assert on_one.serving == 2
    assert on_one.tried == ["crane:2"]


def test_a_held_model_stays_as_it_is(on_one: Bench):
    actions.hold(on_one.store, MODEL)
    on_one.want(2)
    for _ in range(5):
        on_one.step()
    assert on_one.phase is P.STEADY
    assert on_one.updater.held
    on_one.records.holds.unhold(MODEL)
    on_one.step()
    on_one.until(P.STEADY)

    assert on_one.serving == 2


def test_an_operator_goes_back_by_hand_without_a_network(on_one: Bench):
    on_one.install(2)
    on_one.manifest_problem = Problem(Reason.DOWNLOAD_FAILED, "unplugged")
    on_one.clock.pass_(30 * DAY)
    assert actions.roll_back(on_one.store, MODEL, None) == 1
    on_one.step()
    on_one.until(P.STEADY)
    for _ in range(5):
        on_one.step()

    assert on_one.serving == 1
    assert on_one.phase is P.STEADY


def test_going_back_by_hand_during_a_watch(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    assert actions.roll_back(on_one.store, MODEL, None) == 1
    on_one.until(P.STEADY)

    assert on_one.serving == 1


def test_a_withdrawal_is_stronger_than_a_hold(on_one: Bench):
    on_one.install(2)
    actions.hold(on_one.store, MODEL)
    on_one.want(1, withdrawn=(2,))
    on_one.step()
    on_one.until(P.STEADY)

    assert on_one.serving == 1


def test_there_may_be_nothing_to_go_back_to(on_one: Bench):
    with pytest.raises(StoreError, match="nothing to roll back to"):
        actions.roll_back(on_one.store, MODEL, None)
