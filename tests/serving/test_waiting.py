"""Predictions that wait without a thread, among all else that a connection can bring; none is lost, and the server ends in time."""

import gzip
import threading

import numpy as np
import pytest
import tritonclient.grpc as triton

from tests.serving import onnx_models
from tests.serving.server import read_answer
from tests.serving.test_scheduling import DEADLINE_S, Sent, body, infer, output, version_of, wait_until

pytestmark = [pytest.mark.alone, pytest.mark.timeout(60)]  # the server must be seen at work before it has done it
READY = b"GET /v2/health/ready HTTP/1.1\r\nHost: t\r\n\r\n"


@pytest.fixture
def slow(device):
    """`slow` takes some 100 ms, one run at a time."""

    def start(**settings):
        device.release("slow", 1, onnx_models.slow(device.folder / "slow.onnx", 900, 6), serving={"instances": 1})
        device.select("slow", 1)
        return device.server(**settings).start()

    return start


def long(value):
    return infer("slow", body("x", "FP32", [value]))


def busy(server, count=4):
    """Keeps the model at work, and some waiting for it."""
    sent = [Sent(server, long(1.0)) for _ in range(count)]
    wait_until(lambda: version_of(server, "slow")["waiting"] >= count - 2)
    return sent


def statuses(sock, count):
    """Of so many answers, which may come together."""
    data = b""
    while data.count(b"HTTP/1.1 ") < count:
        data += sock.recv(65536)
    return [int(part[:3]) for part in data.split(b"HTTP/1.1 ")[1:]]


def test_what_comes_behind_it_is_answered_in_order(slow):
    server = slow()
    others = busy(server)
    with server.connect(DEADLINE_S) as sock:
        sock.sendall(long(1.0) + READY + long(2.0) + READY)
        assert statuses(sock, 4) == [200] * 4
    for other in others:
        output(other.done())


@pytest.mark.parametrize(
    "end",
    [lambda raw: raw.replace(b"HTTP/1.1", b"HTTP/1.0", 1), lambda raw: raw.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)],
)
def test_the_last_of_a_connection_ends_it(slow, end):
    server = slow()
    others = busy(server)
    with server.connect(DEADLINE_S) as sock:
        sock.sendall(end(long(1.0)) + READY)
        assert read_answer(sock)[0] == 200
        assert sock.recv(1) == b""
    for other in others:
        output(other.done())


def test_a_compressed_one(slow):
    server = slow()
    others = busy(server)
    packed = gzip.compress(body("x", "FP32", [1.0]))
    head = b"POST /v2/models/slow/infer HTTP/1.1\r\nHost: t\r\nContent-Encoding: gzip\r\nAccept-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
    with server.connect(DEADLINE_S) as sock:
        sock.sendall(head % len(packed) + packed + READY)
        assert statuses(sock, 2) == [200, 200]
    for other in others:
        output(other.done())


def test_the_end_of_the_server_answers_all(slow, tmp_path):
    server = slow(grpc_socket=str(tmp_path / "g.sock"))
    answers = []
    given = triton.InferInput("x", [1], "FP32")
    given.set_data_from_numpy(np.ones(1, np.float32))

    def call():
        with triton.InferenceServerClient(f"unix:{tmp_path / 'g.sock'}") as client:
            answers.append(client.infer("slow", [given]).as_numpy("y") is not None)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    others = busy(server, 6)

    def all_came():
        found = version_of(server, "slow")
        return found["waiting"] + found["stats"]["ok"] >= len(others) + len(threads) - 1  # one runs

    wait_until(all_came)
    gone = server.connect(DEADLINE_S)
    gone.sendall(long(1.0))
    gone.close()
    assert server.stop() == 0
    for other in others:
        output(other.done())
    for thread in threads:
        thread.join(DEADLINE_S)
    assert answers == [True] * 3
