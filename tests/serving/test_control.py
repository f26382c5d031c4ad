"""`edge-agent serve` over a store: the control routes, and swaps under load."""

import json
import os
import threading

import numpy as np
import pytest

from agent.client import Client, ModelNotFound, Unavailable
from tests.serving import onnx_models
from tests.serving.server import DEADLINE_S

X = np.ones((1, 4), np.float32)


def factor(client, version=None):
    return float(client.infer("scale", X, version=version)["y"][0, 0])


def post(client, path, body=None, model="scale"):
    status, _, answer = client.request("POST", f"/control/v1/models/{model}/{path}", {} if body is None else body)
    return status, json.loads(answer)


def entry(client, model="scale"):
    return json.loads(client.request("GET", f"/control/v1/models/{model}")[2])


@pytest.fixture
def server(device):
    return device.server().start()


@pytest.fixture
def client(server):
    with Client(server.socket) as made:
        yield made


def test_the_status_of_what_the_store_selects(server, client):
    status = client.status()
    assert status["pid"] == server.process.pid
    assert status["instance"]
    (version,) = status["models"]["scale"]["versions"].values()
    assert (version["version"], version["variant"], version["state"], version["reason"]) == (1, "cpu", "READY", "")
    assert len(version["sha256"]) == 64
    assert version["placement"] == {"requested": "auto", "actual": "cpu", "fallback": None}
    assert version["load_ms"] > 0
    assert len(version["stats"]["latency"]["counts"]) == len(version["stats"]["latency"]["bounds_ms"]) + 1


def test_load_activate_commit(client):
    status, version = post(client, "load", {"version": 2, "variant": "cpu"})
    assert (status, version["state"]) == (200, "READY")
    assert factor(client) == 1
    assert factor(client, 2) == factor(client, "candidate") == 2
    assert post(client, "activate", {"version": 2}) == (200, {"active": 2, "previous": 1})
    assert (factor(client), factor(client, "previous"), factor(client, "stable")) == (2, 1, 2)
    assert post(client, "commit") == (200, {"active": 2, "previous": None})
    with pytest.raises(ModelNotFound):
        factor(client, 1)
    for path, body, expected in (
        ("load", {"version": 2, "variant": "cpu"}, None),
        ("activate", {"version": 2}, {"active": 2, "previous": None}),
        ("commit", None, {"active": 2, "previous": None}),
        ("unload", {"version": 9}, {"active": 2, "previous": None}),
    ):
        status, answer = post(client, path, body)
        assert status == 200, "asking for what is already so"
        assert expected is None or answer == expected


def test_models_that_belong_together_switch_together(device, client, tmp_path):
    device.release("other", 1, onnx_models.scale(tmp_path / "other-1.onnx", 10.0))
    device.release("other", 2, onnx_models.scale(tmp_path / "other-2.onnx", 20.0))

    def together(**versions):
        status, _, answer = client.request("POST", "/control/v1/activate", {"versions": versions})
        return status, json.loads(answer)

    post(client, "load", {"version": 1, "variant": "cpu"}, model="other")
    post(client, "activate", {"version": 1}, model="other")
    post(client, "load", {"version": 2, "variant": "cpu"})
    status, answer = together(scale=2, other=2)
    assert (status, answer["code"]) == (409, "not_loaded")
    assert "none was switched" in answer["error"]
    assert factor(client) == 1, "the one that is loaded was not switched either"
    post(client, "load", {"version": 2, "variant": "cpu"}, model="other")
    assert together(scale=2, other=2) == (200, {"scale": {"active": 2}, "other": {"active": 2}})
    assert (factor(client), float(client.infer("other", X)["y"][0, 0])) == (2, 20)
    assert together(scale=1, other=1) == (200, {"scale": {"active": 1}, "other": {"active": 1}})
    assert together(scale=1, other=1)[0] == 200, "asking for what is already so"
    assert together(scale=1, none=1)[0] == 404
    assert together(scale=9, other=None)[0] == 409
    assert float(client.infer("other", X)["y"][0, 0]) == 10, "none was switched, none unloaded"
    post(client, "load", {"version": 2, "variant": "cpu"})
    found = {"scale": {"active": 2}, "other": {"active": None}, "none": {"active": None}}
    assert together(scale=2, other=None, none=None) == (200, found)
    assert factor(client) == 2
    with pytest.raises(ModelNotFound):
        client.infer("other", X)


