"""A memory budget over real sockets: models go and come back, and nobody who asks for one notices more than the time it takes."""

import json
import threading

import numpy as np
import pytest
import tritonclient.grpc as triton

from agent.client import Client, Unavailable
from agent.contract.names import ReleaseRef
from tests.serving import onnx_models
from tests.serving.server import DEADLINE_S, Server

ROWS = 2_000_000  # of 8 bytes: each model takes 16 MB and a little
MB = 1_000_000
X = np.array([7], np.int64)
NAMES = ("a", "b", "c")


@pytest.fixture
def tables(device, tmp_path):
    """Three models, of which two fit into the budget."""
    path = onnx_models.lookup(tmp_path / "lookup.onnx", ROWS)
    (device.store.root / "models" / "scale.json").unlink(missing_ok=True)
    for name in NAMES:
        device.release(name, 1, path)
        device.release(name, 2, path)
        device.select(name, 1)
    return device


def serve(tables, budget=45 * MB, **settings):
    return tables.server(memory_budget_bytes=budget, min_residency_s=settings.pop("min_residency_s", 0), **settings).start()


def ask(client, name, **options):
    return int(client.infer(name, X, **options)["y"][0])


def index(client):
    return {m["name"]: (m["state"], m.get("reason", "")) for m in client.models()}


def entry(client, name, version="1"):
    return json.loads(client.request("GET", f"/control/v1/models/{name}")[2])["versions"][version]


def metric(client, name, model=None):
    for line in client.request("GET", "/metrics")[2].decode().splitlines():
        if line.startswith(name) and (model is None or f'model="{model}"' in line):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(f"no metric {name}")


def test_what_is_over_the_budget_is_known_and_comes_when_asked_for(tables):
    server = serve(tables)
    with server.client() as client:
        assert index(client)["a"] == ("UNAVAILABLE", "evicted"), "the first to be loaded was not used for longest"
        assert [index(client)[name][0] for name in "bc"] == ["READY", "READY"]
        assert client.metadata("a")["inputs"][0]["name"] == "x", "its tensors stay known"
        assert client.ready("a"), "a prediction will be answered"
        assert entry(client, "a")["away"]
        assert ask(client, "a") == 107
        assert index(client)["a"][0] == "READY"
        assert index(client)["b"] == ("UNAVAILABLE", "evicted")
        for name in "bcabca":
            assert ask(client, name) == 107
        assert metric(client, "edge_model_evictions_total", "a") == 3
        assert metric(client, "edge_model_reloads_total", "a") == 3
        assert metric(client, "edge_memory_budget_bytes") == 45 * MB
        assert 2 * ROWS * 8 <= metric(client, "edge_memory_used_bytes") <= 45 * MB
        assert entry(client, "a")["stats"]["ok"] == 3, "its counters go on"
    assert server.stop() == 0


def test_over_grpc(tables, tmp_path):
    """Its callers wait in threads of their own."""
    serve(tables, grpc_socket=str(tmp_path / "g.sock"))
    given = triton.InferInput("x", [1], "INT64")
    given.set_data_from_numpy(X)
    with triton.InferenceServerClient(f"unix:{tmp_path / 'g.sock'}") as client:
        assert client.is_model_ready("a")
        for name in "abcabc":
            assert client.infer(name, [given]).as_numpy("y").tolist() == [107]


def test_many_clients_in_turns_fail_nobody(tables):
    server = serve(tables)
    failed, done = [], []

    def work(number):
        with server.client() as client:
            for turn in range(8):
                name = NAMES[(number + turn) % 3]
                try:
                    assert ask(client, name) == 107
                    done.append(name)
                except Exception as error:  # noqa: BLE001
                    failed.append(repr(error))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert failed == []
    assert len(done) == 48


def test_a_pinned_model_stays(tables):
    server = serve(tables, pinned=["a"])
    with server.client() as client:
        assert index(client)["a"][0] == "READY"
        for name in "bcb":
            assert ask(client, name) == 107
        assert index(client)["a"][0] == "READY"
        assert metric(client, "edge_model_evictions_total", "a") == 0


def test_nothing_may_be_unloaded(tables):
    server = serve(tables, pinned=["b", "c"])
    with server.client() as client:
        status, headers, body = client.request(
            "POST", "/v2/models/a/infer", {"inputs": [{"name": "x", "datatype": "INT64", "shape": [1], "data": [7]}]}
        )
        assert status == 503
        assert int(headers["retry-after"]) >= 1
        assert "budget" in json.loads(body)["error"]


def test_what_has_just_come_stays_a_while(tables):
    server = serve(tables, min_residency_s=60.0)
    with server.client() as client, pytest.raises(Unavailable, match="may not be unloaded now"):
        ask(client, "a")


