"""A model that hangs or kills costs itself: when it is loaded, when it is run for the first time, and when a request asks for it."""

import json
import os
import platform
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from agent.client import ClientError
from agent.contract.names import ReleaseRef
from tests.serving import onnx_models, tflite_models
from tests.serving.server import DEADLINE_S, Device, Server

pytestmark = pytest.mark.timeout(90)
LEAST, X = np.int32([-(2**31)]), np.ones((1, 4), np.float32)
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86 ends a process that divides so")


def why(server, model):
    with server.client() as client:
        status, _, content = client.request("GET", f"/control/v1/models/{model}")
    assert status == 200, content
    return json.loads(content)["versions"]["1"]


def load(server, model, version=1):
    """What is answered to whoever has a release loaded: status and reason."""
    with server.client() as client:
        status, _, content = client.request("POST", f"/control/v1/models/{model}/load", {"version": version, "variant": "cpu"})
    return status, json.loads(content).get("error", "")


def wait_until(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """`edge-agent run` on models of which one is good, and two that a request can harm."""
    folder = tmp_path_factory.mktemp("files")
    onnx_models.scale(folder / "good.onnx", 2.0)
    onnx_models.divides(folder / "divides.onnx")
    onnx_models.kills_at_load(folder / "kills.onnx")
    onnx_models.loops(folder / "endless.onnx", "endless")
    onnx_models.loops(folder / "zeros.onnx", "zeros")
    tflite_models.counts(folder / "counts.tflite", "same")
    server = Server(folder, "run", folder, "--socket", folder / "s.sock", "--load-timeout", "7", "--verbose").start()
    yield server
    assert server.stop() == 0


@pytest.mark.parametrize("apart", [(), ("--isolate", "model")], ids=["here", "isolated"])
def test_a_folder_with_files_that_belong_together(tmp_path, apart):
    """One model in it is several files; another one names files that are none of its business."""
    path = onnx_models.scattered(tmp_path / "m/model.onnx", (1, 2, 4))
    (tmp_path / "secret").write_bytes(bytes(100))
    evil = onnx_models.scattered(tmp_path / "m/evil.onnx", (1, 2, 4), ("weights.bin", "../secret", "sub/body.bin"))
    server = Server(tmp_path, "run", path.parent, "--socket", tmp_path / "s.sock", *apart).start()
    try:
        with server.client() as client:
            assert client.infer("model", {"x": X[:, :2]})["y"].tolist() == [[7, 7]]
        assert "keeps weights in '../secret', which is outside of its folder" in why(server, evil.stem)["reason"]
        (tmp_path / "m/model.onnx").write_text("<html>Sign in</html>")
        with server.client() as client:
            status, _, content = client.request("POST", "/v2/repository/models/model/load", {})
        assert (status, b"model.onnx is a web page (HTML)" in content) == (422, True)
        (tmp_path / "m/model.onnx").unlink()
        with server.client() as client:
            status, _, content = client.request("POST", "/v2/repository/models/model/load", {})
        assert (status, json.loads(content)["error"]) == (404, "failed to load 'model': model.onnx is missing")
    finally:
        assert server.stop() == 0


def test_the_others_are_served_while_one_hangs(files):
    """It is ready after a few seconds, and not when the last one has been given up."""
    assert "endless  is still being loaded" in files.output(), "so it said when it was ready"
    with files.client() as client:
        assert client.infer("good", {"x": X})["y"][0, 0] == 2


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        pytest.param("kills", "ends the process (SIGFPE)", marks=x86),
        ("endless", "were not done in 7 s"),
        ("counts", "were not done in 7 s"),
        ("zeros", "a run did not end within 7 s"),
    ],
)
def test_what_hangs_or_kills_is_refused_by_name(files, model, reason):
    wait_until(lambda: why(files, model)["state"] == "UNAVAILABLE")
    assert reason in why(files, model)["reason"]
    assert f"cannot load model '{model}'" in files.output()
    with files.client() as client, pytest.raises(ClientError, match="no version at ready state"):
        client.infer(model, {"x": np.zeros(1, np.float32)})


@x86
def test_a_request_that_kills_its_engine_fails_alone(files):
    """Its process comes back, and nobody else hears of it."""
    assert why(files, "divides")["pid"] != files.process.pid
    with files.client() as client:
        with pytest.raises(ClientError, match="SIGFPE"):
            client.infer("divides", {"x": LEAST, "z": np.int32([-1])})
        assert client.infer("good", {"x": X})["y"][0, 0] == 2
        assert client.infer("divides", {"x": np.int32([9]), "z": np.int32([3])})["y"][0] == 3


def test_it_is_said_why_a_model_has_a_process_of_its_own(files):
    assert "Div of INT32 can be asked for the least number divided by -1" in files.output()


