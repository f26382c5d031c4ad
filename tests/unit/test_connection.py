"""A connection gives the same requests however its bytes are cut, and ends when they are not requests."""

import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.serving.access import Access, Grant
from agent.serving.answers import Answer
from agent.serving.buffers import ALIGNMENT, BufferPool
from agent.serving.routes import Route, Router
from agent.serving.transport.chunked import ChunkedBody
from agent.serving.transport.connection import BUFFER_BYTES, NOTHING, Connection
from agent.serving.transport.http import MAX_HEAD_BYTES, BadRequest

LIMIT = 200_000


def handler(_request):
    return Answer()


ROUTER = Router([Route("POST", "/a/{name}", Access.PREDICT, handler), Route("GET", "/g", Access.PREDICT, handler)])
SMALL = b"POST /a/x%20y HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello"
LARGE_BODY = bytes(range(256)) * 500
LARGE = (
    b"POST /a/l HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\nInference-Header-Content-Length: 33\r\n\r\n" % len(LARGE_BODY)
    + LARGE_BODY
)
CHUNKED = (
    b"POST /a/c HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n6\r\n world\r\n0\r\nT: v\r\n\r\n"
)
GET = b"GET /g?q=1 HTTP/1.1\r\nHost: t\r\n\r\n"
STREAM = b"\r\n" + SMALL + GET + CHUNKED + SMALL + SMALL + LARGE + GET + b"POST /a/z HTTP/1.0\r\nContent-Length: 1\r\n\r\nz"
EXPECTED = [
    ({"name": "x y"}, b"hello"),
    ({}, b""),
    ({"name": "c"}, b"hello world"),
    ({"name": "x y"}, b"hello"),
    ({"name": "x y"}, b"hello"),
    ({"name": "l"}, LARGE_BODY),
    ({}, b""),
    ({"name": "z"}, b"z"),
]


class Pipe:
    """A connection whose peer is this test."""

    def __init__(self):
        self.peer, sock = socket.socketpair()
        self.peer.settimeout(5)
        sock.setblocking(False)
        self.connection = Connection(sock, Grant(Access.CONTROL, "test"), ROUTER, BufferPool(4 * LIMIT), LIMIT)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.connection.close()
        self.peer.close()

    def requests(self):
        while (request := self.connection.next_request()) is not None:
            yield request
            self.connection.finished()

    def feed(self, data, step):
        """Everything that comes out when `data` arrives in pieces of `step` bytes."""
        found = []
        for at in range(0, len(data), step):
            self.peer.sendall(data[at : at + step])
            while self.connection.receive() > 0:
                found += [(dict(r.params), bytes(r.body), r.match.refusal) for r in self.requests()]
        return found


@pytest.mark.parametrize("step", [1, 2, 7, 100, 4096, 65536, len(STREAM)])
def test_requests_do_not_depend_on_how_their_bytes_arrive(step):
    data = STREAM.replace(LARGE_BODY, LARGE_BODY[:9000]).replace(b"128000", b"9000") if step == 1 else STREAM
    with Pipe() as pipe:
        found = pipe.feed(data, step)
        assert [f[0] for f in found] == [e[0] for e in EXPECTED]
        assert all(f[2] is None for f in found)
        if step > 1:
            assert [f[1] for f in found] == [e[1] for e in EXPECTED]
        assert pipe.connection.closing, "HTTP/1.0 without keep-alive is the last request"


@pytest.mark.parametrize("step", [1, 3, 100])
def test_empty_lines_before_a_request_may_be_cut_anywhere(step):
    with Pipe() as pipe:
        assert [(f[0], f[2]) for f in pipe.feed(b"\r\n\r\n\r\n" + SMALL + b"\r\n\r\n" + GET, step)] == [
            ({"name": "x y"}, None),
            ({}, None),
        ]


def test_a_large_body_is_received_where_its_tensors_are_aligned():
    with Pipe() as pipe:
        pipe.peer.sendall(LARGE[:100_000])
        while pipe.connection.receive() > 0:
            assert pipe.connection.next_request() is None
        pipe.peer.sendall(LARGE[100_000:])
        assert pipe.connection.receive() > 0
        request = pipe.connection.next_request()
        import numpy as np

        assert np.ndarray((1,), np.float64, request.body, 33).flags.aligned
        assert bytes(request.body) == LARGE_BODY


