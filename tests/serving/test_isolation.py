"""Models in processes of their own, over real sockets: whatever happens to one process, the other models never notice."""

import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from agent.client import Client, ServerFailed, Unavailable
from tests.serving import onnx_models
from tests.serving.server import DEADLINE_S, Server
from tests.waiting import wait_until

X = np.ones((1, 4), np.float32)
MB = 1_000_000
# y = 2 x; a negative value ends the process, as a crashing engine does.
RUNTIME = """
import os, signal, ctypes
import numpy as np
from runtimes.contract import ModelInvalid, Placement, TensorSpec
class Model:
    inputs = outputs = (TensorSpec("x", "FP32", (-1, 4)),)
    placement = Placement("cpu", "cpu")
    def run(self, feeds, outputs=None):
        if (feeds["x"] < 0).any():
            ctypes.string_at(0)
        return [feeds["x"] * 2]
    def close(self): pass
class Counting(Model):
    stateful = True
    def sequence(self): return Count()
class Count:
    def __init__(self): self.sum = 0
    def run(self, feeds, outputs=None):
        self.sum = self.sum + feeds["x"]
        return [self.sum]
    def close(self): pass
class Fragile:
    contract_version, name, suffixes = 1, "fragile", (".fragile",)
    def version(self): return "fragile 1"
    def load(self, path, options):
        text = path.read_text()
        if text == "crash": ctypes.string_at(0)
        if text == "killed": os.kill(os.getpid(), signal.SIGKILL)
        if text == "bad": raise ModelInvalid("the file is bad")
        return Counting() if text == "counts" else Model()
"""


