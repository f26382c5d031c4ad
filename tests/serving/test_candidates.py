"""A candidate beside the active version of a real server: on copies of live requests, and on a share of them."""

import json
import os
import signal
import threading
import time

import numpy as np
import pytest

from agent.client import Client, ClientError
from tests.serving import onnx_models
from tests.serving.server import DEADLINE_S
from tests.serving.test_control import entry, factor, post

X = np.ones((1, 4), np.float32)
ANY = {"shadow_max_load": 0, "shadow_max_celsius": 0}


@pytest.fixture
def server(device):
    return device.server(**ANY).start()


@pytest.fixture
def client(server):
    with Client(server.socket) as made:
        yield made


def shadow(client, model="scale"):
    status, _, answer = client.request("GET", f"/control/v1/models/{model}/shadow")
    assert status == 200
    return json.loads(answer)


def until(client, condition, what, ask=factor):
    """Asks until the shadow's numbers are so."""
    end = time.monotonic() + DEADLINE_S
    while not condition(found := shadow(client)):
        assert time.monotonic() < end, f"{what}: {found}"
        ask(client)
    return found


def begin(client, version=2, **options):
    assert post(client, "load", {"version": version, "variant": "cpu"})[0] == 200
    status, found = post(client, "shadow", {"version": version, "share": 1.0, "max_rate": 1000, **options})
    assert (status, found["state"]) == (200, "running"), found
    return found


def metrics(client):
    lines = client.request("GET", "/metrics")[2].decode().splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


# -- on copies ------------------------------------------------------------------------------------------------------------------


def test_a_candidate_that_answers_otherwise_is_seen_and_nobody_notices(client):
    begin(client)
    answers = set()
    found = until(client, lambda s: s["samples"] >= 20, "samples", lambda c: answers.add(factor(c)))
    assert answers == {1.0}
    assert (found["agreed"], found["flips"], found["errors"]) == (0, 0, {"invalid": 0, "run": 0})
    assert found["outputs"]["y"]["max_difference"] == 1.0
    assert found["latency"]["pairs"] == sum(found["latency"]["counts"]) > 0
    assert found["latency"]["median_ratio"] > 0
    assert entry(client)["versions"]["2"]["stats"]["requests"] == 0, "copies are nobody's requests"
    told = metrics(client)
    assert float(told['edge_shadow_samples_total{model="scale",version="2"}']) >= 20
    assert told['edge_shadow_running{model="scale",version="2"}'] == "1"


def test_one_that_answers_alike_agrees(device, client, tmp_path):
    device.release("scale", 4, onnx_models.scale(tmp_path / "alike.onnx", 1.0001))
    begin(client, 4)
    found = until(client, lambda s: s["samples"] >= 10, "samples")
    assert (found["agreed"], found["rows"], found["flips"]) == (found["samples"], found["samples"], 0)


def test_a_tolerance_may_be_given(client):
    begin(client, tolerance={"y": {"atol": 2.0, "rtol": 0.0}})
    found = until(client, lambda s: s["samples"] >= 5, "samples")
    assert found["agreed"] == found["samples"]


def test_another_best_class_is_a_flip(device, client, tmp_path):
    device.release("scale", 4, onnx_models.scale(tmp_path / "turned.onnx", -1.0))
    begin(client, 4)
    climbing = np.array([[1, 2, 3, 4]], np.float32)
    found = until(client, lambda s: s["samples"] >= 5, "samples", lambda c: c.infer("scale", climbing))
    assert found["flips"] == found["rows"] == found["samples"]


def test_one_that_takes_other_inputs_fails_until_it_has_failed_hard(device, client, tmp_path):
    device.release("scale", 4, onnx_models.scale(tmp_path / "wide.onnx", 1.0, width=5))
    begin(client, 4)
    found = until(client, lambda s: s["state"] == "ended", "the end")
    assert found["failed"]
    assert found["errors"]["invalid"] >= 20
    assert "times in a row" in found["ended"]
    assert entry(client)["versions"]["4"]["state"] == "READY", "it stays loaded: whoever asked for it decides"


def test_the_share_and_the_rate_bound_what_is_copied(client):
    begin(client, share=0.1)
    found = until(client, lambda s: s["seen"] >= 300, "requests")
    assert 1 <= found["taken"] <= 0.1 * found["seen"] + 2
    post(client, "shadow", {"version": 2, "share": 0})
    begin(client, max_rate=2)
    found = until(client, lambda s: s["seconds"] > 1.5, "a second and a half")
    assert found["taken"] <= 2 * found["seconds"] + 2, found