def test_a_request_behind_another_one_arrives_when_its_bytes_do(monkeypatch):
    """A client that always has half a request under way must not look slower and slower."""
    now = [100.0]
    monkeypatch.setattr("agent.serving.transport.connection.time.perf_counter", lambda: now[0])
    with Pipe() as pipe:
        pipe.peer.sendall(GET[:5])
        pipe.connection.receive()
        for second in range(1, 20):
            now[0] = 100.0 + second
            pipe.peer.sendall(GET[5:] + GET[:5])
            pipe.connection.receive()
            (arrived,) = [request.arrived_s for request in pipe.requests()]
            assert arrived == now[0] - 1


def test_a_full_buffer_is_not_the_end_of_a_connection():
    with Pipe() as pipe:
        pipe.peer.sendall(GET * (2 * BUFFER_BYTES // len(GET)))
        pipe.connection.receive()
        assert pipe.connection.receive() == NOTHING
        assert len(list(pipe.requests())) == (BUFFER_BYTES + ALIGNMENT) // len(GET)
        assert pipe.connection.receive() > 0


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_tensors_begin_where_vectors_like_it(data):
    """However long the heads and the JSON parts are, and however many requests come in one piece."""
    sizes = st.tuples(st.integers(0, 200), st.integers(1, 300), st.sampled_from([0, 4, 1000, 19_000, 21_000, 100_000]))
    stream, tensors = b"", []
    for padding, json, tensor in data.draw(st.lists(sizes, min_size=1, max_size=5)):
        head = f"POST /a/n HTTP/1.1\r\nHost: t\r\nx: {'y' * padding}\r\ninference-header-content-length: {json}\r\ncontent-length: {json + tensor}"
        stream += head.encode() + b"\r\n\r\n" + b" " * json + bytes(tensor)
        tensors.append(tensor)
    cut = data.draw(st.integers(1, len(stream)))
    with Pipe() as pipe:
        found = 0
        for piece in (stream[:cut], stream[cut:]):
            sender = threading.Thread(target=pipe.peer.sendall, args=(piece,))
            sender.start()
            while sender.is_alive() or pipe.connection.receive() != NOTHING:
                if sender.is_alive():
                    pipe.connection.receive()
                for request in pipe.requests():
                    array = np.frombuffer(request.body, np.uint8, offset=request.header_length)
                    assert len(array) == tensors[found]
                    assert not len(array) or array.ctypes.data % ALIGNMENT == 0
                    found += 1
            sender.join()
        assert found == len(tensors)


PART = st.tuples(
    st.sampled_from([b"/a/x", b"/a/y"]), st.sampled_from([b"{1}", b"{2}", b"{333}"]), st.binary(min_size=16, max_size=16)
)


@given(st.lists(PART, max_size=12), st.sampled_from([1, 50, 97, 150, 4096]))
@settings(max_examples=60, deadline=None)
def test_a_request_that_stands_for_the_next_one_has_its_bytes_and_what_was_known_of_them(parts, step):
    """Whatever comes in turns: `known` is only there when all but the tensors is the same, and arrays made of the body see the new tensors."""
    with Pipe() as pipe:
        seen = []
        for path, json, tensors in parts:
            data = b"POST %s HTTP/1.1\r\nHost: t\r\nInference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n" % (
                path, len(json), len(json) + len(tensors)
            ) + json + tensors  # fmt: skip
            for at in range(0, len(data), step):
                pipe.peer.sendall(data[at : at + step])
                while pipe.connection.receive() > 0:
                    for request in pipe.requests():
                        if request.known is None:
                            request.known = (path, json, np.frombuffer(request.body, np.uint8))
                        assert request.known[:2] == (path, json)
                        assert request.known[2].tobytes() == bytes(request.body)
                        seen.append(bytes(request.body))
        assert seen == [json + tensors for _, json, tensors in parts]


def test_a_client_that_repeats_itself_is_read_once():
    data = b"POST /a/x HTTP/1.1\r\nHost: t\r\nInference-Header-Content-Length: 2\r\nContent-Length: 6\r\n\r\n{}"
    with Pipe() as pipe:
        found = []
        for tensors in (b"AAAA", b"BBBB", b"CCCC", b"DDDD"):
            pipe.peer.sendall(data + tensors)
            pipe.connection.receive()
            (request,) = pipe.requests()
            found.append(request)
            assert bytes(request.body) == b"{}" + tensors
        assert found[1] is found[2] is found[3]


def test_room_for_a_large_body_costs_nothing_before_the_body_comes():
    """The thread that polls makes it: clearing 64 MiB takes tens of milliseconds, and a client may never send them."""
    pool = BufferPool(1 << 28)
    before = resident_bytes()
    buffers = [pool.lend(1 << 26) for _ in range(4)]
    assert resident_bytes() - before < 1 << 24
    for buffer in buffers:
        pool.give_back(buffer)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


BAD = {
    "no request": (b"\x00\x01\x02", 400),
    "text": (b"hello there", 400),
    "two lengths": (b"POST /a/b HTTP/1.1\r\nHost: t\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    "length and chunked": (b"POST /a/b HTTP/1.1\r\nHost: t\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "signed length": (b"POST /a/b HTTP/1.1\r\nHost: t\r\nContent-Length: -1\r\n\r\n", 400),
    "endless length": (b"POST /a/b HTTP/1.1\r\nHost: t\r\nContent-Length: 99999999999999999999999\r\n\r\n", 400),
    "large body": (b"POST /a/b HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % (LIMIT + 1), 413),
    "large chunk": (b"POST /a/b HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % (LIMIT + 1), 413),
    "other coding": (b"POST /a/b HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
    "chunk size": (b"POST /a/b HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
    "chunk end": (b"POST /a/b HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc", 400),
    "long header": (b"GET /g HTTP/1.1\r\nX: " + b"x" * MAX_HEAD_BYTES, 431),
    "many headers": (b"GET /g HTTP/1.1\r\nHost: t\r\n" + b"".join(b"X%d: y\r\n" % n for n in range(101)) + b"\r\n", 431),
    "http/2": (b"PRI * HTTP/2.0\r\n\r\n", 505),
    "folded header": (b"GET /g HTTP/1.1\r\nHost: t\r\nX: a\r\n b\r\n\r\n", 400),
    "space before colon": (b"GET /g HTTP/1.1\r\nHost: t\r\nX : a\r\n\r\n", 400),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("step", [1, 65536])
def test_what_is_no_request_is_refused_and_ends_the_connection(name, step):
    data, status = BAD[name]
    with Pipe() as pipe:
        found = pipe.feed(data + GET, step)
        assert [f[2].status for f in found] == [status]
        assert pipe.connection.closing


def test_requests_that_are_refused_leave_the_connection_open():
    paths = {b"/none": 404, b"/g": 405, b"/a/%ff": 400}
    data = b"".join(b"POST %s HTTP/1.1\r\nHost: t\r\nContent-Length: 2\r\n\r\nok" % path for path in paths)
    with Pipe() as pipe:
        found = pipe.feed(data, 4096)
        assert [f[2].status for f in found] == list(paths.values())
        assert not pipe.connection.closing


def test_a_client_that_waits_is_told_to_send_its_body():
    with Pipe() as pipe:
        pipe.feed(b"POST /a/b HTTP/1.1\r\nHost: t\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n", 4096)
        assert pipe.peer.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert pipe.feed(b"ok", 2)[0][1] == b"ok"


def test_an_answer_that_the_peer_does_not_read_waits():
    with Pipe() as pipe:
        big = bytes(4_000_000)
        assert pipe.connection.send([big], len(big))
        assert pipe.connection.sending
        got = 0
        while got < len(big):
            got += len(pipe.peer.recv(1 << 20))
            assert pipe.connection.flush()
        assert not pipe.connection.sending
        assert got == len(big)


@pytest.mark.alone  # each example has a deadline
@settings(max_examples=200)
@given(st.binary(max_size=300), st.integers(1, 50))
def test_no_bytes_break_the_connection(data, step):
    """Whatever arrives, what comes out are requests and refusals."""
    with Pipe() as pipe:
        pipe.feed(data, step)


@pytest.mark.alone  # each example has a deadline
@given(st.lists(st.binary(min_size=1, max_size=50), max_size=6), st.integers(1, 40), st.binary(max_size=30))
def test_chunks_add_up_and_what_follows_is_left(chunks, step, rest):
    wire = b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n"
    body, buffer = ChunkedBody(LIMIT, BufferPool(LIMIT)), b""
    data = wire + rest
    at = 0
    while not body.done:
        buffer += data[at : at + step]
        at += step
        buffer = buffer[body.feed(buffer) :]
    assert bytes(body.body) == b"".join(chunks)
    assert data.endswith(buffer + data[at:])
    assert len(buffer + data[at:]) == len(rest)


def test_a_chunked_body_is_bounded_by_its_sum():
    body = ChunkedBody(10, BufferPool(LIMIT))
    with pytest.raises(BadRequest, match="larger than the 10 bytes"):
        body.feed(b"6\r\nabcdef\r\n6\r\nabcdef\r\n")


def test_a_buffer_is_larger_than_the_largest_head():
    assert BUFFER_BYTES > MAX_HEAD_BYTES