def test_rollback_to_what_is_loaded_and_to_what_is_not(client):
    post(client, "load", {"version": 2, "variant": "cpu"})
    post(client, "activate", {"version": 2})
    assert post(client, "rollback", {"version": 1}) == (200, {"active": 1, "previous": None})
    assert list(entry(client)["versions"]) == ["1"]
    post(client, "load", {"version": 2, "variant": "cpu"})
    post(client, "activate", {"version": 2})
    post(client, "commit")
    assert list(entry(client)["versions"]) == ["2"]
    assert post(client, "rollback", {"version": 1}) == (200, {"active": 1, "previous": None})
    assert post(client, "rollback", {"version": 1}) == (200, {"active": 1, "previous": None})
    assert factor(client) == 1


def test_what_cannot_be_loaded(device, client):
    broken = device.folder / "broken.onnx"
    broken.write_bytes(b"this is no model")
    device.release("scale", 4, broken)
    device.release("scale", 5, broken, runtime="abacus")
    for body, status, code in (
        ({"version": 9, "variant": "cpu"}, 409, "not_in_store"),
        ({"version": 2, "variant": "gpu"}, 409, "not_in_store"),
        ({"version": 4, "variant": "cpu"}, 422, "model_invalid"),
        ({"version": 5, "variant": "cpu"}, 503, "runtime_unavailable"),
        ({"version": 0, "variant": "cpu"}, 400, "bad_request"),
        ({"version": 2}, 400, "bad_request"),
    ):
        got, answer = post(client, "load", body)
        assert (got, answer["code"]) == (status, code)
        assert factor(client) == 1
    assert post(client, "activate", {"version": 4})[1]["code"] == "not_loaded"
    assert post(client, "activate", {"version": 2})[1]["code"] == "not_loaded"
    assert post(client, "unload", {"version": 1})[1]["code"] == "active"
    assert post(client, "rollback", {"version": 3})[1]["code"] == "not_in_store"
    versions = entry(client)["versions"]
    assert versions["4"]["state"] == "UNAVAILABLE"
    assert "not a model" in versions["4"]["reason"]


def test_unloading_a_whole_model(client):
    assert post(client, "unload") == (200, {"active": None, "previous": None})
    with pytest.raises(ModelNotFound):
        factor(client)
    assert client.ready(), "a server without models is ready"
    assert post(client, "unload") == (200, {"active": None, "previous": None})
    post(client, "load", {"version": 2, "variant": "cpu"})
    with pytest.raises(Unavailable):
        factor(client)
    assert post(client, "activate", {"version": 2}) == (200, {"active": 2, "previous": None})
    assert factor(client) == 2


def test_failures_are_counted_by_whose_fault_they_are(client):
    factor(client)
    client.request("POST", "/v2/models/scale/infer", {"inputs": []})
    stats = entry(client)["versions"]["1"]["stats"]
    assert (stats["requests"], stats["ok"], stats["failed"]) == (2, 1, {"invalid": 1, "run": 0, "unavailable": 0})
    assert sum(stats["latency"]["counts"]) == stats["latency"]["count"] == 1


def test_a_start_falls_back_to_the_previous_release(device):
    broken = device.folder / "broken.onnx"
    broken.write_bytes(b"no model")
    device.release("scale", 4, broken)
    device.select("scale", 4, previous=1)
    device.release("other", 1, broken)
    device.select("other", 1)
    (device.store.root / "models" / "damaged.json").write_text("{")
    server = device.server().start()
    with Client(server.socket) as client:
        assert factor(client) == 1
        found = entry(client)
        assert found["active"] == 1
        assert found["versions"]["4"]["state"] == "UNAVAILABLE"
        assert "version 4" in found["versions"]["1"]["reason"]
        assert entry(client, "other")["active"] is None
        states = {m["name"]: m["state"] for m in client.models() if m["name"] != "scale"}
        assert states == {"other": "UNAVAILABLE", "damaged": "UNAVAILABLE"}
        assert client.ready()
        with pytest.raises(Unavailable, match="not a model"):
            client.infer("other", X)


