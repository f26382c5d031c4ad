"""The access log and the traces: what a real server writes and sends about real requests."""

import http.server
import json
import socketserver
import threading
import time

import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.serving import onnx_models
from tests.serving.server import DEADLINE_S

X = np.ones((1, 4), np.float32)
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def until(condition, what):
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not come about in {DEADLINE_S} s"
        threading.Event().wait(0.02)
    return found


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def served(device):
    """A server with settings, ready."""

    def start(**settings):
        server = device.server(**settings)
        server.start()
        return server

    return start


def predict(server, **headers):
    body = json.dumps(
        {"id": "seven", "inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
    ).encode()
    with server.client() as client:
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        sent = f"POST /v2/models/scale/infer HTTP/1.1\r\nhost: t\r\n{head}content-length: {len(body)}\r\n\r\n".encode() + body
        assert server.raw(sent)[0] == 200
        assert client.request("GET", "/v2/models/none")[0] == 404
        assert client.request("GET", "/nowhere")[0] == 404
    return body


def test_a_line_for_every_request(served, tmp_path):
    log = tmp_path / "access.log"
    server = served(access_log=str(log))
    body = predict(server)
    found = until(
        lambda: [line for line in lines(log) if line["route"] != "GET /v2/health/live"][2:] and lines(log), "three lines"
    )
    asked = next(line for line in found if line["route"] == "POST /v2/models/{model}/infer")
    assert (asked["model"], asked["id"], asked["status"], asked["bytes_in"]) == ("scale", "seven", 200, len(body))
    assert asked["bytes_out"] > 0
    assert 0 < asked["ms"] < 1000 * DEADLINE_S
    assert asked["who"].startswith("uid ")
    assert asked["time"].endswith("+00:00")
    assert [line["status"] for line in found if line["model"] == "none" or not line["route"]] == [404, 404]


def test_nothing_is_lost_at_the_end(served, tmp_path):
    log = tmp_path / "access.log"
    server = served(access_log=str(log))
    with server.client() as client:
        for _ in range(50):
            client.infer("scale", X)
    assert server.stop() == 0
    assert sum(line["route"].endswith("/infer") for line in lines(log)) == 50


def test_a_log_that_was_moved_is_begun_anew(served, tmp_path):
    log, old = tmp_path / "access.log", tmp_path / "access.log.1"
    server = served(access_log=str(log))
    with server.client() as client:
        client.infer("scale", X)
        until(lambda: lines(log), "a line")
        log.rename(old)
        until(lambda: client.infer("scale", X) and lines(log), "a line in the new file")
    assert lines(old)


def test_predictions_that_wait_are_logged_too(tmp_path, device):
    """A model with one instance, asked by several at once: most answers are given by another thread than the one that read them."""
    log = tmp_path / "access.log"
    device.release("slow", 1, onnx_models.slow(tmp_path / "slow.onnx", side=400, rounds=2), serving={"instances": 1})
    device.select("slow", 1)
    server = device.server(access_log=str(log))
    server.start()

    def ask():
        with server.client() as client:
            client.infer("slow", np.zeros(1, np.float32))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.stop() == 0
    assert [line["status"] for line in lines(log) if line["route"].endswith("/infer")] == [200] * 6


def test_a_log_that_cannot_be_written_is_an_error_at_the_start(device, tmp_path):
    server = device.server(access_log=str(tmp_path / "none" / "access.log"))
    server.start(wait=False)
    assert server.process.wait(DEADLINE_S) == 1
    assert "serve.access_log" in server.output()


class Collector:
    """Takes traces as OpenTelemetry's collector does, over TCP or a Unix socket."""

    def __init__(self, address):
        self.spans = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                request = ExportTraceServiceRequest()
                request.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
                collector.spans += [s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans]
                collector.paths.append(self.path)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

            def address_string(self):
                return "test"

        kind = socketserver.ThreadingUnixStreamServer if isinstance(address, str) else socketserver.ThreadingTCPServer
        self.paths = []
        self.server = kind(address, Handler)
        self.server.daemon_threads = False
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture(params=["tcp", "unix"])
def collector(request, tmp_path):
    made = Collector(("127.0.0.1", 0) if request.param == "tcp" else str(tmp_path / "collector.sock"))
    address = made.server.server_address
    made.target = f"unix:{address}" if request.param == "unix" else f"http://127.0.0.1:{address[1]}/v1/traces"
    yield made
    made.close()


def test_spans_reach_a_collector_as_children_of_their_callers(served, collector):
    server = served(traces=collector.target, trace_ratio=0.0)
    predict(server, traceparent=PARENT)
    assert server.stop() == 0  # the end sends what is left
    assert len(collector.spans) == 1, "a caller's decision counts, and otherwise nothing is traced at this ratio"
    span = collector.spans[0]
    assert span.trace_id.hex() == PARENT.split("-")[1]
    assert span.parent_span_id.hex() == PARENT.split("-")[2]
    assert span.name == "infer scale"
    attributes = {a.key: a.value.string_value or a.value.int_value for a in span.attributes}
    assert attributes["model.name"] == "scale"
    assert attributes["request.id"] == "seven"
    assert attributes["http.response.status_code"] == 200
    assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < DEADLINE_S * 1e9
    assert abs(span.start_time_unix_nano / 1e9 - time.time()) < 60
    assert collector.paths == ["/v1/traces"]


def test_every_request_when_the_ratio_is_one(served, collector):
    server = served(traces=collector.target, trace_ratio=1.0)
    predict(server)
    assert server.stop() == 0
    names = [span.name for span in collector.spans]
    assert "infer scale" in names
    assert len([span for span in collector.spans if span.trace_id != collector.spans[0].trace_id]) >= 2


def test_a_collector_that_is_away_costs_no_request(served, tmp_path):
    server = served(traces=f"unix:{tmp_path}/nobody.sock", trace_ratio=1.0)
    predict(server)
    assert server.stop() == 0
