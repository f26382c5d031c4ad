"""Something else is wanted in the middle of an update: a newer release, the one before, or none."""

from __future__ import annotations

import pytest

from agent.contract.acceptance import WatchRules
from agent.contract.reasons import Reason
from agent.contract.reports import Phase
from tests.sync.bench import MODEL, Bench
from tests.sync.stories import selected, stop_in

P = Phase
WATCH = WatchRules(duration_s=10.0, max_duration_s=60.0)


@pytest.mark.parametrize("phase", [P.FETCHING, P.TRIALING, P.SHADOWING, P.WAITING, P.ACTIVATING, P.WATCHING])
def test_a_newer_release_overtakes(phase, on_one: Bench):
    on_one.release(3)
    stop_in(on_one, phase)
    on_one.want(3)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.until(P.STEADY)

    assert on_one.serving == 3
    assert on_one.records.quarantine.entries(MODEL) == ()


@pytest.mark.parametrize("phase", [P.FETCHING, P.TRIALING, P.SHADOWING, P.WAITING, P.ACTIVATING, P.WATCHING])
def test_back_to_what_serves(phase, on_one: Bench):
    """The operator aborts the rollout."""
    stop_in(on_one, phase)
    on_one.want(1)
    on_one.step()
    on_one.until(P.STEADY)
    on_one.step()

    assert on_one.serving == 1
    assert selected(on_one).active.version == 1
    assert on_one.serve.loaded[MODEL].keys() == {1}
    assert on_one.records.quarantine.entries(MODEL) == ()


@pytest.mark.parametrize("phase", [P.FETCHING, P.TRIALING, P.WAITING, P.ACTIVATING, P.WATCHING, P.STEADY])
def test_withdrawn_at_any_point(phase, on_one: Bench):
    stop_in(on_one, phase) if phase is not P.STEADY else on_one.install(2)
    on_one.want(1, withdrawn=(2,))
    on_one.step()
    on_one.until(P.STEADY)
    on_one.step()
    on_one.until(P.STEADY)

    assert on_one.serving == 1


def test_a_model_that_is_wanted_no_more_is_unloaded(on_one: Bench):
    on_one.want(None)
    on_one.step()

    assert on_one.serving is None
    assert on_one.store.selection(MODEL) is None
    on_one.want(2)
    on_one.step()
    on_one.until(P.STEADY)
    assert on_one.serving == 2


def test_nobody_may_run_a_withdrawn_first_release(bench: Bench):
    bench.release(1, watch=WATCH)
    bench.want(1)
    bench.step()
    bench.until(P.WATCHING)
    bench.want(1, withdrawn=(1,))
    bench.step()
    bench.until(P.STEADY)

    assert bench.serving is None
    assert bench.answer.reason == Reason.WITHDRAWN.value
