"""What is promised about time, cancellation and health, whatever `serve.threads` is: while all that may run are at long work."""

import time

import pytest

from tests.serving import onnx_models
from tests.serving.server import Device, request
from tests.serving.test_scheduling import Sent, infer, long, output, statistics, version_of, wait_until

pytestmark = [pytest.mark.alone, pytest.mark.timeout(90)]  # answers have to come before a long run is through
AT_ONCE_S = 0.3
ONE = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}'


@pytest.fixture(scope="module", params=[(1, 0), (2, 0), (3, 0), (64, 1)], ids=lambda row: f"{row[0]}-threads")
def server(request, tmp_path_factory):
    """Models `slow`, whose runs take more than half a second, and `scale`; and how many runs go on at once."""
    threads, instances = request.param
    device = Device(tmp_path_factory.mktemp("device"))
    device.release("slow", 1, onnx_models.slow(device.folder / "slow.onnx", 900, 60), serving={"instances": instances})
    device.release("scale", 1, onnx_models.scale(device.folder / "scale.onnx", 2.0))
    device.select("slow", 1)
    device.select("scale", 1)
    started = device.server(threads=threads).start()
    yield started, 1 if instances else max(1, threads - 1)
    assert started.stop() == 0


@pytest.fixture
def busy(server):
    """The server with all runs taken, these, and one request that waits behind them."""
    serving, most = server
    runs = [Sent(serving, long(1.0)) for _ in range(most)]
    waits = Sent(serving, long(1.0))
    wait_until(lambda: version_of(serving, "slow")["waiting"] == 1)
    yield serving, [*runs, waits]
    for sent in (*runs, waits):
        output(sent.done())


def test_health_control_and_small_predictions_are_answered_at_once(busy):
    server, sent = busy
    asked = [request("GET", "/v2/health/live"), request("GET", "/v2/health/ready"), request("GET", "/metrics")]
    asked += [request("GET", "/control/v1/models/slow"), infer("scale", ONE)]
    for content in asked:
        begun = time.monotonic()
        status, _, _ = server.raw(content)
        assert status == 200
        assert time.monotonic() - begun < AT_ONCE_S, content
    assert not any(s.answer for s in sent), "a run was through before: this machine is too fast for the test"


def test_a_timeout_is_answered_when_it_passes(busy):
    server, _ = busy
    begun = time.monotonic()
    status, headers, body = Sent(server, long(1.0, timeout=100_000)).done()
    assert 0.1 <= time.monotonic() - begun < 0.1 + AT_ONCE_S
    assert (status, headers["retry-after"]) == (503, "1")
    assert b"Request timeout expired" in body


def test_requests_of_clients_that_left_are_not_run(busy):
    server, sent = busy
    before = statistics(server, "slow")["execution_count"]
    for _ in range(5):
        with server.connect() as sock:
            sock.sendall(long(1.0))
            wait_until(lambda: version_of(server, "slow")["waiting"] == 2)
        wait_until(lambda: version_of(server, "slow")["waiting"] == 1)
    assert not any(s.answer for s in sent), "a run was through before: this machine is too fast for the test"
    for one in sent:
        one.done()
    assert statistics(server, "slow")["execution_count"] == before + len(sent)