def test_asked_again_it_goes_on_with_its_numbers(client):
    begin(client)
    before = until(client, lambda s: s["samples"] >= 3, "samples")
    status, found = post(client, "shadow", {"version": 2, "share": 0.5, "max_rate": 7})
    assert (status, found["share"], found["max_rate"]) == (200, 0.5, 7)
    assert found["samples"] >= before["samples"]


ENDS = [
    ("shadow", {"version": 2, "share": 0}, "it was asked to end"),
    ("unload", {"version": 2}, "version 2 was unloaded"),
    ("activate", {"version": 2}, "version 1 is not active any more"),
    ("rollback", {"version": 1}, "version 2 was unloaded"),
]


@pytest.mark.parametrize(("path", "body", "why"), ENDS, ids=[e[0] for e in ENDS])
def test_what_ends_it(client, path, body, why):
    begin(client)
    until(client, lambda s: s["samples"] >= 3, "samples")
    assert post(client, path, body)[0] == 200
    found = shadow(client)
    assert (found["state"], found["ended"], found["failed"]) == ("ended", why, False)
    assert found["samples"] >= 3, "its numbers can still be asked for"
    factor(client)


def test_what_cannot_be_a_shadow(device, client, tmp_path):
    device.release("total", 1, onnx_models.total(tmp_path / "total.onnx"), state={"before": "sum"})
    device.release("total", 2, onnx_models.total(tmp_path / "total-2.onnx", 2.0), state={"before": "sum"})
    for version in (1, 2):
        post(client, "load", {"version": version, "variant": "cpu"}, model="total")
    post(client, "activate", {"version": 1}, model="total")
    body = {"version": 2, "share": 0.5}
    for model, what, code in (
        ("scale", body, "not_loaded"), ("scale", {"version": 1, "share": 1}, "active"), ("total", body, "stateful"),
    ):  # fmt: skip
        status, answer = post(client, "shadow", what, model=model)
        assert (status, answer["code"]) == (409, code)
    assert post(client, "shadow", body, model="nobody")[0] == 404
    for wrong in (
        {"version": 2},
        {"version": 2, "share": 2},
        {"version": 2, "share": 1, "max_rate": 0},
        {"version": 0, "share": 1},
    ):
        assert post(client, "shadow", wrong)[0] == 400
    assert shadow(client) == {"state": "none"}


def test_large_requests_are_not_copied(device, tmp_path):
    server = device.server(**ANY).start()
    with Client(server.socket) as client:
        begin(client)
        large = np.ones((600_000, 4), np.float32)  # 9.6 MB, and as much again for the answer
        found = until(client, lambda s: s["dropped"] >= 1, "one that is dropped", lambda c: c.infer("scale", large))
        assert found["samples"] == 0
        found = until(client, lambda s: s["samples"] >= 1, "a small one")


def test_a_machine_that_is_loaded_runs_no_copies(device):
    server = device.server(shadow_max_load=1e-9, shadow_max_celsius=0).start()
    with Client(server.socket) as client:
        begin(client)
        found = until(client, lambda s: s["throttled"], "the brake")
        assert "per core" in found["throttled"]
        for _ in range(50):
            factor(client)
        assert shadow(client)["samples"] <= 1


def test_batches_and_models_in_a_process_of_their_own_are_copied_too(device, client, tmp_path):
    serving = {"max_batch_size": 8, "max_delay_us": 200, "isolation": "process"}
    for version, by in ((1, 1.0), (2, 2.0)):
        device.release("batched", version, onnx_models.scale(tmp_path / f"b-{version}.onnx", by), serving=serving)
        post(client, "load", {"version": version, "variant": "cpu"}, model="batched")
    post(client, "activate", {"version": 1}, model="batched")
    assert post(client, "shadow", {"version": 2, "share": 1, "max_rate": 1000}, model="batched")[0] == 200
    end = time.monotonic() + DEADLINE_S
    while (found := shadow(client, "batched"))["samples"] < 5:
        assert time.monotonic() < end, found
        client.infer("batched", X)
    assert (found["agreed"], found["latency"]["pairs"]) == (0, 0), "a batch's time is not that of one request"
    os.kill(entry(client, "batched")["versions"]["2"]["pid"], signal.SIGKILL)
    while (found := shadow(client, "batched"))["state"] == "running":
        assert time.monotonic() < end, found
        client.infer("batched", X)
    assert found["failed"]


# -- a share of them ------------------------------------------------------------------------------------------------------------


def divert(client, share, version=2):
    return post(client, "canary", {"version": version, "share": share})


