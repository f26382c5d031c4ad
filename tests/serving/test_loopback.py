"""The port on the loopback: for clients that know no Unix sockets, never for other machines, web pages or changes."""

import re
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from agent.config import ServeSettings
from agent.serving.access import WebRules
from agent.serving.transport import sockets
from tests.serving import onnx_models
from tests.serving.server import Server, read_answer, request

INFER = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"data":[1,2,3,4]}]}'


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    onnx_models.scale(folder / "scale.onnx", 3.0)
    made = Server(folder, "run", folder, "--socket", folder / "s.sock", "--http", "127.0.0.1:0").start()
    made.port = int(re.search(r"http://127\.0\.0\.1:(\d+)", made.output())[1])
    yield made
    assert made.stop() == 0


def ask(server, data):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(data)
        return read_answer(sock)


def with_headers(*lines, method="GET", path="/v2", version="1.1", body=b""):
    head = [f"{method} {path} HTTP/{version}", *lines, f"Content-Length: {len(body)}"]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def test_the_same_predictions_at_the_port(server):
    status, _, body = ask(server, with_headers("Host: localhost", method="POST", path="/v2/models/scale/infer", body=INFER))
    assert status == 200
    assert b'"data":[3.0,6.0,9.0,12.0]' in body


def test_whoever_connects_observes_and_changes_nothing(server):
    assert ask(server, with_headers(f"Host: 127.0.0.1:{server.port}", path="/v2/models/stats"))[0] == 200
    status, _, body = ask(
        server, with_headers("Host: localhost", method="POST", path="/control/v1/models/scale/unload", body=b"{}")
    )
    assert status == 403
    assert b"serve.http_access" in body


HOSTS = [
    ("localhost", 200), ("localhost:8000", 200), ("LocalHost", 200), ("127.0.0.1", 200), ("127.9.9.9:1", 200), ("[::1]:80", 200),
    ("::1", 403), ("evil.example", 403), ("evil.example:8000", 403), ("localhost.evil.example", 403), ("127.0.0.1.nip.io", 403),
    ("127.0.0.1@evil.example", 403), ("10.0.0.1", 403), ("localhost:x", 403), ("", 403), ("0.0.0.0", 403),
]  # fmt: skip


@pytest.mark.parametrize(("host", "status"), HOSTS)
def test_a_name_that_was_made_to_point_here_is_refused(server, host, status):
    assert ask(server, with_headers(f"Host: {host}"))[0] == status


def test_two_hosts_or_none_are_refused(server):
    assert ask(server, with_headers("Host: localhost", "Host: evil.example"))[0] == 400
    assert ask(server, with_headers())[0] == 400
    assert ask(server, with_headers(version="1.0"))[0] == 200


def test_a_page_of_elsewhere_cannot_ask(server):
    status, _, body = ask(server, with_headers("Host: localhost", "Origin: https://evil.example"))
    assert status == 403
    assert b"serve.http_origins" in body
    assert ask(server, with_headers("Host: localhost", "Origin: null"))[0] == 403


def test_the_unix_socket_has_no_such_rules(server):
    assert server.raw(request("GET", "/v2", Origin="https://evil.example"))[0] == 200


def test_a_named_origin_may_ask():
    rules = WebRules(frozenset({"http://localhost:3000"}))
    assert rules.check({b"host": b"localhost", b"origin": b"http://localhost:3000"}) is None
    assert rules.check({b"host": b"localhost", b"origin": b"http://localhost:3001"}).status == 403


ADDRESSES = [
    "0.0.0.0:0",
    "192.0.2.1:80",
    "[::]:0",
    ":8000",
    "8000",
    "127.0.0.1",
    "127.0.0.1:x",
    "127.0.0.1:70000",
    "[::ffff:8.8.8.8]:1",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_that_others_reach_is_refused_at_start(tmp_path, address):
    with pytest.raises(sockets.SocketError, match="http_listen is"):
        sockets.open_listeners(tmp_path / "s.sock", 0o600, address)
    assert not (tmp_path / "s.sock").exists()


def test_the_command_says_so_too(tmp_path):
    onnx_models.scale(tmp_path / "scale.onnx", 3.0)
    command = [
        sys.executable,
        "-m",
        "agent.cli",
        "run",
        tmp_path / "scale.onnx",
        "--socket",
        tmp_path / "s",
        "--http",
        "0.0.0.0:1",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1
    assert "which others could reach" in ended.stderr


def test_a_port_in_use_is_named(server, tmp_path):
    with pytest.raises(sockets.SocketError, match="Address already in use"):
        sockets.open_listeners(tmp_path / "s.sock", 0o600, f"127.0.0.1:{server.port}")


def test_the_other_loopback(tmp_path):
    listeners = sockets.open_listeners(tmp_path / "s.sock", 0o600, "[::1]:0")
    try:
        assert re.fullmatch(r"\[::1\]:\d+", listeners.http[0])
        assert listeners.sockets[-1].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert listeners.local == str(tmp_path / "s.sock")
    finally:
        listeners.close()


def test_off_unless_asked_for():
    assert ServeSettings().http_listen == ""
    assert ServeSettings().http_access == "observe"


def test_a_stock_client_works_unchanged(server):
    """Also from several threads: tritonclient's own pool."""
    import tritonclient.http as triton

    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        assert client.is_server_ready()
        value = triton.InferInput("x", [1, 4], "FP32")
        value.set_data_from_numpy(np.ones((1, 4), np.float32))
        assert client.infer("scale", [value]).as_numpy("y")[0, 0] == 3


def test_clients_at_the_port_do_not_wait_for_each_other(server):
    slow = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    slow.sendall(b"POST /v2/models/scale/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf")
    found = []

    def many():
        found.extend(ask(server, with_headers("Host: localhost"))[0] for _ in range(20))

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    slow.close()
    assert found == [200] * 80