def test_a_request_waits_no_longer_than_its_deadline(tables):
    server = serve(tables)
    body = {"inputs": [{"name": "x", "datatype": "INT64", "shape": [1], "data": [7]}], "parameters": {"timeout": 1000}}
    with server.client() as client:
        status, headers, answer = client.request("POST", "/v2/models/a/infer", body)
        assert status == 503
        assert headers["retry-after"] == "1"
        assert json.loads(answer)["error"] == "Request timeout expired while model 'a' version 1 was not in memory"
        assert ask(client, "a") == 107, "the load that it asked for went on"


def test_an_update_of_an_evicted_model(tables):
    server = serve(tables, budget=90 * MB)
    with server.client() as client:
        post = lambda path, body: client.request("POST", f"/control/v1/models/a/{path}", body)[0]  # noqa: E731
        for name in "bc":
            ask(client, name)
        assert post("load", {"version": 2, "variant": "cpu"}) == 200
        assert post("activate", {"version": 2}) == 200
        for name in "bcbc":
            ask(client, name)
        assert entry(client, "a", "2")["state"] == "READY", "it is under watch"
        assert post("rollback", {"version": 1}) == 200
        assert ask(client, "a") == 107


def test_a_model_that_alone_is_too_large_is_refused(tables):
    server = serve(tables)
    path = onnx_models.lookup(tables.folder / "huge.onnx", 4 * ROWS)
    tables.release("huge", 1, path)
    with server.client() as client:
        status, _, body = client.request("POST", "/control/v1/models/huge/load", {"version": 1, "variant": "cpu"})
        assert (status, json.loads(body)["code"]) == (507, "no_memory")
        assert ask(client, "b") == 107


def test_unloading_while_others_wait_for_it(tables):
    """Who waits for a model that goes for good is told that it is not there, at once."""
    server = serve(tables)
    with server.client() as client:
        assert client.request("POST", "/v2/repository/models/a/unload", {})[0] == 200
        with pytest.raises(Unavailable, match="unloaded"):
            ask(client, "a")


def test_files_with_a_budget(tmp_path):
    for name in NAMES:
        onnx_models.lookup(tmp_path / f"{name}.onnx", ROWS)
    server = Server(tmp_path, "run", tmp_path, "--socket", tmp_path / "s.sock", "--memory-budget", "1G").start()
    try:
        with Client(server.socket) as client:
            assert [ask(client, name) for name in NAMES] == [107] * 3
            assert metric(client, "edge_memory_budget_bytes") == 1 << 30
    finally:
        server.stop()


def test_a_file_that_has_changed_is_not_brought_back(tmp_path):
    """What was announced with its tensors is another model now: it is loaded by name, not by accident."""
    for name in NAMES:
        onnx_models.lookup(tmp_path / f"{name}.onnx", ROWS)
    server = Server(tmp_path, "run", tmp_path, "--socket", tmp_path / "s.sock", "--memory-budget", "45M").start()
    try:
        with Client(server.socket) as client:
            gone = next(name for name, (state, _) in index(client).items() if state != "READY")
            onnx_models.lookup(tmp_path / f"{gone}.onnx", ROWS + 1)
            with pytest.raises(Unavailable):
                ask(client, gone)
    finally:
        server.stop()


def test_the_files_that_a_model_is_made_of_count_and_are_watched_all(device, tmp_path):
    """The budget takes one: all files of a model count, and a model is not brought back when one of them has changed on the disk."""
    (device.store.root / "models" / "scale.json").unlink(missing_ok=True)
    x = np.float32([[1, 2]])
    for number, name in enumerate("ab"):
        path = onnx_models.scattered(tmp_path / name / f"{name}.onnx", (1 + number, 2 + number, 4 + number))
        for location in onnx_models.SCATTERED:
            with (path.parent / location).open("ab") as file:
                file.truncate(10 * MB)
        device.release(name, 1, path, data=onnx_models.SCATTERED)
        device.select(name, 1)
    server = serve(device)
    with server.client() as client:
        assert sorted(state for state, _ in index(client).values()) == ["READY", "UNAVAILABLE"]
        assert [client.infer(name, {"x": x})["y"][0, 0] for name in "ab"] == [7, 10]
        blob = device.store.file(device.store.manifest(ReleaseRef("a", 1)), "sub/body.bin")
        with blob.open("r+b") as file:
            file.write(b"changed")
        with pytest.raises(Unavailable, match="has changed since it was loaded"):
            client.infer("a", {"x": x})
        assert client.infer("b", {"x": x})["y"][0, 0] == 10
