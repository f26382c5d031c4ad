"""The server's HTTP, spoken byte by byte by a client that may say anything. After every misuse the server still answers."""

import json
import random
import shutil
import subprocess
import threading

import numpy as np
import pytest

from agent.client import Client, InputRejected, ModelNotFound
from tests.serving.server import closed, read_answer, request

X = np.arange(4, dtype=np.float32).reshape(1, 4)
JSON_REQUEST = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0, 1, 2, 3]}]}).encode()
INFER = "/v2/models/scale/infer"


@pytest.fixture(autouse=True)
def _still_answers(scale_server):
    yield
    with Client(scale_server.socket) as client:
        assert np.array_equal(client.infer("scale", X)["y"], 3 * X)


def binary_request(path=INFER, **headers):
    head = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}}]}
    text = json.dumps(head).encode()
    return request("POST", path, text + X.tobytes(), Inference_Header_Content_Length=len(text), **headers)


def test_a_prediction_in_json(scale_server):
    status, headers, body = scale_server.raw(request("POST", INFER, JSON_REQUEST))
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body) == {
        "model_name": "scale",
        "model_version": "1",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [0, 3, 6, 9]}],
    }


def test_raw_mode_answers_in_binary(scale_server):
    status, headers, body = scale_server.raw(request("POST", INFER, X.tobytes() * 2, Inference_Header_Content_Length=0))
    at = int(headers["inference-header-content-length"])
    assert (status, headers["content-type"]) == (200, "application/octet-stream")
    assert json.loads(body[:at])["outputs"][0]["shape"] == [2, 4]
    assert np.array_equal(np.frombuffer(body[at:], np.float32).reshape(2, 4), np.repeat(3 * X, 2, axis=0))


def test_routes_of_the_protocol(scale_server):
    def get(path, method="GET", body=b""):
        status, _, answer = scale_server.raw(request(method, path, body))
        return status, json.loads(answer) if answer else None

    assert get("/v2")[1]["name"] == "edge-agent"
    assert get("/v2/health/live") == (200, None)
    assert get("/v2/health/ready") == (200, None)
    assert get("/v2/models/scale")[1] == {
        "name": "scale", "versions": ["1"], "platform": "onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
    }  # fmt: skip
    assert get("/v2/models/scale/versions/1")[0] == 200
    assert get("/v2/models/scale/versions/stable")[0] == 200
    assert get("/v2/models/scale/ready") == (200, None)
    assert get("/v2/models/%73cale/ready") == (200, None)
    assert get("/v2/models/scale/stats")[1]["model_stats"][0]["name"] == "scale"
    assert len(get("/v2/models/stats")[1]["model_stats"]) == 2
    index = [{"name": "pair", "version": "1", "state": "READY"}, {"name": "scale", "version": "1", "state": "READY"}]
    assert get("/v2/repository/index", "POST") == (200, index)
    assert get("/v2/repository/index", "POST", b'{"ready":true}') == (200, index)
    status, headers, metrics = scale_server.raw(request("GET", "/metrics"))
    assert (status, headers["content-type"].split(";")[0]) == (200, "text/plain")
    assert b'nv_inference_request_success{model="scale",version="1"} ' in metrics
    assert b'edge_inference_request_duration_seconds_bucket{model="scale",version="1",le="+Inf"} ' in metrics


@pytest.mark.parametrize(
    ("method", "path", "status", "error"),
    [
        ("GET", "/v2/models/none", 404, "Request for unknown model: 'none' is not found"),
        ("POST", "/v2/models/none/infer", 404, "Request for unknown model: 'none' is not found"),
        ("GET", "/v2/models/none/ready", 404, "Request for unknown model: 'none' is not found"),
        ("GET", "/v2/models/scale/versions/9", 404, "Request for unknown model: 'scale' version 9 is not found"),
        ("GET", "/v2/models/scale/versions/x", 404, "Not Found"),
        ("GET", "/v2/models/scale/versions/previous", 404, "Request for unknown model: 'scale' version previous is not found"),
        ("GET", "/", 404, "Not Found"),
        ("GET", INFER, 405, "Method Not Allowed"),
        ("DELETE", "/v2/models/scale", 405, "Method Not Allowed"),
        ("POST", INFER, 400, "the body is not an inference request: Input data was truncated"),
    ],
)
def test_what_cannot_be_answered_says_why(scale_server, method, path, status, error):
    got, _, body = scale_server.raw(request(method, path))
    assert (got, json.loads(body)["error"]) == (status, error)


