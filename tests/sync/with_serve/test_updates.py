"""Updates while an app asks, with both real processes."""

from __future__ import annotations

import json

import pytest

from agent.client import Client
from agent.contract.acceptance import WatchRules
from agent.contract.assignment import Assignment, ModelAssignment
from tests.sync.conftest import eventually
from tests.sync.fleet import onnx_release
from tests.sync.test_process import MODEL
from tests.sync.with_serve.conftest import App, Real

pytestmark = pytest.mark.timeout(90)


def test_an_update_under_load_fails_no_request(device: Real, app: App):
    device.offer(2, 2.0)
    eventually(lambda: device.serves_at_rest(2), "release 2", 30)
    seen = len(app.factors)
    eventually(lambda: len(app.factors) > seen + 20, "more answers")

    assert app.errors == []
    assert app.rejected == 0
    assert set(app.factors) == {1.0, 2.0}
    assert app.factors == sorted(app.factors), "no answer of the old release after the first of the new one"
    assert device.answer()["outcome"] == "committed"
    assert device.answer()["evidence"]["requests"] >= 20


def test_a_release_that_answers_wrong_never_serves(device: Real, app: App):
    device.offer(2, 3.0, expect=2.0)
    eventually(lambda: device.phase() == "quarantined", "the refusal", 30)

    assert device.answer()["reason"] == "golden_mismatch"
    assert set(app.factors) == {1.0}
    assert app.errors == []


def test_a_release_that_refuses_its_callers_is_rolled_back(device: Real, app: App):
    """It is a good model, for inputs that nobody here sends."""
    device.offer(2, 2.0, width=5, watch=WatchRules(duration_s=30.0, min_requests_to_judge=10))
    eventually(lambda: device.phase() == "quarantined", "the rollback", 30)
    seen = len(app.factors)
    eventually(lambda: len(app.factors) > seen + 20, "answers again")

    assert device.answer()["reason"] == "error_ratio"
    assert device.answer()["outcome"] == "rolled_back"
    assert app.rejected >= 10
    assert app.errors == []
    assert device.active == 1


def test_serve_killed_in_the_watch_costs_the_release_its_place(device: Real, app: App):
    device.offer(2, 2.0, watch=WatchRules(duration_s=60.0, max_crashes=0))
    eventually(lambda: device.phase() == "watching", "the watch", 30)
    device.real.kill()
    device.real.start()
    eventually(lambda: device.phase() == "quarantined", "the rollback", 30)
    seen = len(app.factors)
    eventually(lambda: len(app.factors) > seen + 20, "answers again")

    assert device.answer()["reason"] == "serve_crashed"
    assert device.active == 1
    assert app.factors[-1] == 1.0


def test_serve_killed_less_often_than_allowed_does_not(device: Real, app: App):
    device.offer(2, 2.0, watch=WatchRules(duration_s=3.0, max_duration_s=20.0, max_crashes=1))
    eventually(lambda: device.phase() == "watching", "the watch", 30)
    device.real.kill()
    device.real.start()
    eventually(lambda: device.serves_at_rest(2), "release 2", 30)

    assert device.answer()["evidence"]["crashes"] == 1


def test_wanted_no_more(device: Real, app: App):
    app.stop()
    device.repository.assign(MODEL, None)
    eventually(lambda: device.store.selection(MODEL) is None, "the end", 30)

    eventually(lambda: device.active is None, "the unloading", 30)


def test_two_models_switch_together(device: Real):
    """The real route, under a client that asks both all the time."""
    first = WatchRules(duration_s=0.2)
    for model, factor in (("arm", 1.0), ("eye", 10.0)):
        device.repository.publish(*onnx_release(device.folder / model, 1, factor, model=model, watch=first))
    want(device, {"arm": 1, "eye": 1})
    device.start()
    eventually(lambda: serving(device) == {"arm": 1, "eye": 1}, "the first releases", 30)
    for model, factor in (("arm", 2.0), ("eye", 20.0)):
        device.repository.publish(*onnx_release(device.folder / model, 2, factor, model=model, watch=first))
    want(device, {"arm": 2, "eye": 2}, team=True)
    seen = set()

    def done() -> bool:
        seen.add(tuple(sorted(serving(device).items())))
        return serving(device) == {"arm": 2, "eye": 2} and not states(device) - {"steady"}

    eventually(done, "the switch of both", 30)
    assert seen <= {(("arm", 1), ("eye", 1)), (("arm", 2), ("eye", 2))}, "one status of serve never shows a mixture"


def want(device: Real, releases: dict[str, int], *, team: bool = False) -> None:
    before = device.repository.assignment
    models = {model: ModelAssignment(release=release) for model, release in releases.items()}
    teams = {"g": releases} if team else {}
    device.repository.assignment = Assignment(fleet=before.fleet, version=before.version + 1, models=models, teams=teams)
    device.repository.sign()


def serving(device: Real) -> dict[str, int | None]:
    with Client(device.socket) as client:
        return {model: said["active"] for model, said in client.status()["models"].items()}


def states(device: Real) -> set[str]:
    folder = device.store.private / "updates"
    return {json.loads(path.read_bytes())["phase"] for path in folder.glob("[a-z]*.json")}
