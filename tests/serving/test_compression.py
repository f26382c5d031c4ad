"""Compressed bodies, in and out: the same predictions, bounded memory, and nobody else waits."""

import contextlib
import gzip
import json
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.serving import compression
from agent.serving.access import WebRules
from agent.serving.allowance import Allowance
from agent.serving.answers import Refusal
from agent.serving.buffers import BufferPool
from agent.serving.routes import Router
from agent.serving.transport.http import HeadReader, encode
from tests.serving.server import request

INFER = "/v2/models/scale/infer"
JSON = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"data":[1,2,3,4]}]}'
PACK = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress, "GZip": gzip.compress}
LIMIT = 64 << 20


def binary(rows):
    values = np.ones((rows, 4), np.float32)
    head = json.dumps({
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [rows, 4], "parameters": {"binary_data_size": values.nbytes}}],
        "parameters": {"binary_data_output": True},
    }).encode()  # fmt: skip
    return head, values.tobytes()


@pytest.mark.parametrize("coding", PACK)
def test_a_compressed_prediction(scale_server, coding):
    status, _, body = scale_server.raw(request("POST", INFER, PACK[coding](JSON), Content_Encoding=coding))
    assert status == 200, body
    assert json.loads(body)["outputs"][0]["data"] == [3, 6, 9, 12]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_the_header_length_counts_what_was_before(scale_server, coding):
    head, data = binary(1000)
    packed = PACK[coding](head + data)
    asked = request("POST", INFER, packed, Content_Encoding=coding, Inference_Header_Content_Length=str(len(head)))
    status, headers, body = scale_server.raw(asked)
    assert status == 200
    at = int(headers["inference-header-content-length"])
    assert np.frombuffer(body[at:], np.float32).tolist() == [3.0] * 4000


@pytest.mark.parametrize(("accept", "coding"), [("gzip", "gzip"), ("deflate;q=0.5, gzip;q=0.1", "deflate"), ("*", "gzip")])
def test_an_answer_is_compressed_when_that_is_asked_for(scale_server, accept, coding):
    head, data = binary(1000)
    asked = request("POST", INFER, head + data, Accept_Encoding=accept, Inference_Header_Content_Length=str(len(head)))
    _, headers, body = scale_server.raw(asked)
    assert headers["content-encoding"] == coding
    assert len(body) < 4000
    plain = (gzip.decompress if coding == "gzip" else zlib.decompress)(body)
    at = int(headers["inference-header-content-length"])
    assert np.frombuffer(plain[at:], np.float32).tolist() == [3.0] * 4000


@pytest.mark.parametrize(
    "accept", ["", "identity", "br", "gzip;q=0", "gzip;q=0, *;q=0, identity", "gzip;q=x", "identity, gzip;q=0.5"]
)
def test_and_not_otherwise(scale_server, accept):
    head, data = binary(1000)
    asked = request("POST", INFER, head + data, Accept_Encoding=accept, Inference_Header_Content_Length=str(len(head)))
    _, headers, body = scale_server.raw(asked)
    assert "content-encoding" not in headers
    assert len(body) > 16000


@pytest.mark.parametrize("accept", ["gzip, identity;q=0", "x-gzip;q=0.1, *;q=0", "gzip;q=1.0,identity; q=0"])
def test_a_client_that_takes_only_compressed_answers_gets_them(scale_server, accept):
    for asked in (request("POST", INFER, JSON, Accept_Encoding=accept), request("GET", "/v2", Accept_Encoding=accept)):
        status, headers, body = scale_server.raw(asked)
        assert (status, headers["content-encoding"]) == (200, "gzip")
        assert json.loads(gzip.decompress(body))
    status, headers, body = scale_server.raw(request("GET", "/v2/models/none", Accept_Encoding=accept))
    assert (status, "error" in json.loads(gzip.decompress(body))) == (404, True)


def test_members_of_gzip_are_one_behind_another(scale_server):
    for cuts in ([20], [1, 2, 3], list(range(len(JSON)))):
        packed = b"".join(gzip.compress(JSON[a:b]) for a, b in zip([0, *cuts], [*cuts, len(JSON)], strict=True))
        status, _, body = scale_server.raw(request("POST", INFER, packed, Content_Encoding="gzip"))
        assert (status, json.loads(body)["outputs"][0]["data"]) == (200, [3, 6, 9, 12])