GETS = (
    "/v2",
    "/v2/health/live",
    "/v2/models/scale",
    "/v2/models/scale/config",
    "/v1/models/scale",
    "/control/v1/status",
    "/metrics",
)


@pytest.mark.parametrize("path", GETS)
def test_head_is_answered_as_get_without_the_body(scale_server, path):
    with scale_server.connect() as sock:
        sock.sendall(request("HEAD", path) + request("GET", "/v2/health/live") + request("GET", path))
        data = b""
        while data.count(b"HTTP/1.1 ") < 3:
            data += sock.recv(1 << 20)
    head, live, get = data.split(b"HTTP/1.1 ")[1:]
    assert [part[:3] for part in (head, live, get)] == [b"200"] * 3
    assert head.endswith(b"\r\n\r\n")
    assert (b"content-length: 0" in head) == (path == "/v2/health/live")
    types = [[line for line in part.split(b"\r\n") if line.startswith(b"content-type")] for part in (head, get)]
    assert types[0] == types[1]


ALLOWED = {
    "/v2/models/scale": "GET, HEAD, OPTIONS",
    INFER: "OPTIONS, POST",
    "/v1/models/scale:predict": "OPTIONS, POST",
    "/v1/models/scale/versions/1:classify": "OPTIONS, POST",
    "/v1/models/scale/labels/stable:regress": "OPTIONS, POST",
    "/v2/logging": "GET, HEAD, OPTIONS, POST",
}


@pytest.mark.parametrize("path", ALLOWED)
def test_other_methods_hear_which_are_allowed(scale_server, path):
    wrong = [method for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "TRACE") if method not in ALLOWED[path]]
    for method in wrong:
        with scale_server.connect() as sock:
            sock.sendall(request(method, path, Connection="close"))
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 405 "), method
        assert b"\r\nallow: %b\r\n" % ALLOWED[path].encode() in answer
    status, headers, body = scale_server.raw(request("OPTIONS", path))
    assert (status, headers["allow"], body) == (200, ALLOWED[path], b"")


def test_options_of_the_whole_server_and_of_nothing(scale_server):
    for target in ("*", "/", "http://edge-agent/"):
        status, headers, _ = scale_server.raw(request("OPTIONS", target))
        assert (status, headers["allow"]) == (200, "GET, HEAD, OPTIONS, POST")
    assert scale_server.raw(request("OPTIONS", "/none"))[0] == 404
    assert scale_server.raw(request("GET", "*"))[0] == 404