def test_a_share_of_the_requests_is_answered_by_the_candidate(client):
    post(client, "load", {"version": 2, "variant": "cpu"})
    assert divert(client, 0.25) == (200, {"canary": {"version": 2, "share": 0.25}})
    answers = [factor(client) for _ in range(400)]
    assert answers.count(2.0) == pytest.approx(100, abs=4)
    found = entry(client)
    assert (found["active"], found["canary"]) == (1, {"version": 2, "share": 0.25})
    assert found["versions"]["2"]["stats"]["ok"] == answers.count(2.0)
    assert found["versions"]["1"]["stats"]["ok"] == answers.count(1.0)
    assert metrics(client)['edge_canary_share{model="scale",version="2"}'] == "0.25"
    assert {factor(client, 1) for _ in range(20)} == {1.0} == {factor(client, "stable") for _ in range(20)}
    assert divert(client, 0) == (200, {"canary": None})
    assert {factor(client) for _ in range(20)} == {1.0}


@pytest.mark.parametrize(("path", "serves"), [("activate", 2.0), ("unload", 1.0), ("rollback", 1.0)])
def test_what_ends_a_canary(client, path, serves):
    post(client, "load", {"version": 2, "variant": "cpu"})
    divert(client, 0.5)
    assert post(client, path, {"version": 1 if path == "rollback" else 2})[0] == 200
    assert entry(client)["canary"] is None
    assert {factor(client) for _ in range(20)} == {serves}


def test_what_cannot_be_a_canary(client):
    assert divert(client, 0.5)[1]["code"] == "not_loaded"
    assert divert(client, 0.5, 1)[1]["code"] == "active"
    assert divert(client, 2)[0] == 400


def test_a_candidate_that_is_dear_does_not_keep_the_cheap_ones(device, client, tmp_path):
    """The thread that polls answers what is cheap; what a canary answers may not be."""
    device.release("scale", 4, onnx_models.scale(tmp_path / "dear.onnx", 4.0), serving={"isolation": "process"})
    post(client, "load", {"version": 4, "variant": "cpu"})
    divert(client, 0.5, 4)
    assert {factor(client) for _ in range(50)} == {1.0, 4.0}


def total(client, number, x, **marks):
    document = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [x]}],
        "parameters": {"sequence_id": number, **marks},
    }
    status, _, answer = client.request("POST", "/v2/models/total/infer", document)
    assert status == 200, answer
    return json.loads(answer)["outputs"][0]["data"][0]


def test_a_sequence_stays_on_the_version_where_it_began(device, client, tmp_path):
    for version, by in ((1, 1.0), (2, 10.0)):
        device.release("total", version, onnx_models.total(tmp_path / f"t-{version}.onnx", by), state={"before": "sum"})
        post(client, "load", {"version": version, "variant": "cpu"}, model="total")
    post(client, "activate", {"version": 1}, model="total")
    assert total(client, 99, 1, sequence_start=True) == 1
    post(client, "canary", {"version": 2, "share": 0.5}, model="total")
    begun = {n: total(client, n, 1, sequence_start=True) for n in range(1, 21)}
    assert set(begun.values()) == {1.0, 10.0}
    for rounds in (2, 3):
        assert {n: total(client, n, 1) for n in begun} == {n: rounds * v for n, v in begun.items()}
    assert total(client, 99, 1) == 2, "it began before there was a canary"
    post(client, "canary", {"version": 2, "share": 0}, model="total")
    assert {n: total(client, n, 1) for n in begun} == {n: 4 * v for n, v in begun.items()}, "those under way end where they are"


def test_requests_that_the_candidate_refuses_count_against_it(device, client, tmp_path):
    device.release("scale", 4, onnx_models.scale(tmp_path / "wide.onnx", 1.0, width=5))
    post(client, "load", {"version": 4, "variant": "cpu"})
    divert(client, 0.5, 4)
    statuses = [client.request("POST", "/v2/models/scale/infer", _document())[0] for _ in range(40)]
    assert statuses.count(400) == pytest.approx(20, abs=3)
    assert entry(client)["versions"]["4"]["stats"]["failed"]["invalid"] == statuses.count(400)


def _document():
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 1, 1, 1]}]}


def test_under_load_nothing_fails_and_nothing_is_lost(device):
    server = device.server(threads=4, **ANY).start()
    answers, errors = [], []
    stop = threading.Event()

    def ask():
        with Client(server.socket) as one:
            while not stop.is_set():
                try:
                    answers.append(factor(one))
                except ClientError as error:
                    errors.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    with Client(server.socket) as client:
        for _ in range(4):
            begin(client)
            divert(client, 0.3)
            count = len(answers)
            until(client, lambda s, count=count: len(answers) > count + 100 and s["samples"] > 1, "answers")
            divert(client, 0)
            post(client, "unload", {"version": 2})
        stop.set()
        for thread in threads:
            thread.join()
        stats = entry(client)["versions"]["1"]["stats"]
    assert errors == []
    assert set(answers) == {1.0, 2.0}
    assert stats["ok"] >= answers.count(1.0)
    assert server.stop() == 0