def test_a_blob_that_was_changed_is_not_loaded(device):
    manifest = json.loads((device.store.root / "releases" / "scale" / "2.json").read_text())
    (sha256,) = [file["sha256"] for file in manifest["files"].values()]
    device.store.blob(sha256).write_bytes(onnx_models.scale(device.folder / "evil.onnx", 666.0).read_bytes())
    server = device.server().start()
    with Client(server.socket) as client:
        status, answer = post(client, "load", {"version": 2, "variant": "cpu"})
        assert (status, answer["code"]) == (409, "not_in_store")
        assert "hash mismatch" in answer["error"]


def test_swaps_under_load_fail_nobody(client, server):
    """Four busy clients, at least 20 000 requests, a swap every few hundred: every answer is right and from one version."""
    goal, clients = 20_000, 4
    done, wrong = [0] * clients, []
    end = threading.Event()

    def work(number):
        rng = np.random.default_rng(number)
        with Client(server.socket) as own:
            while not end.is_set():
                x = rng.integers(1, 100, (1, 4)).astype(np.float32)
                try:
                    ratio = set((own.infer("scale", x)["y"] / x).ravel().tolist())
                except Exception as error:  # noqa: BLE001
                    wrong.append(repr(error))
                    return
                if ratio not in ({1.0}, {2.0}, {3.0}):
                    wrong.append(ratio)
                done[number] += 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    swaps, active = 0, 1
    try:
        while sum(done) < goal and not wrong:
            target = active % 3 + 1
            assert post(client, "load", {"version": target, "variant": "cpu"})[0] == 200
            assert post(client, "activate", {"version": target})[0] == 200
            if swaps % 2:
                assert post(client, "commit")[0] == 200
            elif swaps % 3 == 0:
                assert post(client, "rollback", {"version": active})[0] == 200
                target = active
            active, swaps = target, swaps + 1
    finally:
        end.set()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert not wrong
    assert sum(done) >= goal
    assert swaps >= 10


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the uid needs root")
def test_access_classes_are_by_uid(device):
    device.folder.chmod(0o755)
    for parent in device.folder.parents:
        if parent.stat().st_uid == os.geteuid() and str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    access = [{"allow": "control", "uids": [40001]}, {"allow": "predict", "gids": [40002], "models": ["other"]}]
    server = device.server(everyone="predict", access=access).start()

    def as_peer(uid, gid, script):
        """Runs `script` in a child with these ids; what it returns comes back as JSON."""
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setgroups([])
                os.setgid(gid)
                os.setuid(uid)
                with Client(server.socket) as client:
                    os.write(write, json.dumps(script(client)).encode())
                os._exit(0)
            finally:
                os._exit(1)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            said = pipe.read()
        assert os.waitpid(child, 0)[1] == 0
        return json.loads(said)

    def everything(client):
        found = []
        for method, path in (
            ("GET", "/v2/health/ready"), ("GET", "/v2/models/scale"), ("GET", "/control/v1/status"), ("GET", "/metrics"),
            ("POST", "/control/v1/models/scale/commit"),
        ):  # fmt: skip
            status, _, body = client.request(method, path)
            found.append([status, json.loads(body)["error"] if status == 403 else ""])
        return found

    def statuses(found):
        return [status for status, _ in found]

    anyone = as_peer(40003, 40003, everything)
    assert statuses(anyone) == [200, 200, 403, 403, 403]
    assert anyone[2][1].startswith("this needs access class 'observe', uid 40003 has 'predict': grant it under serve.access")
    assert statuses(as_peer(40001, 40003, everything)) == [200] * 5
    limited = as_peer(40004, 40002, everything)
    assert statuses(limited) == [200, 403, 403, 403, 403]
    assert "may use the models other, not 'scale'" in limited[1][1]
    with Client(server.socket) as own:
        assert statuses(everything(own)) == [200] * 5


def test_an_access_rule_for_an_unknown_user_stops_the_start(device):
    server = device.server(access=[{"allow": "control", "uids": ["no-such-user"]}]).start(wait=False)
    assert server.process.wait(DEADLINE_S) == 1
    assert "no such user" in server.output()


def test_everyone_none_does_not_shut_out_the_servers_own_user(device):
    server = device.server(everyone="none").start()
    with Client(server.socket) as client:
        assert factor(client) == 1
