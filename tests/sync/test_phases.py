"""The way of a release through its phases, and what is on disk before `serve` is told."""

from __future__ import annotations

import msgspec

from agent.contract.acceptance import WatchRules
from agent.contract.assignment import Exclusion, ModelAssignment, Rollout
from agent.contract.reports import Outcome, Phase
from agent.store import Choice
from tests.sync.bench import MODEL, Bench
from tests.sync.stories import selected

P = Phase
WATCH = WatchRules(duration_s=10.0, max_duration_s=60.0)


def test_a_release_goes_through_every_phase(bench: Bench):
    bench.release(1, watch=WATCH)
    bench.want(1)
    bench.step()

    assert bench.until(P.STEADY) == [P.FETCHING, P.TRIALING, P.ACTIVATING, P.WATCHING, P.STEADY]
    assert bench.serving == 1
    assert selected(bench).active == Choice(version=1, variant="cpu")
    assert (bench.answer.release, bench.answer.outcome) == (1, Outcome.COMMITTED)
    assert bench.news == ["update-started", "committed"]
    assert bench.tried == ["crane:1"]


def test_the_next_release_keeps_the_one_before_until_it_is_committed(on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)

    assert on_one.serve.active == {MODEL: 2}
    assert on_one.serve.previous == {MODEL: 1}
    assert selected(on_one).previous == Choice(version=1, variant="cpu")
    on_one.until(P.STEADY)

    assert on_one.serve.calls == [("load", 2), ("activate", 2), ("commit", None)]
    assert on_one.serve.loaded[MODEL].keys() == {2}


def test_it_is_selected_on_disk_before_serve_is_told(on_one: Bench):
    at_activate = []
    on_one.serve.fault = lambda action, _: at_activate.append(selected(on_one).active.version) if action == "activate" else None
    on_one.want(2)
    on_one.step()
    on_one.until(P.WATCHING)

    assert at_activate == [2]


def test_back_to_a_lower_release_that_was_committed_here_skips_the_trial(on_one: Bench):
    on_one.install(2)
    on_one.tried.clear()
    on_one.source.asked.clear()
    on_one.want(1)
    on_one.step()

    assert on_one.until(P.STEADY) == [P.FETCHING, P.ACTIVATING, P.WATCHING, P.STEADY]
    assert on_one.serving == 1
    assert on_one.tried == []
    assert on_one.source.asked == []


def test_a_committed_release_whose_file_was_damaged_since_is_tried_again(on_one: Bench):
    on_one.install(2)
    manifest = on_one.signed[next(ref for ref in on_one.signed if ref.version == 1)].manifest
    on_one.store.file(manifest, "model.script").unlink()
    on_one.tried.clear()
    on_one.want(1)
    on_one.step()
    on_one.until(P.WATCHING)

    assert on_one.tried == []  # it was fetched again, whole and verified: what was proved holds


def test_a_release_that_serves_already_answers_a_new_rollout(on_one: Bench):
    on_one.want(1, rollout=Rollout(id="again", release=1, previous=None, permille=1000))
    on_one.step()

    assert (on_one.answer.rollout, on_one.answer.outcome) == ("again", Outcome.COMMITTED)
    reports = on_one.reports
    on_one.step()
    assert on_one.reports == reports


def test_a_release_that_is_stopped_for_this_kind_of_hardware_is_left(on_one: Bench):
    on_one.install(2)
    rules = {
        "another kind": ModelAssignment(release=2, excluded=(Exclusion(release=2, hardware="aarch64/-/cuda", instead=1),)),
        "this kind": ModelAssignment(release=2, excluded=(Exclusion(release=2, hardware="x86_64/-/-", instead=1),)),
    }
    for kind, serving in (("another kind", 2), ("this kind", 1)):
        on_one.want(2)
        on_one.assignment = msgspec.structs.replace(on_one.assignment, models={MODEL: rules[kind]})
        on_one.step()
        on_one.until(P.STEADY)
        on_one.step()
        assert on_one.serving == serving