def eventually(condition, what):
    wait_until(condition, DEADLINE_S, what)


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Starts `edge-agent run` on models, of which `isolated` ones have their own process."""
    (tmp_path / "fragile_runtime.py").write_text(RUNTIME)
    metadata = tmp_path / "fragile_runtime-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fragile-runtime\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[edge_agent.runtimes]\nfragile = fragile_runtime:Fragile\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    servers = []

    def start(*paths, isolated=(), options=()):
        words = [word for name in isolated for word in ("--isolate", name)]
        servers.append(Server(tmp_path, "run", *paths, "--socket", tmp_path / "s.sock", *words, *options).start())
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def pair(serve, tmp_path):
    """`frail` has its own process, `steady` has not."""
    (tmp_path / "frail.fragile").write_text("good")
    server = serve(onnx_models.scale(tmp_path / "steady.onnx", 3.0), tmp_path / "frail.fragile", isolated=["frail"])
    with server.client() as client:
        yield server, client


def entry(client, name):
    (version,) = json.loads(client.request("GET", f"/control/v1/models/{name}")[2])["versions"].values()
    return version


def alive(pid):
    return Path(f"/proc/{pid}").exists()


def children(pid):
    return [int(n) for task in Path(f"/proc/{pid}/task").iterdir() for n in (task / "children").read_text().split()]


def test_it_answers_as_any_other(serve, tmp_path):
    files = [
        onnx_models.scale(tmp_path / "scale.onnx", 2.0),
        onnx_models.pair(tmp_path / "pair.onnx"),
        onnx_models.identity(tmp_path / "text.onnx", 8),
    ]
    server = serve(*files, isolated=["scale", "pair", "text"])
    assert len(children(server.process.pid)) == 3
    with server.client() as client:
        for rows in (1, 1000, 100_000, 3):
            x = np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)
            assert np.array_equal(client.infer("scale", x)["y"], 2 * x)
        found = client.infer("pair", {"a": np.array([5, 6]), "b": np.array([1, 2])})
        assert (found["total"].tolist(), found["difference"].tolist()) == ([6, 8], [4, 4])
        assert client.infer("text", np.array([b"one", "zw\u00f6lf".encode(), b""], object))["y"].tolist() == [
            b"one", "zw\u00f6lf".encode(), b"",
        ]  # fmt: skip
        status, _, answer = client.request("POST", "/v2/models/scale/infer", {"inputs": []})
        assert (status, b"'x' is missing" in answer or b"x" in answer) == (400, True)
        assert entry(client, "scale")["memory_bytes"] > 10 * MB


def test_several_runs_go_on_at_once(serve, tmp_path):
    server = serve(onnx_models.scale(tmp_path / "scale.onnx", 2.0), isolated=["scale"])
    failed = []

    def work(number):
        with Client(server.socket) as client:
            for _ in range(100):
                x = np.full((number * 500, 4), number, np.float32)
                if not np.array_equal(client.infer("scale", x)["y"], 2 * x):
                    failed.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert failed == []


def test_a_crash_costs_one_request(pair):
    server, client = pair
    before = entry(client, "frail")["pid"]
    with pytest.raises(ServerFailed, match=r"process has ended.*SIGSEGV"):
        client.infer("frail", -X)
    assert client.infer("frail", X)["x"][0, 0] == 2, "who comes next waits for the new process"
    assert client.infer("steady", X)["y"][0, 0] == 3
    after = entry(client, "frail")["pid"]
    assert before != after
    assert not alive(before), "no zombie stays"
    assert b'edge_model_restarts_total{model="frail",version="1"} 1' in client.request("GET", "/metrics")[2]
    assert children(server.process.pid) == [after]


def test_one_that_crashes_again_and_again_is_started_less_and_less_often(pair):
    _, client = pair
    refused = []
    for _ in range(4):
        try:
            client.infer("frail", -X)
        except ServerFailed:
            pass
        except Unavailable as error:
            refused.append(str(error))
            break
    assert "is started again after" in refused[0]
    state = entry(client, "frail")
    assert (state["state"], state["away"]) == ("UNAVAILABLE", True)
    assert "SIGSEGV" in state["reason"]
    eventually(lambda: entry(client, "frail")["state"] == "READY", "it was not started again")
    assert client.infer("frail", X)["x"][0, 0] == 2


def test_killed_under_load(pair):
    """kill -9 of the child, as the kernel does when memory runs out: the other model fails nobody, and each client of this one at most what
    it had asked by then.
    """
    server, client = pair
    end, wrong, failures, done = threading.Event(), [], [], [0, 0]

    def work(number, name, factor):
        with Client(server.socket) as own:
            while not end.is_set():
                try:
                    value = next(iter(own.infer(name, X).values()))[0, 0]
                except (ServerFailed, Unavailable) as error:
                    failures.append((name, str(error)))
                    continue
                if value != factor:
                    wrong.append((name, value))
                done[number] += 1

    threads = [threading.Thread(target=work, args=a) for a in ((0, "steady", 3), (1, "frail", 2), (1, "frail", 2))]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: min(done) > 50, "they answer")
        pid = entry(client, "frail")["pid"]
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: entry(client, "frail")["state"] == "READY" and entry(client, "frail")["pid"] != pid, "it is back")
        count = done[1]
        eventually(lambda: done[1] > count + 50, "it answers")
    finally:
        end.set()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert wrong == []
    assert {name for name, _ in failures} <= {"frail"}
    assert len(failures) <= 2
    assert all("SIGKILL" in text for _, text in failures)


@pytest.mark.parametrize(
    ("content", "words"),
    [("crash", "ended its process (SIGSEGV)"), ("killed", "most likely memory ran out"), ("bad", "the file is bad")],
)
def test_a_crash_while_loading_is_the_models_alone(content, words, serve, tmp_path):
    (tmp_path / "frail.fragile").write_text(content)
    server = serve(onnx_models.scale(tmp_path / "steady.onnx", 3.0), tmp_path / "frail.fragile", isolated=["frail"])
    with server.client() as client:
        assert client.infer("steady", X)["y"][0, 0] == 3
        state = entry(client, "frail")
        assert state["state"] == "UNAVAILABLE"
        assert words in state["reason"]
    assert children(server.process.pid) == []


def test_memory_goes_back_and_so_does_the_process(serve, tmp_path):
    server = serve(onnx_models.lookup(tmp_path / "large.onnx", 4_000_000), isolated=["large"])
    with server.client() as client:
        pid = entry(client, "large")["pid"]
        assert entry(client, "large")["memory_bytes"] > 32 * MB
        assert client.request("POST", "/v2/repository/models/large/unload", {})[0] == 200
        assert not alive(pid)
        assert entry(client, "large")["pid"] is None
        assert client.request("POST", "/v2/repository/models/large/load", {})[0] == 200
        assert client.infer("large", np.array([5]))["y"][0] == 105


def test_a_sequence_ends_with_its_process(device, tmp_path):
    device.release(
        "total", 1, onnx_models.total(tmp_path / "total.onnx"), state={"before": "sum"}, serving={"isolation": "process"}
    )
    device.select("total", 1)
    server = device.server().start()
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}]}
    with server.client() as client:

        def step(**parameters):
            asked = {**body, "parameters": {"sequence_id": 5, **parameters}}
            status, _, answer = client.request("POST", "/v2/models/total/infer", asked)
            found = json.loads(answer)
            return status, found["outputs"][0]["data"][0] if status == 200 else found["error"]

        assert [step(sequence_start=True), step(), step()] == [(200, 1.0), (200, 2.0), (200, 3.0)]
        os.kill(entry(client, "total")["pid"], signal.SIGKILL)
        eventually(lambda: entry(client, "total")["state"] == "READY", "it is back")
        found = step()
        if found[0] == 500:  # it was asked before the end was seen
            found = step()
        assert found[0] == 400
        assert "not under way" in found[1]
        assert step(sequence_start=True) == (200, 1.0)


def test_state_that_lives_in_the_process(serve, tmp_path):
    (tmp_path / "counter.fragile").write_text("counts")
    server = serve(tmp_path / "counter.fragile", isolated=["counter"])
    with server.client() as client:
        with client.sequence("counter") as one, client.sequence("counter") as other:
            found = [float(s.infer(X)["x"][0, 0]) for s in (one, one, other, one)]
        assert found == [1, 2, 1, 3]


def test_a_process_that_hangs_keeps_nobody_else(pair):
    """Stopped in the middle of everything, it holds one thread for each request in it; the one that polls is never among them."""
    server, client = pair
    pid = entry(client, "frail")["pid"]
    os.kill(pid, signal.SIGSTOP)
    found = []

    def ask():
        with Client(server.socket) as own:
            found.append(own.infer("frail", X)["x"][0, 0])

    thread = threading.Thread(target=ask)
    thread.start()
    for _ in range(50):
        assert client.infer("steady", X)["y"][0, 0] == 3
    assert found == []
    os.kill(pid, signal.SIGCONT)
    thread.join(DEADLINE_S)
    assert found == [2]


def test_it_dies_with_its_server(pair):
    server, client = pair
    pid = entry(client, "frail")["pid"]
    server.kill()
    eventually(lambda: not alive(pid), "the child goes with its parent")


def test_it_inherits_nothing_and_is_killed_first(pair):
    _, client = pair
    pid = entry(client, "frail")["pid"]
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]  # noqa: PTH115, PTH208
    assert not [link for link in links if "s.sock" in link or "eventpoll" in link]
    assert sum(link.startswith("socket:") for link in links) <= 3, "its control socket and those of its slots"
    assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "300"
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert b"ORT_DISABLE_TELEMETRY=1" in environment