def test_isolated_ones_that_hang_do_not_keep_the_others_waiting(tmp_path):
    """As many of them as are loaded at once."""
    for number in range(len(os.sched_getaffinity(0))):
        onnx_models.loops(tmp_path / f"a{number}.onnx", "zeros")
    onnx_models.divides(tmp_path / "good.onnx")
    server = Server(tmp_path, "run", tmp_path, "--socket", tmp_path / "s.sock", "--load-timeout", "60").start()
    with server.client() as client:
        assert client.infer("good", {"x": np.int32([9]), "z": np.int32([3])})["y"][0] == 3
    assert why(server, "a0")["state"] == "LOADING"
    begun = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(onnx_models.kills_at_load, "SIGFPE", marks=x86),
        (lambda path: onnx_models.loops(path, "endless"), "did not end within 3 s"),
    ],
    ids=["kills", "hangs"],
)
def test_a_file_that_was_changed_into_one_that_harms_is_refused_and_the_one_before_serves_on(make, words, tmp_path):
    path = onnx_models.scale(tmp_path / "model.onnx", 2.0)
    server = Server(tmp_path, "run", path, "--socket", tmp_path / "s.sock", "--load-timeout", "3").start()
    make(path)
    with server.client() as client:
        status, _, content = client.request("POST", "/v2/repository/models/model/load", {})
        assert (status, words in json.loads(content)["error"]) == (422, True), content
        assert client.infer("model", {"x": X})["y"][0, 0] == 2
        onnx_models.scale(path, 3.0)
        assert client.request("POST", "/v2/repository/models/model/load", {})[0] == 200
        assert client.infer("model", {"x": X})["y"][0, 0] == 3
    assert server.stop() == 0


def test_a_signal_ends_a_start_that_hangs(tmp_path):
    onnx_models.loops(tmp_path / "endless.onnx", "endless")
    server = Server(tmp_path, "run", tmp_path / "endless.onnx", "--socket", tmp_path / "s.sock", "--verbose").start(wait=False)
    wait_until((tmp_path / "s.sock").exists)
    begun = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - begun < 5


def test_files_of_which_none_can_be_served_end_it(tmp_path):
    onnx_models.loops(tmp_path / "endless.onnx", "endless")
    server = Server(tmp_path, "run", tmp_path / "endless.onnx", "--socket", tmp_path / "s.sock", "--load-timeout", "1").start(
        wait=False
    )
    assert server.process.wait(DEADLINE_S) == 1
    assert "were not done in 1 s" in server.output()
    server.stop()


# -- releases ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bad_release(tmp_path):
    """Starts `edge-agent serve` on a release `bad` 1, with `scale` beside it."""
    device = Device(tmp_path)
    device.release("scale", 1, onnx_models.scale(tmp_path / "scale.onnx", 2.0))
    device.select("scale", 1)
    servers = []

    def start(make, serving=None, **settings):
        if not servers:
            device.release("bad", 1, make(tmp_path / "bad.onnx"), serving=serving or {})
            device.select("bad", 1)
        servers.append(device.server(**settings).start(wait=False))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def test_a_release_that_kills_or_hangs_does_it_once(bad_release):
    """It was tried before it was selected, so it is loaded at once; the start after the one that it ended tries it apart."""
    server = bad_release(lambda path: onnx_models.loops(path, "endless"), load_timeout_s=2.0)
    assert server.process.wait(DEADLINE_S) == 1
    assert "loading model 'bad' version 1 has taken more than 2 s" in server.output()
    server = bad_release(None, load_timeout_s=8.0)
    server.wait_for("READY=1")
    assert why(server, "bad")["state"] == "LOADING", "the others do not wait for it"
    with server.client() as client:
        assert client.infer("scale", {"x": X})["y"][0, 0] == 2
    status, said = load(server, "bad")
    assert (status, "it is being tried apart" in said) == (422, True), said
    wait_until(lambda: "were not done in 8 s" in why(server, "bad")["reason"])
    status, said = load(server, "bad")
    assert (status, "were not done in 8 s; it is tried again when this program starts again" in said) == (422, True), said


def test_one_that_passes_when_it_is_tried_apart_is_served_after_all(bad_release, tmp_path):
    """What ended the process may have been anything."""
    (tmp_path / "serve").mkdir()
    (tmp_path / "serve/loading.json").write_text('[["bad", 1]]')
    server = bad_release(lambda path: onnx_models.scale(path, 3.0))
    server.wait_for("READY=1")
    wait_until(lambda: why(server, "bad")["state"] == "READY")
    with server.client() as client:
        assert client.infer("bad", {"x": X})["y"][0, 0] == 3
    assert "ended while it loaded model 'bad' version 1" in server.output()
    assert server.stop() == 0
    assert not (tmp_path / "serve/loading.json").exists()


NOTES = [
    "nothing",
    "garbage",
    "deep",
    "a number that is none",
    "a pipe",
    "a link to nowhere",
    "a folder",
    "in a folder that is a file",
]