def test_what_is_inflated_is_charged(scale_server):
    """To the pool that bodies come from, piece by piece; and is given back."""
    pool = BufferPool(300_000)
    allowance = Allowance(pool)
    assert len(compression.inflate(gzip.compress(bytes(250_000)), b"gzip", LIMIT, allowance)) == 250_000
    with pytest.raises(Refusal, match="too many large requests"):
        compression.inflate(gzip.compress(bytes(250_000)), b"gzip", LIMIT, Allowance(pool))
    allowance.end()


def test_a_small_answer_stays_as_it_is(scale_server):
    _, headers, _ = scale_server.raw(request("POST", INFER, JSON, Accept_Encoding="gzip"))
    assert "content-encoding" not in headers


BAD = {
    "nothing": (b"", 400),
    "text": (b"hello", 400),
    "cut": (gzip.compress(JSON)[:-9], 400),
    "without its checksum": (gzip.compress(JSON)[:-8], 400),
    "a flipped bit": (gzip.compress(JSON)[:20] + bytes([gzip.compress(JSON)[20] ^ 64]) + gzip.compress(JSON)[21:], 400),
    "followed by more": (gzip.compress(JSON) + b"x", 400),
    "followed by zeros": (gzip.compress(JSON) + bytes(8), 400),
    "followed by half a member": (gzip.compress(JSON) + gzip.compress(JSON)[:8], 400),
    "many members": (gzip.compress(b"x") * 1_000_00, 400),
    "a bomb": (gzip.compress(bytes(LIMIT + 1), 9), 413),
}


@pytest.mark.parametrize("name", BAD)
def test_a_body_that_cannot_be_inflated(scale_server, name):
    body, expected = BAD[name]
    status, _, answer = scale_server.raw(request("POST", INFER, body, Content_Encoding="gzip"))
    assert status == expected, answer
    assert json.loads(answer)["error"]


def test_bombs_for_every_thread_do_not_stop_others(scale_server):
    """Also where the body is not wanted: each is inflated by a thread of its own, up to the limit."""
    bomb = gzip.compress(bytes(LIMIT), 9)
    found = []

    def attack():
        found.append(scale_server.raw(request("POST", "/v2/repository/index", bomb, Content_Encoding="gzip"))[0])

    attackers = [threading.Thread(target=attack) for _ in range(4)]
    for attacker in attackers:
        attacker.start()
    assert scale_server.raw(request("POST", INFER, JSON))[0] == 200
    for attacker in attackers:
        attacker.join(30)
    assert found == [413] * 4


@pytest.mark.alone  # each example has a deadline
@given(st.binary(max_size=2000), st.sampled_from([b"gzip", b"deflate"]))
def test_what_is_deflated_inflates_to_itself(data, coding):
    packed = compression.deflate([data[:100], memoryview(data)[100:]], coding)
    assert bytes(compression.inflate(packed, coding, len(data))) == data
    if data:
        with pytest.raises(Refusal, match="larger than"):
            compression.inflate(packed, coding, len(data) - 1)


@pytest.mark.alone  # each example has a deadline
@given(st.binary(max_size=300))
def test_no_bytes_break_the_reader_of_weights(value):
    with contextlib.suppress(Refusal):
        coding, must = compression.answer_coding(value)
        assert coding in {None, b"gzip", b"deflate"}
        assert coding or not must


def head_of(*lines, method="GET"):
    data = "\r\n".join([f"{method} /v2 HTTP/1.1", "Host: localhost", *lines]).encode() + b"\r\n\r\n"
    reader = HeadReader()
    reader.feed(memoryview(data))
    return reader.finish(data, Router([]), WebRules(frozenset({"http://localhost:3000"})))


def sent(head, answer):
    return b"".join(encode(answer, head, keep_alive=True)[0])


def test_a_page_that_may_ask_can_read_the_answer():
    head = head_of("Origin: http://localhost:3000", method="OPTIONS")
    assert head.match.route is not None
    assert b"access-control-allow-origin: http://localhost:3000\r\n" in sent(head, head.match.route.handler(None))


def test_a_page_that_may_not_cannot():
    head = head_of("Origin: http://evil.example", method="OPTIONS")
    assert head.match.refusal.status == 403
    assert not head.origin
