"""What waits, over real sockets: priorities, limits, deadlines, callers that go, batches, sequences."""

import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from agent.host.priority import STEP_BACK
from tests.serving import onnx_models
from tests.serving.server import read_answer, request

DEADLINE_S = 20.0
pytestmark = [pytest.mark.alone, pytest.mark.timeout(60)]  # who comes first is told by how long runs take


def body(name, datatype, values, shape=None, **parameters):
    shape = [len(values)] if shape is None else shape
    tensor = {"name": name, "datatype": datatype, "shape": shape, "data": values}
    return json.dumps({"inputs": [tensor], "parameters": parameters}).encode()


def infer(model, content, version=None):
    path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"
    return request("POST", path, content)


def long(value, **parameters):
    return infer("slow", body("x", "FP32", [value], **parameters))


def add(value, **parameters):
    return infer("total", body("x", "FP32", [value], [1, 1], **parameters))


def output(answer):
    status, _, content = answer
    assert status == 200, content
    return json.loads(content)["outputs"][0]["data"]


def wait_until(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline


def version_of(server, model, number="1"):
    with server.client() as client:
        status, _, content = client.request("GET", f"/control/v1/models/{model}")
    assert status == 200, content
    return json.loads(content)["versions"][number]


def statistics(server, model):
    with server.client() as client:
        _, _, content = client.request("GET", f"/v2/models/{model}/stats")
    return json.loads(content)["model_stats"][0]


class Sent:
    """A request under way on a connection of its own; several answers are told apart by when they came."""

    def __init__(self, server, content):
        self.sock = server.connect(DEADLINE_S)
        self.sock.sendall(content)
        self.answer = None
        self.when = None
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self):
        self.answer = read_answer(self.sock)
        self.when = time.monotonic()
        self.sock.close()

    def done(self):
        self.thread.join(DEADLINE_S)
        return self.answer


@pytest.fixture
def slow(device):
    """A server with one thread for long work, and a model `slow` that takes some 100 ms."""

    def start(serving=None, **settings):
        device.release("slow", 1, onnx_models.slow(device.folder / "slow.onnx", 900, 6), serving=serving or {})
        device.select("slow", 1)
        return device.server(**{"threads": 2, **settings}).start()

    return start


def test_the_more_urgent_is_answered_first(slow):
    server = slow()
    busy = [Sent(server, long(1.0, priority=1)) for _ in range(4)]
    later = []
    for count, priority in enumerate((0, 9, 2, 5, 2)):
        later.append(Sent(server, long(1.0, priority=priority)))
        wait_until(lambda count=count: version_of(server, "slow")["waiting"] > count)
    assert not all(b.answer for b in busy), "this machine is too slow for the test"
    for sent in [*busy, *later]:
        output(sent.done())
    assert sorted(range(5), key=lambda n: later[n].when) == [2, 4, 0, 3, 1]


def test_more_than_may_wait_are_refused(slow):
    server = slow({"max_queue_size": 2})
    sent = [Sent(server, long(1.0)) for _ in range(8)]
    answers = [s.done() for s in sent]
    refused = [a for a in answers if a[0] == 503]
    assert refused
    assert len(refused) <= 5
    assert json.loads(refused[0][2]) == {"error": "Exceeds maximum queue size"}
    assert refused[0][1]["retry-after"] == "1"
    assert sum(a[0] == 200 for a in answers) == 8 - len(refused)


def test_a_deadline_passes_while_no_thread_is_free(slow):
    server = slow()
    busy = [Sent(server, long(1.0)) for _ in range(4)]
    wait_until(lambda: version_of(server, "slow")["waiting"] == 3)
    begun = time.monotonic()
    late = Sent(server, long(1.0, timeout=20_000))
    status, headers, content = late.done()
    assert (status, json.loads(content)) == (503, {"error": "Request timeout expired"})
    assert headers["retry-after"] == "1"
    assert late.when - begun < 0.15, "it did not wait for a thread"
    assert not all(b.answer for b in busy)
    for one in busy:
        output(one.done())


def test_a_model_has_a_timeout_of_its_own(slow):
    server = slow({"default_timeout_us": 30_000})
    answers = [s.done()[0] for s in [Sent(server, long(1.0)) for _ in range(4)]]
    assert sorted(set(answers)) == [200, 503]


def test_who_hangs_up_while_waiting_is_dropped(slow):
    server = slow()
    busy = Sent(server, long(1.0))
    kept = Sent(server, long(1.0))
    gone = [server.connect() for _ in range(3)]
    for sock in gone:
        sock.sendall(long(1.0))
    wait_until(lambda: version_of(server, "slow")["waiting"] >= 3)
    for sock in gone:
        sock.close()
    wait_until(lambda: version_of(server, "slow")["waiting"] <= 1)
    output(busy.done())
    output(kept.done())
    wait_until(lambda: version_of(server, "slow")["stats"]["ok"] == 2)
    assert version_of(server, "slow")["stats"]["requests"] == 2


def test_who_only_stops_sending_is_answered(slow):
    import socket

    server = slow()
    busy = Sent(server, long(1.0))
    with server.connect() as sock:
        sock.sendall(long(1.0))
        sock.shutdown(socket.SHUT_WR)
        output(read_answer(sock))
    output(busy.done())


