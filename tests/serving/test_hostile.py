"""Clients that are slow, greedy or wrong, against the real process: what they do to themselves, and not to others."""

import contextlib
import fcntl
import json
import struct
import termios
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.serving import onnx_models
from tests.serving.server import DEADLINE_S, read_answer, request

ONES = np.ones((1, 4), np.float32)


def test_a_pipelining_client_that_reads_late_gets_every_answer(scale_server):
    count = 1200
    with scale_server.connect() as sock:
        sock.sendall(request("GET", "/control/v1/status") * count)
        until_nothing_moves(sock)
        for _ in range(count):
            status, _, body = read_exactly(sock)
            assert status == 200
            assert json.loads(body)["models"]


def until_nothing_moves(sock):
    """Waits until the server cannot send any more, because nobody reads."""
    waiting, before, deadline = -1, -2, time.monotonic() + DEADLINE_S
    while waiting != before:
        assert time.monotonic() < deadline
        threading.Event().wait(0.3)
        before, waiting = waiting, struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0]


def read_exactly(sock):
    """One answer and not a byte more."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        piece = sock.recv(1)
        if not piece:
            raise EOFError(f"the connection ended after {head!r}")
        head += piece
    size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    if size:
        return read_answer_body(sock, head, size)
    return int(head.split()[1]), head, b""


def read_answer_body(sock, head, size):
    body = b""
    while len(body) < size:
        piece = sock.recv(size - len(body))
        if not piece:
            raise EOFError("the connection ended within an answer")
        body += piece
    return int(head.split()[1]), head, body


def resident_bytes(server):
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * 4096


def peak_bytes(server):
    for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not say")


def test_a_long_text_among_numbers_costs_no_memory(serve_files, tmp_path):
    server = serve_files(onnx_models.scale(tmp_path / "scale.onnx", 3.0))
    before = peak_bytes(server)
    data = ["x" * 100_000, *[""] * 3999]
    body = json.dumps({"inputs": [{"name": "x", "shape": [1000, 4], "datatype": "FP32", "data": data}]}).encode()

    status, _, answer = server.raw(request("POST", "/v2/models/scale/infer", body))

    assert status == 400
    assert b"numbers" in answer
    assert peak_bytes(server) - before < 50_000_000


def free(path, kind, rank=1):
    """y = the shape of x, which may be any: what is read of x is all that takes memory."""
    x = helper.make_tensor_value_info("x", kind, [f"n{at}" for at in range(rank)])
    graph = helper.make_graph(
        [helper.make_node("Shape", ["x"], ["y"])], "g", [x], [helper.make_tensor_value_info("y", TensorProto.INT64, [rank])]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


MB = 1_000_000


def tensor(shape, datatype, data):
    return b'{"inputs":[{"name":"x","shape":%b,"datatype":"%b","data":%b}]}' % (json.dumps(shape).encode(), datatype, data)


def listed(element, count):
    return b"[" + b",".join([element] * count) + b"]"


def binary_texts(count):
    head = {"name": "x", "shape": [count], "datatype": "BYTES", "parameters": {"binary_data_size": 6 * count}}
    return json.dumps({"inputs": [head]}).encode()


HEAVY = {
    "BYTES of two bytes": ("texts", binary_texts(3 * MB) + b"\2\0\0\0ab" * 3 * MB, len(binary_texts(3 * MB)), 413),
    "strings": ("texts", tensor([2 * MB], b"BYTES", listed(b'"ab"', 2 * MB)), None, 413),
    "strings that are long": ("texts", tensor([1000], b"BYTES", listed(b'"%b"' % (b"a" * 10_000), 1000)), None, 200),
    "one string": ("texts", tensor([1], b"BYTES", b'["%b"]' % (b"a" * 4 * MB)), None, 200),
    "[1],": ("rows", tensor([2 * MB, 1], b"FP32", listed(b"[1]", 2 * MB)), None, 200),
    "1,": ("numbers", tensor([4 * MB], b"FP32", listed(b"1", 4 * MB)), None, 200),
    "null,": ("numbers", tensor([MB], b"FP32", listed(b"null", MB)), None, 200),
    "[],": ("rows", tensor([2 * MB, 0], b"FP32", listed(b"[]", 2 * MB)), None, 200),
    "deep": ("numbers", tensor([1], b"FP32", b"[" * 4 * MB + b"]" * 4 * MB), None, 400),
    "digits": ("numbers", tensor([1], b"FP32", b"[0.%b]" % (b"1" * 8 * MB)), None, 400),
    "inputs": ("numbers", b'{"inputs":[%b]}' % b",".join([b'{"name":"x","shape":[1],"datatype":"FP32","data":[1]}'] * 200_000), None, 400),
    "parameters": ("numbers", b'{"inputs":[],"parameters":{%b}}' % b",".join(b'"%d":1' % n for n in range(MB)), None, 400),
    "names": ("numbers", b'{"inputs":[],"%b":1}' % (b"a" * 8 * MB), None, 400),
}  # fmt: skip


@pytest.mark.parametrize("name", HEAVY)
def test_decoding_takes_at_most_four_times_the_body(serve_files, tmp_path, name):
    """With the body itself, and a little that the engine and every server need. What would take more is refused."""
    model, body, length, expected = HEAVY[name]
    kinds = {"texts": (TensorProto.STRING, 1), "rows": (TensorProto.FLOAT, 2), "numbers": (TensorProto.FLOAT, 1)}
    server = serve_files(free(tmp_path / f"{model}.onnx", *kinds[model]))
    headers = {} if length is None else {"Inference_Header_Content_Length": length}
    path = f"/v2/models/{model}/infer"
    server.raw(request("POST", path, b"{}"))
    before = peak_bytes(server)
    status, _, answer = server.raw(request("POST", path, body, **headers))
    assert status == expected, answer
    assert peak_bytes(server) - before < 4 * len(body) + 12 * MB


def test_decoding_is_refused_while_others_fill_the_pool(device, tmp_path):
    """What many small bodies become together is bounded, too: by four of max_body_bytes."""
    texts = tensor([100_000], b"BYTES", listed(b'"a"', 100_000))  # 0.4 MB that become some ten
    device.release("texts", 1, free(tmp_path / "texts.onnx", TensorProto.STRING))
    device.select("texts", 1)
    server = device.server(max_body_bytes=2_000_000).start()
    status, headers, answer = server.raw(request("POST", "/v2/models/texts/infer", texts))
    assert (status, headers.get("retry-after")) == (503, "1"), answer
    few = tensor([1000], b"BYTES", listed(b'"a"', 1000))
    assert server.raw(request("POST", "/v2/models/texts/infer", few))[0] == 200


def test_a_model_that_yields_what_is_not_finite_answers_json_clients(serve_files, tmp_path):
    server = serve_files(onnx_models.identity(tmp_path / "float.onnx", TensorProto.FLOAT))
    status, _, answer = server.raw(request("POST", "/v2/models/float/infer", tensor([3], b"FP32", b"[NaN,-Infinity,null]")))
    assert status == 200
    assert b'"data":[NaN,-Infinity,NaN]' in answer
    with server.client() as client:
        stats = client.status()["models"]["float"]["versions"]["1"]["stats"]
    assert (stats["requests"], stats["failed"]) == (1, {"invalid": 0, "run": 0, "unavailable": 0})


@pytest.mark.alone  # each refusal is waited for for 0.2 s
def test_chunked_bodies_share_the_bound_of_large_bodies(serve_files, tmp_path):
    server = serve_files(onnx_models.scale(tmp_path / "scale.onnx", 3.0))
    before = resident_bytes(server)
    piece = b"%x\r\n" % (1 << 20) + bytes(1 << 20) + b"\r\n"
    refused, socks = 0, []
    try:
        for _ in range(8):
            sock = server.connect()
            socks.append(sock)
            sock.sendall(b"POST /v2/models/scale/infer HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n")
            try:
                for _ in range(60):
                    sock.sendall(piece)
            except OSError:
                pass
            sock.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                refused += read_answer(sock)[0] == 503
        assert refused >= 3, "four bodies of max_body_bytes may be under way"
        assert resident_bytes(server) - before < 330_000_000
    finally:
        for sock in socks:
            sock.close()
    with server.client() as client:
        assert client.infer("scale", ONES)["y"][0, 0] == 3


@pytest.mark.parametrize("shape", [[0, 2**62], [0, 2**80], [2**40, 0, 2**40]])
def test_a_shape_beyond_any_memory_is_the_callers_mistake(serve_files, tmp_path, shape):
    free = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["a", "b", "c"][: len(shape)]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", free[:1], free[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "free.onnx")
    server = serve_files(tmp_path / "free.onnx")
    given = {"name": "x", "shape": shape, "datatype": "FP32"}
    as_json = json.dumps({"inputs": [{**given, "data": []}]}).encode()
    binary = json.dumps({"inputs": [{**given, "parameters": {"binary_data_size": 0}}]}).encode()

    assert server.raw(request("POST", "/v2/models/free/infer", as_json))[0] == 400
    length = str(len(binary))
    assert server.raw(request("POST", "/v2/models/free/infer", binary, Inference_Header_Content_Length=length))[0] == 400
    with server.client() as client:
        stats = client.status()["models"]["free"]["versions"]["1"]["stats"]
    assert stats["failed"] == {"invalid": 2, "run": 0, "unavailable": 0}


def script(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


@pytest.fixture
def plugin():
    """The runtime `script` of the trial tests, whose models behave as their text says."""
    return {"PYTHONPATH": str(Path(__file__).parents[1] / "sync" / "plugin")}


def test_a_runtime_that_breaks_its_contract_takes_nothing_else_down(device, plugin, tmp_path):
    device.release("odd", 1, script(tmp_path, "odd.script", "load surprise"), runtime="script")
    device.select("odd", 1)
    device.release("scale", 4, script(tmp_path, "four.script", "load surprise"), runtime="script")
    server = device.server(environment=plugin).start()
    with server.client() as client:
        assert client.infer("scale", ONES)["y"][0, 0] == 1
        odd = client.status()["models"]["odd"]["versions"]["1"]
        assert odd["state"] == "UNAVAILABLE"
        assert "KeyError" in odd["reason"]
        status, _, body = client.request("POST", "/control/v1/models/scale/load", {"version": 4, "variant": "cpu"})
        assert (status, json.loads(body)["code"]) == (500, "load_failed")
        assert client.status()["models"]["scale"]["versions"]["4"]["state"] == "UNAVAILABLE"
        assert client.infer("scale", ONES)["y"][0, 0] == 1


def test_a_record_that_cannot_be_read_hides_no_other_model(device):
    (device.store.root / "models" / "broken.json").mkdir()
    server = device.server().start()
    with server.client() as client:
        assert client.infer("scale", ONES)["y"][0, 0] == 1
        assert client.status()["models"]["broken"]["active"] is None


def test_a_manifest_that_cannot_be_read_is_not_an_internal_error(device):
    (device.store.root / "releases" / "scale" / "7.json").mkdir()
    server = device.server().start()
    with server.client() as client:
        status, _, body = client.request("POST", "/control/v1/models/scale/load", {"version": 7, "variant": "cpu"})
    assert (status, json.loads(body)["code"]) == (409, "not_in_store")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/control/v1/models/scale/activate", '{"version": 1, "version": 2}'),
        ("/v2/repository/index", '{"ready": false, "ready": true}'),
        ("/v2/logging", '{"log_verbose_level": 0, "log_verbose_level": 1}'),
        ("/v2/edge/memory/frames/register", '{"byte_size": 8, "byte_size": 4096}'),
        ("/v2/models/scale/infer", '{"inputs": [], "inputs": []}'),
        ("/v1/models/scale:predict", '{"instances": [[1, 1, 1, 1]], "instances": [[2, 2, 2, 2]]}'),
        (
            "/v1/models/scale:predict",
            '{"signature_name": "", "instances": [[1, 1, 1, 1]], "signature_name": "serving_default"}',
        ),
    ],
)
def test_a_key_that_stands_twice_is_refused_everywhere(scale_server, path, body):
    with scale_server.connect() as sock:
        sock.sendall(request("POST", path, body.encode()))
        status, _, answer = read_answer(sock)
    assert status == 400
    assert "stands twice" in json.loads(answer)["error"]
