"""The serving process among its neighbours: systemd, slow and broken clients, kill -9."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from agent.client import Client, TimedOut, Unavailable
from tests.serving import onnx_models
from tests.serving.server import DEADLINE_S, Server, closed, read_answer, request

X = np.ones((1, 4), np.float32)
ONE = np.zeros(1, np.float32)


@pytest.fixture
def scale(tmp_path):
    return onnx_models.scale(tmp_path / "scale.onnx", 2.0)


@pytest.fixture
def slow(tmp_path):
    """A model of which one run takes long enough to do something meanwhile."""
    return onnx_models.slow(tmp_path / "slow.onnx", rounds=4)


def until(condition, what):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come about in {DEADLINE_S} s"
        threading.Event().wait(0.005)


def cpu_ticks(server):
    """The process's CPU time: how a run that is under way is seen from outside."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def infer(server, model, array):
    with server.client() as client:
        return client.infer(model, array)


@pytest.mark.alone  # the run must not end before the signal
def test_sigterm_answers_what_was_asked_and_removes_the_socket(serve_files, slow):
    server = serve_files(slow)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(infer(server, "slow", ONE)))
    before = cpu_ticks(server)
    thread.start()
    until(lambda: cpu_ticks(server) > before + 2, "the run")
    assert not answers
    assert server.stop() == 0
    thread.join(DEADLINE_S)
    assert answers, "the request that was under way is answered"
    assert not server.socket.exists()


def test_kill_9_and_the_client_comes_back_by_itself(serve_files, scale):
    server = serve_files(scale)
    with server.client() as client:
        assert client.infer("scale", X)["y"][0, 0] == 2
        server.kill()
        assert server.socket.exists(), "nobody could tidy up"
        with pytest.raises(Unavailable, match="no server answers"):
            client.infer("scale", X)
        assert not client.ready()
        server.start()
        assert client.infer("scale", X)["y"][0, 0] == 2
        server.kill()
        server.start()
        assert client.infer("scale", X)["y"][0, 0] == 2, "the kept connection is dead, a new one is made without a word"


def test_a_second_server_on_the_same_socket_is_refused(serve_files, scale, tmp_path):
    server = serve_files(scale)
    folder = tmp_path / "second"
    folder.mkdir()
    second = Server(folder, "run", scale, "--socket", server.socket).start(wait=False)
    assert second.process.wait(DEADLINE_S) == 1
    assert "another server answers" in second.output()
    second.stop()
    assert infer(server, "scale", X)["y"][0, 0] == 2


def test_a_file_in_the_way_is_not_removed(tmp_path, scale):
    (tmp_path / "s.sock").write_text("precious")
    server = Server(tmp_path, "run", scale, "--socket", tmp_path / "s.sock").start(wait=False)
    assert server.process.wait(DEADLINE_S) == 1
    assert "is not a socket" in server.output()
    server.stop()
    assert (tmp_path / "s.sock").read_text() == "precious"


def test_the_watchdog_is_fed_through_the_socket(serve_files, scale):
    server = serve_files(scale, environment={"WATCHDOG_USEC": "200000"})
    server.wait_for("WATCHDOG=1")
    server.wait_for("WATCHDOG=1")
    assert server.stop() == 0


def test_the_watchdog_is_fed_while_more_is_to_do_than_threads_can(serve_files, slow):
    server = serve_files(slow, environment={"WATCHDOG_USEC": "1000000"})
    threads = [threading.Thread(target=lambda: infer(server, "slow", ONE)) for _ in range(6)]
    for thread in threads:
        thread.start()
    server.wait_for("WATCHDOG=1")
    for thread in threads:
        thread.join(DEADLINE_S)


def test_a_socket_that_systemd_passes_is_served_and_left(tmp_path, scale):
    path = tmp_path / "passed.sock"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(8)
    early = Client(path)
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(early.infer("scale", X)))
    waiting.start()  # before there is a server: it waits, it is not refused
    script = (
        "import os, sys\n"
        f"os.dup2({listener.fileno()}, 3); os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'agent.cli', *sys.argv[1:]])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, "run", str(scale), "--socket", str(tmp_path / "unused.sock")],
        pass_fds=[listener.fileno()],
        env={**os.environ, "LISTEN_FDS": "1"},
        stdout=subprocess.DEVNULL,
    )
    waiting.join(DEADLINE_S)
    assert answers[0]["y"][0, 0] == 2
    assert not (tmp_path / "unused.sock").exists()
    process.terminate()
    assert process.wait(DEADLINE_S) == 0
    assert path.exists(), "it belongs to systemd"
    listener.close()
    early.close()