def test_a_bounded_model_leaves_threads_to_others(device):
    device.release("slow", 1, onnx_models.slow(device.folder / "slow.onnx", 900, 6), serving={"instances": 1})
    device.select("slow", 1)
    device.release("other", 1, onnx_models.slow(device.folder / "other.onnx", 901, 3))
    device.select("other", 1)
    server = device.server(threads=3).start()
    many = [Sent(server, long(1.0)) for _ in range(4)]
    wait_until(lambda: version_of(server, "slow")["waiting"] == 3)
    one = Sent(server, infer("other", body("x", "FP32", [1.0])))
    output(one.done())
    for sent in many:
        output(sent.done())
    assert one.when < sorted(m.when for m in many)[2]


def test_a_tiny_model_is_answered_while_all_threads_are_at_long_work(slow):
    server = slow()
    busy = [Sent(server, long(1.0)) for _ in range(16)]
    with server.client() as client:
        for _ in range(20):
            assert np.array_equal(client.infer("scale", np.ones((1, 4), np.float32))["y"], np.ones((1, 4), np.float32))
    assert not all(b.answer for b in busy)
    for one in busy:
        output(one.done())


@pytest.mark.skipif(os.geteuid() != 0, reason="a thread that gives way needs a privilege to come back")
@pytest.mark.parametrize("way", ["at once", "in turn", "in sequences"])
def test_long_runs_give_way_to_the_thread_that_polls(way, slow, totals):
    if way == "in sequences":
        server = totals(lambda path: onnx_models.slow_total(path, 900, 6), threads=3)
        asked = [add(1.0, sequence_id=n, sequence_start=True) for n in range(1, 7)]
    else:
        server = slow({"instances": 2} if way == "in turn" else {}, threads=3)
        asked = [long(1.0)] * 6 if way == "in turn" else [long(1.0)] * 2
    own = os.getpriority(os.PRIO_PROCESS, 0)

    def below():
        """How far each thread of the server lies below this one, sorted."""
        threads = Path(f"/proc/{server.process.pid}/task").iterdir()
        return sorted(os.getpriority(os.PRIO_PROCESS, int(thread.name)) - own for thread in threads)

    assert set(below()) == {0}, "loading came back"
    busy = [Sent(server, one) for one in asked]
    wait_until(lambda: below()[-3:] == [0, STEP_BACK, STEP_BACK])
    for one in busy:
        output(one.done())
    wait_until(lambda: set(below()) == {0})


# -- batches ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def batching(device):
    def start(**serving):
        device.release("lookup", 1, onnx_models.lookup(device.folder / "lookup.onnx"), serving=serving)
        device.select("lookup", 1)
        return device.server().start()

    return start


def test_requests_are_gathered_and_each_gets_its_rows(batching):
    server = batching(max_batch_size=8, max_delay_us=300_000)
    sizes = (1, 3, 2, 2)  # together 8: nobody waits for the delay
    rng = np.random.default_rng(1)
    values = [rng.integers(0, 10, size).tolist() for size in sizes]
    sent = [Sent(server, infer("lookup", body("x", "INT64", v))) for v in values]
    for one, given in zip(sent, values, strict=True):
        assert output(one.done()) == [100 + v for v in given]
    counted = statistics(server, "lookup")
    assert counted["inference_stats"]["success"]["count"] == 4


def test_one_alone_waits_no_longer_than_the_delay(batching):
    server = batching(max_batch_size=8, max_delay_us=400_000)
    begun = time.monotonic()
    one = Sent(server, infer("lookup", body("x", "INT64", [3])))
    assert output(one.done()) == [103]
    assert 0.39 < one.when - begun < 2.0
    begun = time.monotonic()
    short = Sent(server, infer("lookup", body("x", "INT64", [4], timeout=300_000)))
    assert output(short.done()) == [104], "it does not wait beyond its own deadline"
    assert short.when - begun < 0.3


def test_a_bad_row_fails_only_its_caller(batching):
    server = batching(max_batch_size=4, max_delay_us=300_000)
    sent = [Sent(server, infer("lookup", body("x", "INT64", [v]))) for v in (1, 2, 99, 4)]
    answers = [one.done() for one in sent]
    assert [a[0] for a in answers][2] in (400, 500)
    assert [output(a) for a in answers[:2] + answers[3:]] == [[101], [102], [104]]


def test_more_rows_than_one_run_takes_are_refused(batching):
    server = batching(max_batch_size=4)
    status, _, content = server.raw(infer("lookup", body("x", "INT64", [1] * 5)))
    assert status == 400
    assert "batch-size must be <= 4 for 'lookup'" in json.loads(content)["error"]
    assert output(server.raw(infer("lookup", body("x", "INT64", [1] * 4)))) == [101] * 4


def test_a_model_without_a_free_first_dimension_is_not_loaded_for_batches(device):
    path = onnx_models.slow(device.folder / "fixed.onnx", 10)
    device.release("fixed", 1, path, serving={"max_batch_size": 4})
    device.select("fixed", 1)
    server = device.server().start()
    assert "max_batch_size 4 needs a first dimension of any size" in version_of(server, "fixed")["reason"]


