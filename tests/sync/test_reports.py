"""What a device says of itself, and that it is signed."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

from agent.contract.codec import decode
from agent.contract.reports import (
    EVENT_PAYLOAD_TYPE,
    MAX_EVENT_BYTES,
    MAX_REPORT_BYTES,
    STATE_PAYLOAD_TYPE,
    Answer,
    Event,
    Hardware,
    Outcome,
    Phase,
    StateReport,
)
from agent.sync.fleet.counters import Counter
from agent.sync.fleet.reports import Reporter, Signer, model_state
from agent.sync.serving import ModelStatus, ServeStatus, VersionStatus
from agent.sync.updating.update import UpdateState


class View:
    def __init__(self, state: UpdateState) -> None:
        self.state, self.progress, self.held, self.stopped = state, 0.25, False, None


class Kept:
    def __init__(self) -> None:
        self.items: list[tuple[str, bytes]] = []

    def put(self, kind: str, payload: bytes) -> None:
        self.items.append((kind, payload))


def a_model(**changes):
    version = VersionStatus(version=2, variant="cpu", state="READY", sha256="f" * 64)
    return ModelStatus(active=2, previous=1, versions={"2": msgspec.structs.replace(version, **changes)})


def test_a_report_says_what_serve_says():
    state = UpdateState(model="crane", phase=Phase.FETCHING, wanted=3, target=3)

    ready = model_state(View(state), a_model(), (), 1)
    broken = model_state(View(state), a_model(state="UNAVAILABLE"), (), 1)
    away = model_state(View(state), ModelStatus(), (), 1)

    assert (ready.serving, ready.sha256, ready.progress, ready.target) == (2, "f" * 64, 0.25, 3)
    assert (broken.serving, broken.sha256) == (None, None)
    assert away.serving is None


@pytest.fixture
def reporter(identity, clock, tmp_path: Path):
    kept = Kept()
    counter = Counter(tmp_path / "counter.json", clock)
    return Reporter("crane-7", Signer(identity.key), kept, counter, clock, lambda: Hardware(arch="x86_64")), kept


def test_a_report_is_signed_with_the_key_of_the_certificate(reporter, identity):
    reporting, kept = reporter
    first = reporting.report({}, None, None, 5, "a problem")
    second = reporting.report({}, ServeStatus("life-1"), None, 5, None)

    assert second.counter > first.counter
    envelope = Envelope.from_dict(json.loads(kept.items[1][1]))
    assert envelope.payload_type == STATE_PAYLOAD_TYPE
    envelope.verify([SSlibKey.from_crypto(identity.certificate.public_key())], 1)
    assert decode(envelope.payload, StateReport, limit_bytes=MAX_REPORT_BYTES) == second


def test_restarts_of_serve_are_counted(reporter):
    reporting, _ = reporter
    lives = [ServeStatus("a"), ServeStatus("a"), None, ServeStatus("b"), ServeStatus("c")]

    assert [reporting.report({}, life, None, 1, None).serve_restarts for life in lives] == [0, 0, 0, 1, 2]


def test_a_report_of_very_many_models_fits(reporter):
    reporting, kept = reporter
    answer = Answer(release=1, outcome=Outcome.REFUSED, message="x" * 500)
    state = UpdateState(model="crane", answers=(answer,) * 10)
    models = {f"model-{n}": model_state(View(state), a_model(), (answer,) * 10, None) for n in range(100)}
    reporting.report(models, None, None, 1, None)

    assert len(kept.items[0][1]) <= MAX_REPORT_BYTES


def test_events_are_signed_and_have_an_id_of_their_own(reporter, identity):
    reporting, kept = reporter
    for _ in range(2):
        reporting.event("refused", "no", model="crane", release=3, reason="too_slow")
    envelopes = [Envelope.from_dict(json.loads(payload)) for _, payload in kept.items]
    for envelope in envelopes:
        assert envelope.payload_type == EVENT_PAYLOAD_TYPE
        envelope.verify([SSlibKey.from_crypto(identity.certificate.public_key())], 1)
    events = [decode(envelope.payload, Event, limit_bytes=MAX_EVENT_BYTES) for envelope in envelopes]

    assert events[0].id != events[1].id
    assert (events[0].model, events[0].release, events[0].reason) == ("crane", 3, "too_slow")