@pytest.mark.parametrize("note", NOTES)
def test_a_note_that_is_none_keeps_nobody_from_serving(note, bad_release, tmp_path):
    path = tmp_path / "serve/loading.json"
    path.parent.mkdir()
    if note == "garbage":
        path.write_bytes(b"\xff{")
    elif note == "deep":
        path.write_text("[" * 100_000)
    elif note == "a number that is none":
        path.write_text('[["bad", 1e999]]')
    elif note == "a pipe":
        os.mkfifo(path)
    elif note == "a link to nowhere":
        path.symlink_to("/nowhere/at/all")
    elif note == "a folder":
        path.mkdir()
    elif note == "in a folder that is a file":
        path.parent.rmdir()
        path.parent.write_text("in the way")
    server = bad_release(lambda path: onnx_models.scale(path, 3.0))
    server.wait_for("READY=1")
    assert why(server, "bad")["state"] == "READY"
    assert server.stop() == 0


@x86
def test_a_release_that_kills_names_itself_to_the_next_start(bad_release):
    server = bad_release(onnx_models.kills_at_load)
    assert server.process.wait(DEADLINE_S) == -signal.SIGFPE
    server = bad_release(None)
    server.wait_for("READY=1")
    assert "SIGFPE" in why(server, "bad")["reason"]
    status, said = load(server, "bad")  # as `sync` does for what is selected and not served
    assert (status, "SIGFPE" in said) == (422, True), said
    assert server.stop() == 0
    server = bad_release(None)
    server.wait_for("READY=1")  # and to all that come after it
    assert "SIGFPE" in why(server, "bad")["reason"]


def test_a_run_that_does_not_end_costs_its_own_process(bad_release):
    server = bad_release(onnx_models.loops, run_timeout_s=1.0)
    server.wait_for("READY=1")
    with server.client() as client:
        before = why(server, "bad")["pid"]
        with pytest.raises(ClientError, match="did not end within 1 s"):
            client.infer("bad", {"x": np.ones(1, np.float32)})
        assert client.infer("bad", {"x": np.zeros(1, np.float32)})["y"][0] == 1
        assert why(server, "bad")["pid"] not in {before, None}


def test_a_release_may_accept_the_risk(bad_release):
    server = bad_release(onnx_models.divides, {"isolation": "in-process"})
    server.wait_for("READY=1")
    assert why(server, "bad")["pid"] is None


@pytest.mark.long
def test_a_signal_ends_a_process_whose_engine_hangs(bad_release):
    """The request's thread never comes back from the engine: after the time that requests are given, the process ends without it."""
    server = bad_release(onnx_models.loops, {"isolation": "in-process"})
    server.wait_for("READY=1")
    with server.connect() as sock:
        content = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]})
        sock.sendall(
            f"POST /v2/models/bad/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n{content}".encode()
        )
        with server.client() as client:
            assert client.infer("scale", {"x": X})["y"][0, 0] == 2
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(40) == 1


def test_a_folder_of_another_framework_is_called_what_it_is(tmp_path):
    (tmp_path / "saved_model.pb").write_bytes(b"\x08\x01")
    done = subprocess.run(
        [sys.executable, "-m", "agent.cli", "run", tmp_path], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, "is a TensorFlow SavedModel or frozen graph: convert it" in done.stderr) == (2, True)


def test_a_release_that_falls_back_tells_no_paths(tmp_path):
    device = Device(tmp_path)
    device.release("model", 1, onnx_models.scale(tmp_path / "m.onnx", 2.0))
    (tmp_path / "bad.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    device.release("model", 2, tmp_path / "bad.onnx")
    device.select("model", 2, previous=1)
    server = device.server().start()
    with server.client() as client:
        told = json.loads(client.request("POST", "/v2/repository/index", {})[2])
        assert client.infer("model", {"x": X})["y"][0, 0] == 2
    reasons = [entry["reason"] for entry in told if entry.get("reason")]
    assert any("bad.onnx is a Git LFS pointer" in reason for reason in reasons)
    assert not any(str(tmp_path) in reason or "/blobs" in reason for reason in reasons)
    assert server.stop() == 0


def test_a_library_of_operators_has_a_process_of_its_own_and_is_checked(tmp_path):
    """It is a part of the model: its bytes are what was signed, and what it does it does alone."""
    device = Device(tmp_path)
    (tmp_path / "ops.c").write_text("void *RegisterCustomOps(void *options, const void *api) { return 0; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "ops.so", tmp_path / "ops.c"], check=True, timeout=60)
    device.release("model", 1, onnx_models.scale(tmp_path / "m.onnx", 2.0), beside=["ops.so"], libraries=["ops.so"])
    device.select("model", 1)
    server = device.server().start()
    with server.client() as client:
        assert client.infer("model", {"x": X})["y"][0, 0] == 2
    assert why(server, "model")["pid"] != server.process.pid
    assert server.stop() == 0
    blob = device.store.file(device.store.manifest(ReleaseRef("model", 1)), "ops.so")
    blob.write_bytes(blob.read_bytes() + b"more")
    server = device.server().start()
    assert "hash mismatch of 'ops.so'" in why(server, "model")["reason"]
    assert server.stop() == 0
