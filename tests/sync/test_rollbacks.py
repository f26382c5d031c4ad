"""A release that does badly in its watch: what serves again, and what is remembered of it."""

from __future__ import annotations

import errno
import os

import pytest

from agent.contract.acceptance import WatchRules
from agent.contract.reasons import Reason
from agent.contract.reports import Outcome, Phase
from agent.sync.serving import ServeRefused
from tests.sync.bench import MODEL, Bench, numbers
from tests.sync.stories import selected

P = Phase
WATCH = WatchRules(duration_s=10.0, max_duration_s=60.0)
BAD_NUMBERS = [
    ("failing", numbers(90, run=10), Reason.ERROR_RATIO),
    ("refusing its callers", numbers(90, invalid=10), Reason.ERROR_RATIO),
    ("slow", numbers(100, slow=50), Reason.LATENCY_RATIO),
]


@pytest.mark.parametrize(("how", "said", "reason"), BAD_NUMBERS, ids=[row[0] for row in BAD_NUMBERS])
def test_a_bad_release_is_rolled_back_and_remembered(how, said, reason, on_one: Bench):
    on_one.serve.numbers[1] = numbers(1000)
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.serve.numbers[2] = said

    assert on_one.until(P.QUARANTINED) == [P.WATCHING, P.ROLLING_BACK, P.QUARANTINED]
    assert on_one.serving == 1
    assert selected(on_one).active.version == 1
    assert (on_one.answer.outcome, on_one.answer.reason) == (Outcome.ROLLED_BACK, reason.value)
    on_one.again()
    for _ in range(10):
        on_one.step()
    assert on_one.phase is P.QUARANTINED
    assert on_one.tried == ["crane:2"]


def test_a_crash_of_serve_in_the_watch_is_the_releases_fault(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.step()
    on_one.serve.start()

    on_one.until(P.QUARANTINED)
    assert on_one.answer.reason == Reason.SERVE_CRASHED.value
    assert on_one.serving == 1


def test_serve_gone_for_long_is_a_crash_and_rolling_back_waits_for_it(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.serve.away = True
    on_one.until(P.ROLLING_BACK)
    for _ in range(50):
        on_one.step()
    assert on_one.phase is P.ROLLING_BACK
    assert selected(on_one).active.version == 1, "when serve starts again it loads what is right"
    on_one.serve.away = False
    on_one.serve.start()

    on_one.until(P.QUARANTINED)
    assert on_one.serving == 1


def test_the_first_release_of_a_model_can_be_rolled_back_to_nothing(bench: Bench):
    bench.release(1, watch=WATCH)
    bench.want(1)
    bench.step()
    bench.until(P.WATCHING)
    bench.serve.numbers[1] = numbers(10, run=90)

    bench.until(P.QUARANTINED)
    assert bench.serving is None
    assert bench.store.selection(MODEL) is None


def test_a_first_release_is_not_blamed_for_callers_that_ask_wrongly(bench: Bench):
    bench.release(1, watch=WATCH)
    bench.want(1)
    bench.step()
    bench.until(P.WATCHING)
    bench.serve.numbers[1] = numbers(50, invalid=50)

    bench.until(P.STEADY)
    assert bench.serving == 1


def test_a_watch_goes_on_after_its_word_expired(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.valid_s = -1.0
    on_one.until(P.STEADY)

    assert on_one.serving == 2


def test_a_roll_back_that_serve_refuses_does_not_keep_a_fixed_release_out(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.serve.numbers[2] = numbers(10, run=90)

    def refuse(action: str, version: int | None) -> None:
        if action == "rollback":
            raise ServeRefused(422, "model_invalid", "the disk ate it")

    on_one.serve.fault = refuse
    on_one.until(P.QUARANTINED)
    assert "the disk ate it" in on_one.answer.message
    on_one.serve.fault = lambda *_: None
    on_one.serve.numbers.clear()
    on_one.release(3)
    on_one.want(3)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.until(P.STEADY)

    assert on_one.serving == 3


def test_a_rollback_that_cannot_be_selected_on_disk_still_protects_callers(on_one: Bench, monkeypatch: pytest.MonkeyPatch):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)
    on_one.serve.numbers[2] = numbers(10, run=90)
    on_one.until(P.ROLLING_BACK)

    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(on_one.store, "select", full)
    on_one.step()
    assert on_one.serving == 1
    assert on_one.phase is P.ROLLING_BACK
    monkeypatch.undo()
    on_one.until(P.QUARANTINED)
    assert selected(on_one).active.version == 1
