"""What is counted of answers for the fleet, and that a real server tells it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from agent.client import Client
from agent.contract.codec import decode
from agent.contract.telemetry import ServeFigures, median_ms
from agent.serving.models.outputs import OutputSketch
from agent.serving.models.stats import FRESH_REQUESTS, Stats
from runtimes.contract import Quantization, TensorSpec
from tests.serving.server import request

SCORES = TensorSpec("scores", "FP32", (-1, 4))


def looked(*arrays: np.ndarray, specs: tuple[TensorSpec, ...] = (SCORES,), outputs: list[str] | None = None) -> dict:
    sketch = OutputSketch()
    for at, array in enumerate(arrays):
        sketch.take(specs, outputs, [array], at * 1000.0)
    return sketch.counts()


def test_best_classes_and_how_sure_they_are() -> None:
    probabilities = np.array([[0.1, 0.7, 0.1, 0.1], [0.95, 0.05, 0, 0]], np.float32)
    assert looked(probabilities) == {"rows": 2, "unusable": 0, "classes": {0: 1, 1: 1}, "confidence": {7: 1, 9: 1}}


def test_scores_that_are_no_probabilities_are_made_some() -> None:
    logits = np.array([[0.0, 100.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0]], np.float32)
    assert looked(logits)["confidence"] == {2: 1, 9: 1}  # a quarter each; all but certain


def test_rows_that_are_no_numbers_are_counted_apart() -> None:
    rows = np.array([[np.nan, 1, 0, 0], [0, 1, 0, 0], [0, np.inf, 0, 0]], np.float32)
    assert looked(rows) == {"rows": 3, "unusable": 2, "classes": {1: 1}, "confidence": {9: 1}}


def test_quantized_scores_are_what_they_stand_for() -> None:
    spec = TensorSpec("scores", "INT8", (-1, 2), quantization=Quantization((1 / 256,), (-128,)))
    assert looked(np.array([[127, -128]], np.int8), specs=(spec,))["confidence"] == {9: 1}


def test_more_classes_than_are_kept_are_folded() -> None:
    one = np.zeros((1, 1000), np.float32)
    one[0, 999] = 1.0
    assert looked(one)["classes"] == {999 % 32: 1}


def test_outputs_that_are_no_scores_are_only_numbers_or_not() -> None:
    boxes = np.ones((1, 10, 4), np.float32)
    broken = np.full((1, 10, 4), np.nan, np.float32)
    assert looked(boxes, broken) == {"rows": 2, "unusable": 1, "classes": {}, "confidence": {}}
    assert looked(np.array([b"text"], np.object_))["rows"] == 0


def test_the_output_that_was_asked_for_is_the_one_that_is_looked_at() -> None:
    other = TensorSpec("other", "FP32", (-1, 3))
    assert looked(np.eye(3, dtype=np.float32), specs=(SCORES, other), outputs=["other"])["classes"] == {0: 1, 1: 1, 2: 1}


def test_what_a_runtime_should_never_make_is_left_alone() -> None:
    assert looked(None, object(), np.ones((1, 4), np.float32))["rows"] == 1  # type: ignore[arg-type]


def test_no_more_than_ten_answers_a_second_are_looked_at() -> None:
    sketch, row = OutputSketch(), np.ones((1, 4), np.float32)
    for at in range(1000):
        now = at / 1000
        if now >= sketch.next_s:
            sketch.take((SCORES,), None, [row], now)
    assert 1 <= sketch.rows <= 10


def test_latencies_of_threads_at_work_are_all_counted() -> None:
    stats = Stats()
    for at in range(FRESH_REQUESTS * 2 + 3):
        stats.succeeded(at, 0.0, 0.0, 0.0, at + 0.002)
    counts = stats.counts()
    assert counts["ok"] == FRESH_REQUESTS * 2 + 3
    assert median_ms(counts["latency"]) == pytest.approx(2.0, rel=0.05)  # type: ignore[arg-type]


@pytest.mark.parametrize("sketches", [True, False])
def test_a_server_tells_what_it_counted(device, sketches: bool) -> None:
    server = device.server(output_sketches=sketches)
    server.start()
    x = np.ones((2, 4), np.float32)
    with Client(server.socket) as client:
        for _ in range(3):
            client.infer("scale", {"x": x})
    server.raw(request("POST", "/v2/models/scale/infer", body=b"{}"))
    status, _, body = server.raw(request("GET", "/control/v1/telemetry"))
    told = decode(body, ServeFigures, limit_bytes=1 << 20)
    assert status == 200
    assert json.loads(server.raw(request("GET", "/control/v1/status"))[2])["instance"] == told.instance
    (one,) = [counted for counted in told.counters if counted.model == "scale"]
    assert (one.figures.ok, one.figures.invalid) == (3, 1)
    assert one.figures.rows in ({2, 4, 6} if sketches else {0}), (
        "the first answer is looked at, the others when there is time for it"
    )