@pytest.mark.alone  # it measures
def test_slow_clients_delay_nobody(serve_files, scale):
    """Half-sent heads, half-sent large bodies and an answer that nobody reads: the others are answered as if they were alone."""
    server = serve_files(scale)
    body = bytes(4 << 20)
    big = request("POST", "/v2/models/scale/infer", body, Inference_Header_Content_Length=0)
    held = [server.connect() for _ in range(12)]
    for sock in held[:4]:
        sock.sendall(big[:20])
    for sock in held[4:8]:
        sock.sendall(big[: 1 << 20])
    for sock in held[8:]:
        sock.sendall(big)  # and never read the 4 MB that come back
    with server.client() as client:
        times = []
        for _ in range(200):
            started = time.perf_counter()
            assert client.infer("scale", X)["y"][0, 0] == 2
            times.append(time.perf_counter() - started)
    assert sorted(times)[100] < 0.05
    assert max(times) < 2
    for sock in held[4:8]:
        sock.sendall(big[1 << 20 :])
    for sock in held[4:]:
        status, _, answer = read_answer(sock)
        assert status == 200
        assert len(answer) > len(body)
    for sock in held:
        sock.close()


@pytest.mark.alone  # it measures
def test_long_runs_do_not_delay_short_ones(serve_files, scale, slow):
    server = serve_files(scale, slow)
    started = time.perf_counter()
    infer(server, "slow", ONE)
    one_run = time.perf_counter() - started
    ended = []

    def long_run():
        infer(server, "slow", ONE)
        ended.append(time.perf_counter())

    threads = [threading.Thread(target=long_run) for _ in range(8)]
    for thread in threads:
        thread.start()
    with server.client() as client:
        times = []
        while len(ended) < 8:
            started = time.perf_counter()
            client.infer("scale", X)
            times.append(time.perf_counter() - started)
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len(times) > 8
    assert sorted(times)[len(times) // 2] < one_run / 4, (one_run, sorted(times)[-5:])


def test_a_client_does_not_wait_for_ever(serve_files, slow):
    server = serve_files(slow)
    with server.client(timeout_s=0.01) as client, pytest.raises(TimedOut):
        client.infer("slow", {"x": ONE})
    with server.client() as client:
        assert client.ready()


def test_more_connections_than_allowed_evict_idle_ones(device):
    server = device.server(max_connections=4).start()
    held = [server.connect() for _ in range(4)]
    for sock in held:
        sock.sendall(request("GET", "/v2/health/live"))
        assert read_answer(sock)[0] == 200
    with server.client() as client:
        assert client.infer("scale", X)["y"][0, 0] == 1
    assert closed(held[0]), "the one that was idle for longest made room"
    for sock in held:
        sock.close()


def test_too_many_busy_connections_are_refused_in_words(device):
    server = device.server(max_connections=2).start()
    held = [server.connect() for _ in range(2)]
    for sock in held:
        sock.sendall(request("GET", "/v2/health/live"))
        assert read_answer(sock)[0] == 200
        sock.sendall(b"GET /v2")
    with server.connect() as late:
        status, _, body = read_answer(late)
        assert status == 503
        assert b"serve.max_connections" in body
    for sock in held:
        sock.sendall(b" HTTP/1.1\r\nHost: t\r\n\r\n")
        assert read_answer(sock)[0] == 200
        sock.close()


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_any_number_of_threads_serves(serve_files, scale, slow, threads):
    server = serve_files(scale, slow, options=("--threads", threads))
    with server.client() as client:
        until(lambda: client.ready("slow"), "the second model is loaded")
    clients = [threading.Thread(target=lambda: infer(server, "slow", ONE)) for _ in range(3)]
    for client in clients:
        client.start()
    assert infer(server, "scale", X)["y"][0, 0] == 2
    for client in clients:
        client.join(DEADLINE_S)
    large = np.ones((50_000, 4), np.float32)
    assert infer(server, "scale", large)["y"].sum() == 400_000


def test_two_quick_signals_end_it_once(serve_files, scale):
    server = serve_files(scale)
    server.process.send_signal(signal.SIGINT)
    assert server.stop() == 0


def test_the_serving_process_loads_nothing_of_the_fleet_link():
    """Memory and start-up time on an edge box are features."""
    forbidden = [
        "paho",
        "tuf",
        "requests",
        "cryptography",
        "fastapi",
        "click",
        "sqlalchemy",
        "onnxruntime",
        "ai_edge_litert",
        "psutil",
    ]
    script = "import sys, agent.serving, agent.serving.app, agent.client; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert "agent" in loaded
    assert not set(forbidden) & set(loaded)
