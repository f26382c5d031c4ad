"""Copies of live requests and a share of them, with the two real processes and an app that never stops asking."""

from __future__ import annotations

import pytest

from agent.client import Client
from agent.contract.acceptance import CanaryRules, ShadowRules, WatchRules
from tests.sync.conftest import eventually
from tests.sync.test_process import MODEL
from tests.sync.with_serve.conftest import App, Real

pytestmark = pytest.mark.timeout(90)
SHADOW = ShadowRules(
    required=True, share=1.0, max_rate=200.0, min_samples=20, min_agreement=0.9, duration_s=0.5, max_duration_s=30.0
)
CANARY = CanaryRules(share=0.2, duration_s=0.5, max_duration_s=30.0, min_requests=10)


def loaded(device: Real) -> set[str]:
    with Client(device.socket) as client:
        return set(client.status()["models"][MODEL]["versions"])


def test_one_that_answers_otherwise_is_refused_and_no_app_saw_it(device: Real, app: App):
    device.offer(2, 2.0, shadow=SHADOW)
    eventually(lambda: device.phase() == "quarantined", "the refusal", 30)

    assert device.answer()["outcome"] == "refused"
    assert device.answer()["reason"] == "shadow_disagrees"
    assert device.answer()["evidence"]["samples"] >= 20
    assert set(app.factors) == {1.0}
    assert app.errors == []
    eventually(lambda: loaded(device) == {"1"}, "its memory to go back", 30)


def test_one_that_answers_alike_goes_on_and_answers_a_share_before_all(device: Real, app: App):
    device.offer(2, 1.001, shadow=SHADOW, canary=CANARY)
    eventually(lambda: device.phase() == "canarying", "its share", 30)
    eventually(lambda: device.serves_at_rest(2), "release 2", 30)

    first = next(i for i, factor in enumerate(app.factors) if factor > 1.0)
    assert 1.0 in app.factors[first:], "for a while both answered"
    assert app.factors[-1] > 1.0
    assert app.errors == []
    assert app.rejected == 0
    assert device.answer()["outcome"] == "committed"


def test_a_share_that_is_refused_ends_at_once(device: Real, app: App):
    """A model for inputs that nobody here sends: a fifth of the requests meets it until ten have."""
    watch = WatchRules(duration_s=30.0, min_requests_to_judge=10)
    device.offer(2, 1.0, width=5, canary=CANARY, watch=watch)
    eventually(lambda: device.phase() == "quarantined", "the rollback", 30)
    rejected, seen = app.rejected, len(app.factors)
    eventually(lambda: len(app.factors) > seen + 20, "answers again")

    assert (device.answer()["outcome"], device.answer()["reason"]) == ("rolled_back", "error_ratio")
    assert app.rejected == rejected >= 10
    assert device.active == 1
    assert app.errors == []


def test_serve_killed_while_it_looks_counts_against_the_release(device: Real, app: App):
    device.offer(2, 1.0, shadow=ShadowRules(required=True, share=1.0, duration_s=60.0, max_duration_s=60.0))
    eventually(lambda: device.phase() == "shadowing", "the look", 30)
    eventually(lambda: loaded(device) == {"1", "2"}, "both", 30)
    device.real.kill()
    device.real.start()
    eventually(lambda: device.phase() == "quarantined", "the refusal", 30)

    assert device.answer()["reason"] == "serve_crashed"
    assert device.active == 1
    assert set(app.factors) == {1.0}


def test_sync_killed_while_it_looks_goes_on(device: Real, app: App):
    device.offer(2, 1.0, shadow=SHADOW, canary=CANARY)
    eventually(lambda: device.phase() in ("shadowing", "canarying"), "the look", 30)
    device.kill()
    device.start()
    eventually(lambda: device.serves_at_rest(2), "release 2", 30)

    assert app.errors == []
    assert app.rejected == 0