# -- sequences -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def totals(device):
    def start(path=onnx_models.total, **settings):
        for number, factor in ((1, 1.0), (2, 10.0)):
            made = path(device.folder / f"total-{number}.onnx", factor) if path is onnx_models.total else None
            made = made or path(device.folder / f"total-{number}.onnx")
            device.release("total", number, made, state={"before": "sum"})
        device.select("total", 1)
        return device.server(**settings).start()

    return start


def test_state_is_kept_within_a_sequence_and_only_there(totals):
    server = totals()
    with server.client() as client:
        assert [t["name"] for t in client.metadata("total")["inputs"]] == ["x"]
    assert output(server.raw(add(5.0, sequence_id=1, sequence_start=True))) == [5.0]
    assert output(server.raw(add(7.0, sequence_id="other", sequence_start=True))) == [7.0]
    assert output(server.raw(add(2.0, sequence_id=1))) == [7.0]
    assert output(server.raw(add(2.0))) == [2.0]
    assert output(server.raw(add(1.0, sequence_id="other"))) == [8.0]
    assert output(server.raw(add(1.0, sequence_id=1, sequence_end=True))) == [8.0]
    status, _, content = server.raw(add(1.0, sequence_id=1))
    assert status == 400
    assert "Its first request must set sequence_start" in json.loads(content)["error"]
    assert output(server.raw(add(9.0, sequence_id="other", sequence_start=True))) == [9.0], "a start begins anew"


def test_requests_of_one_sequence_come_in_order_over_two_connections(totals):
    server = totals(onnx_models.slow_total, threads=4)
    output(server.raw(add(0.0, sequence_id=5, sequence_start=True)))
    with server.connect(DEADLINE_S) as one, server.connect(DEADLINE_S) as two:
        for n in range(10):
            (one, two)[n % 2].sendall(add(float(2**n), sequence_id=5))
        found = []
        for sock in (one, two):
            rest = [output(read_answer_exactly(sock)) for _ in range(5)]
            found.append([r[0] for r in rest])
    answers = sorted(found[0] + found[1])
    assert answers[-1] == 2**10 - 1, "no state was lost"
    assert len(set(answers)) == 10
    assert found[0] == sorted(found[0])
    assert found[1] == sorted(found[1])


def read_answer_exactly(sock):
    """One of several answers that may have come already."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        piece = sock.recv(1)
        assert piece, data
        data += piece
    size = int(dict(line.split(": ", 1) for line in data.decode().strip().split("\r\n")[1:])["content-length"])
    content = b""
    while len(content) < size:
        content += sock.recv(size - len(content))
    return int(data.split()[1]), {}, content


def test_a_sequence_stays_on_its_version_until_that_one_goes(totals):
    server = totals()
    output(server.raw(add(1.0, sequence_id=1, sequence_start=True)))
    with server.client() as client:
        assert client.request("POST", "/control/v1/models/total/load", {"version": 2, "variant": "cpu"})[0] == 200
        assert client.request("POST", "/control/v1/models/total/activate", {"version": 2})[0] == 200
        assert output(server.raw(add(1.0, sequence_id=1))) == [2.0], "still the first version's"
        assert output(server.raw(add(1.0, sequence_id=2, sequence_start=True))) == [10.0]
        assert client.request("POST", "/control/v1/models/total/commit", {})[0] == 200
    status, _, content = server.raw(add(1.0, sequence_id=1))
    assert status == 400, content
    assert "it began on a version that is gone" in json.loads(content)["error"]
    assert output(server.raw(add(1.0, sequence_id=2))) == [20.0]


def test_sequences_are_bounded_and_idle_ones_expire(totals):
    server = totals(max_sequences=2, sequence_idle_s=0.3)
    for number in (1, 2):
        output(server.raw(add(1.0, sequence_id=number, sequence_start=True)))
    status, headers, _ = server.raw(add(1.0, sequence_id=3, sequence_start=True))
    assert (status, headers["retry-after"]) == (503, "1")
    wait_until(lambda: server.raw(add(1.0, sequence_id=3, sequence_start=True))[0] == 200)
    assert server.raw(add(1.0, sequence_id=1))[0] == 400


def test_a_failed_run_ends_nothing_but_its_own_sequence(totals):
    server = totals()
    output(server.raw(add(1.0, sequence_id=1, sequence_start=True)))
    wrong = infer("total", body("x", "FP32", [1.0, 2.0], [2, 1], sequence_id=1))
    assert server.raw(wrong)[0] in (200, 400)  # broadcast or refused, as the engine has it
    assert output(server.raw(add(1.0, sequence_id=2, sequence_start=True))) == [1.0]


def test_a_sequence_id_means_nothing_to_a_model_without_state(scale_server):
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1.0, 1.0, 1.0, 1.0]}
    content = json.dumps({"inputs": [tensor], "parameters": {"sequence_id": 9}}).encode()
    assert output(scale_server.raw(infer("scale", content))) == [3.0] * 4
