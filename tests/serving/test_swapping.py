"""One version in place of another without memory for both: callers wait, and none fails because of it."""

import json
import threading

import numpy as np
import pytest

from agent.client import Client, ModelNotFound
from tests.serving import onnx_models
from tests.serving.server import DEADLINE_S

ROWS = 2_000_000
MB = 1_000_000
X = np.array([7], np.int64)


@pytest.fixture
def server(device, tmp_path):
    """Models of 16 MB and a budget of 30: version 2 adds another number, version 3 is no model, version 4 is too large alone."""
    device.release("t", 1, onnx_models.lookup(tmp_path / "one.onnx", ROWS))
    device.release("t", 2, onnx_models.lookup(tmp_path / "two.onnx", ROWS + 5))
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"this is no model")
    device.release("t", 3, broken)
    device.release("t", 4, onnx_models.lookup(tmp_path / "four.onnx", 3 * ROWS))
    device.select("t", 1)
    (device.store.root / "models" / "scale.json").unlink()
    return device.server(memory_budget_bytes=30 * MB, min_residency_s=0).start()


def post(client, path, version, variant="cpu"):
    body = {"version": version, "variant": variant} if path in ("load", "swap") else {"version": version}
    status, _, answer = client.request("POST", f"/control/v1/models/t/{path}", body)
    return status, json.loads(answer)


def ask(client, number=7, **options):
    return int(client.infer("t", np.array([number], np.int64), **options)["y"][0])


def entry(client):
    return json.loads(client.request("GET", "/control/v1/models/t")[2])


def test_a_swap(server):
    with server.client() as client:
        assert post(client, "load", 2)[1]["code"] == "no_memory"
        assert post(client, "swap", 2) == (200, {"active": 2, "previous": None})
        assert ask(client, ROWS + 2) == ROWS + 102, "version 2 has more rows"
        assert list(entry(client)["versions"]) == ["2"]
        assert post(client, "swap", 2) == (200, {"active": 2, "previous": None}), "asking for what is already so"
        with pytest.raises(ModelNotFound):
            ask(client, version=1)


def test_back_by_a_roll_back(device, server):
    device.select("t", 2, previous=1)
    with server.client() as client:
        post(client, "swap", 2)
        assert post(client, "rollback", 1) == (200, {"active": 1, "previous": None})
        assert ask(client) == 107


@pytest.mark.parametrize(("version", "status", "code"), [(3, 422, "model_invalid"), (4, 507, "no_memory")])
def test_one_that_cannot_be_loaded_leaves_the_old_one(server, version, status, code):
    with server.client() as client:
        got, answer = post(client, "swap", version)
        assert (got, answer["code"]) == (status, code)
        assert answer["error"].endswith("version 1 serves again")
        assert ask(client) == 107
        assert entry(client)["active"] == 1
        assert entry(client)["versions"]["1"]["state"] == "READY"


def test_one_that_is_not_in_the_store_changes_nothing(server):
    with server.client() as client:
        assert post(client, "swap", 9)[1]["code"] == "not_in_store"
        assert ask(client) == 107


def test_swaps_under_load_fail_nobody(server):
    """Callers of the model, and some of version 1 by number, who are told when it is not there."""
    end, wrong, done, absent = threading.Event(), [], [], []

    def work(version):
        with Client(server.socket) as own:
            while not end.is_set():
                try:
                    done.append(ask(own, version=version))
                except ModelNotFound as error:
                    absent.append(error)
                    if version is None:
                        wrong.append(repr(error))
                        return
                except Exception as error:  # noqa: BLE001
                    wrong.append(repr(error))
                    return

    threads = [threading.Thread(target=work, args=(version,)) for version in (None, None, None, 1)]
    for thread in threads:
        thread.start()
    try:
        with server.client() as client:
            for version in (2, 1, 2, 3, 1, 4, 2):
                post(client, "swap", version)
                before = len(done)
                deadline = threading.Event()
                while len(done) < before + 20 and not wrong:
                    assert not deadline.wait(0.01)
    finally:
        end.set()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert wrong == []
    assert set(done) == {107}


def test_a_sequence_does_not_survive_a_swap(device, tmp_path):
    """What it remembered is gone with the model: the next request of it is told so, and it can begin anew."""
    device.release("total", 1, onnx_models.total(tmp_path / "total-1.onnx"), state={"before": "sum"})
    device.release("total", 2, onnx_models.total(tmp_path / "total-2.onnx", 10.0), state={"before": "sum"})
    device.select("total", 1)
    server = device.server().start()
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}]}
    with server.client() as client:

        def step(**parameters):
            status, _, answer = client.request(
                "POST", "/v2/models/total/infer", {**body, "parameters": {"sequence_id": 5, **parameters}}
            )
            found = json.loads(answer)
            return status, found["outputs"][0]["data"][0] if status == 200 else found["error"]

        assert step(sequence_start=True) == (200, 1.0)
        assert step() == (200, 2.0)
        client.request("POST", "/control/v1/models/total/swap", {"version": 2, "variant": "cpu"})
        status, text = step()
        assert status == 400
        assert "not under way" in text
        assert step(sequence_start=True) == (200, 10.0)