TARGETS = {
    "a whole URL": (b"GET http://other:80/v2/models/scale?a=b HTTP/1.1\r\nHost: x\r\n\r\n", 200),
    "a whole URL without a path": (b"GET http://other HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "percent-encoded": (b"GET /v2/models/%73c%61le HTTP/1.1\r\nHost: x\r\n\r\n", 200),
    "percent-encoded verb": (b"GET /v1/models/scale%3Apredict HTTP/1.1\r\nHost: x\r\n\r\n", 405),
    "a slash in a name": (b"GET /v2/models/a%2Fb HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "no UTF-8": (b"GET /v2/models/%ff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "no path": (b"GET scale HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "an empty host": (b"GET /v2 HTTP/1.1\r\nHost:\r\n\r\n", 200),
    "no host": (b"GET /v2 HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET /v2 HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "HTTP/1.2": (b"GET /v2 HTTP/1.2\r\nHost: x\r\n\r\n", 400),
    "folded header": (b"GET /v2 HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n", 400),
    "a space before the colon": (b"GET /v2 HTTP/1.1\r\nHost : x\r\n\r\n", 400),
    "two lengths": (b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 400),
    "a list of lengths": (b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nContent-Length: 2, 2\r\n\r\n{}", 400),
    "a signed length": (b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nContent-Length: +2\r\n\r\n{}", 400),
    "a length and chunks": (
        b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        400,
    ),
    "chunks with extensions and trailers": (
        b'POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;a=b;c="d"\r\n{\r\n1 ; e\r\n}\r\n0;f\r\nX-Sum: 1\r\nY: 2\r\n\r\n',
        200,
    ),
    "another expectation": (b"GET /v2 HTTP/1.1\r\nHost: x\r\nExpect: wonders\r\n\r\n", 417),
    "any coding": (b"GET /v2 HTTP/1.1\r\nHost: x\r\nAccept-Encoding: *\r\n\r\n", 200),
    "no coding": (b"GET /v2 HTTP/1.1\r\nHost: x\r\nAccept-Encoding: br, identity;q=0\r\n\r\n", 406),
    "nothing but brotli": (b"GET /v2 HTTP/1.1\r\nHost: x\r\nAccept-Encoding: br, *;q=0\r\n\r\n", 406),
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_requests_as_http_has_them(scale_server, name):
    sent, status = TARGETS[name]
    got, headers, _ = scale_server.raw(sent)
    assert got == status
    assert (headers.get("connection") == "close") == (status in (400, 505) and name != "no UTF-8")


CONNECTIONS = {
    "HTTP/1.1": (b"1.1", b"", None),
    "closes": (b"1.1", b"Connection: Close\r\n", "close"),
    "closes, in a list": (b"1.1", b"Connection: upgrade , CLOSE\r\nUpgrade: h2c\r\n", "close"),
    "closes, in a second line": (b"1.1", b"Connection: keep-alive\r\nConnection: close\r\n", "close"),
    "something that has close in it": (b"1.1", b"Connection: disclose\r\n", None),
    "HTTP/1.0": (b"1.0", b"", "close"),
    "HTTP/1.0 that stays": (b"1.0", b"Connection: Keep-Alive\r\n", "keep-alive"),
    "HTTP/1.0 that does not": (b"1.0", b"Connection: keep-alive, close\r\n", "close"),
}


@pytest.mark.parametrize("name", CONNECTIONS)
def test_whether_a_connection_stays(scale_server, name):
    version, headers, said = CONNECTIONS[name]
    with scale_server.connect() as sock:
        asked = b"GET /v2/health/live HTTP/%b\r\nHost: x\r\n%b\r\n" % (version, headers)
        sock.sendall(asked)
        status, answered, _ = read_answer(sock)
        assert (status, answered.get("connection")) == (200, said)
        if said == "close":
            assert closed(sock)
        else:
            sock.sendall(asked)
            assert read_answer(sock)[0] == 200


def test_a_client_that_waits_to_be_told_to_go_on(scale_server):
    head = request("POST", INFER, JSON_REQUEST, Expect="100-Continue")[: -len(JSON_REQUEST)]
    with scale_server.connect() as sock:
        sock.sendall(head)
        assert sock.recv(1024) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(JSON_REQUEST)
        assert read_answer(sock)[0] == 200


@pytest.mark.parametrize("length", ["-1", "x", "100000", "1e3", ""])
def test_a_header_length_that_lies(scale_server, length):
    status, _, body = scale_server.raw(request("POST", INFER, JSON_REQUEST, Inference_Header_Content_Length=length))
    assert status == 400, body
    assert "header" in json.loads(body)["error"].lower()


def test_other_content_encodings_are_not_understood(scale_server):
    status, headers, body = scale_server.raw(request("POST", INFER, JSON_REQUEST, Content_Encoding="br"))
    assert (status, headers["accept-encoding"]) == (415, "gzip, deflate")
    assert "'br'" in json.loads(body)["error"]


def test_pipelined_requests_are_answered_in_order(scale_server):
    count = 100
    with scale_server.connect() as sock:
        sock.sendall((binary_request() + request("GET", "/none")) * count)
        answered = b""
        while answered.count(b"HTTP/1.1 ") < 2 * count:
            answered += sock.recv(1 << 20)
    statuses = [int(part[:3]) for part in answered.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [200, 404] * count


def test_an_http_1_0_client_is_answered_and_left(scale_server):
    with scale_server.connect() as sock:
        sock.sendall(b"GET /v2/health/live HTTP/1.0\r\n\r\n")
        assert read_answer(sock)[0] == 200
        assert closed(sock)


def test_a_connection_is_closed_when_asked(scale_server):
    with scale_server.connect() as sock:
        sock.sendall(binary_request(Connection="close"))
        status, headers, _ = read_answer(sock)
        assert (status, headers["connection"]) == (200, "close")
        assert closed(sock)


def test_a_body_that_is_too_large_is_refused_while_it_is_still_being_sent(scale_server):
    """The client sends on without looking; it still reads the whole answer, not a broken connection."""
    size = 64 * 1024 * 1024 + 1
    with scale_server.connect() as sock:
        sock.sendall(b"POST %s HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % (INFER.encode(), size))
        for _ in range(size // (1 << 20)):
            sock.sendall(bytes(1 << 20))
        status, headers, body = read_answer(sock)
        assert (status, headers["connection"]) == (413, "close")
        assert f"{size} bytes" in json.loads(body)["error"]
        assert closed(sock)


@pytest.mark.parametrize(
    "garbage",
    [b"\x16\x03\x01\x02\x00\x01", b"\r\n\r\n\r\nhello", random.Random(8).randbytes(64), b"GET / HTTP/1.1\r\n:\r\n\r\n"],
)
def test_garbage_is_answered_with_400_and_the_end(scale_server, garbage):
    with scale_server.connect() as sock:
        sock.sendall(garbage)
        assert read_answer(sock)[0] == 400
        sock.sendall(request("GET", "/v2"))
        assert closed(sock)


def test_a_peer_that_leaves_within_a_request(scale_server):
    data = binary_request()
    for cut in (1, 30, len(data) - 1):
        with scale_server.connect() as sock:
            sock.sendall(data[:cut])


def test_a_large_tensor_goes_through_unchanged(scale_server):
    rng = np.random.default_rng(1)
    array = rng.standard_normal((100_000, 4)).astype(np.float32)
    with Client(scale_server.socket) as client:
        for _ in range(3):
            assert np.array_equal(client.infer("scale", array)["y"], array * np.float32(3))


def test_requests_of_all_sizes_from_many_clients_at_once(scale_server):
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        with Client(scale_server.socket) as client:
            for _ in range(60):
                array = rng.standard_normal((int(rng.integers(1, 20_000)), 4)).astype(np.float32)
                if not np.array_equal(client.infer("scale", array)["y"], array * np.float32(3)):
                    failures.append(array.shape)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_two_inputs_and_chosen_outputs(scale_server):
    a, b = np.array([5, 6]), np.array([1, 2])
    with Client(scale_server.socket) as client:
        assert {n: v.tolist() for n, v in client.infer("pair", {"a": a, "b": b}).items()} == {
            "total": [6, 8],
            "difference": [4, 4],
        }
        assert list(client.infer("pair", {"a": a, "b": b}, outputs=["difference"])) == ["difference"]
        with pytest.raises(InputRejected, match="input 'b' has n 3, but input 'a' has n 2"):
            client.infer("pair", {"a": a, "b": np.array([1, 2, 3])})
        with pytest.raises(InputRejected, match="give each by its name"):
            client.infer("pair", a)
        with pytest.raises(InputRejected, match="datatype 'FP32'; model 'pair' expects 'INT64'"):
            client.infer("pair", {"a": a.astype(np.float32), "b": b})
        with pytest.raises(ModelNotFound):
            client.infer("pair", {"a": a, "b": b}, version=7)


def test_a_request_out_of_time_is_not_run(scale_server):
    document = json.loads(JSON_REQUEST)
    document["parameters"] = {"timeout": 1}
    status, headers, body = scale_server.raw(request("POST", INFER, json.dumps(document).encode()))
    assert (status, json.loads(body)["error"], headers["retry-after"]) == (503, "Request timeout expired", "1")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(scale_server, tmp_path):
    def curl(*arguments):
        command = ["curl", "-sS", "--max-time", "10", "--unix-socket", str(scale_server.socket), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout

    assert json.loads(curl("http://localhost/v2/models/scale"))["name"] == "scale"
    answer = json.loads(curl(f"http://localhost{INFER}", "-d", JSON_REQUEST.decode()))
    assert answer["outputs"][0]["data"] == [0, 3, 6, 9]
    large = tmp_path / "large.json"
    data = [1.0] * 400_000
    large.write_text(json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [100_000, 4], "data": data}]}))
    for extra in ((), ("-H", "Transfer-Encoding: chunked"), ("--http1.0",)):
        answer = json.loads(curl(f"http://localhost{INFER}", "--data-binary", f"@{large}", *extra))
        assert answer["outputs"][0]["data"][:2] == [3.0, 3.0]
