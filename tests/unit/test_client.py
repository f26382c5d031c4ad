"""The SDK against a server that says exactly what the test wants."""

import json
import socket
import threading

import numpy as np
import pytest

from agent.client import Client, InputRejected, ServerFailed, TimedOut, Unavailable


class Scripted:
    """Answers each connection with the next entry: bytes, None to close without a word, or a function of what was asked."""

    def __init__(self, folder, *answers):
        self.path = folder / "s.sock"
        self.asked = []
        self._answers = answers
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen(8)
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _run(self):
        for answer in self._answers:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock:
                self.asked.append(sock.recv(65536))
                if answer is not None:
                    sock.sendall(answer)


def answer(status, value):
    body = json.dumps(value).encode()
    return b"HTTP/1.1 %d X\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body


def inputs(name):
    return answer(200, {"inputs": [{"name": name}]})


OK = answer(200, {"outputs": [{"name": "y", "datatype": "FP32", "shape": [1], "data": [2.0]}]})
NO = answer(400, {"error": "unexpected inference input 'x'"})
X = np.ones(1, np.float32)


def test_a_server_that_ends_before_it_answers_is_asked_once_more(tmp_path):
    """With socket activation the next process takes the connection; nothing is lost by asking again."""
    with Scripted(tmp_path, None, answer(200, {})) as server, Client(server.path, timeout_s=5) as client:
        assert client.request("GET", "/v2")[0] == 200
        assert len(server.asked) == 2


JSON_OUTPUTS = {
    "FP32": ("[NaN, -Infinity, null, 1e21]", [np.nan, -np.inf, np.nan, 1e21]),
    "UINT64": ("[1, 18446744073709551615, 2, 9223372036854775808]", [1, 2**64 - 1, 2, 2**63]),
    "BYTES": ('[["\\u00e9", ""], ["a", "b"]]', ["é".encode(), b"", b"a", b"b"]),
}


@pytest.mark.parametrize("datatype", JSON_OUTPUTS)
def test_outputs_in_json_as_other_servers_write_them(tmp_path, datatype):
    data, expected = JSON_OUTPUTS[datatype]
    body = f'{{"outputs": [{{"name": "y", "datatype": "{datatype}", "shape": [2, 2], "data": {data}}}]}}'.encode()
    said = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    with Scripted(tmp_path, said) as server, Client(server.path, timeout_s=5) as client:
        found = client.infer("m", {"x": X})["y"]
    assert found.shape == (2, 2)
    if datatype == "BYTES":
        assert found.reshape(-1).tolist() == expected
    else:
        assert np.array_equal(found.reshape(-1), np.array(expected, found.dtype), equal_nan=datatype == "FP32")


def test_an_answer_that_is_no_json_is_the_servers_fault(tmp_path):
    said = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello"
    with (
        Scripted(tmp_path, said) as server,
        Client(server.path, timeout_s=5) as client,
        pytest.raises(ServerFailed, match="the answer is not JSON"),
    ):
        client.infer("m", {"x": X})


def test_and_not_for_ever(tmp_path):
    with Scripted(tmp_path, None, None, None) as server, Client(server.path, timeout_s=5) as client:
        with pytest.raises(Unavailable):
            client.request("GET", "/v2")
        assert len(server.asked) == 2


def test_the_only_input_may_have_another_name_in_the_next_release(tmp_path):
    with Scripted(tmp_path, inputs("x"), OK, NO, inputs("z"), OK) as server, Client(server.path, timeout_s=5) as client:
        assert client.infer("m", X)["y"] == 2
        assert client.infer("m", X)["y"] == 2
        assert b'"name":"z"' in server.asked[-1]


def test_a_rejected_input_of_the_same_name_is_not_sent_again(tmp_path):
    with Scripted(tmp_path, inputs("x"), OK, NO, inputs("x")) as server, Client(server.path, timeout_s=5) as client:
        client.infer("m", X)
        with pytest.raises(InputRejected):
            client.infer("m", X)
        assert len(server.asked) == 4


def test_a_full_queue_of_connections_is_waited_for(tmp_path):
    """On a Unix socket a connection that has to wait is refused to whoever does not block."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s.sock"))
        listener.listen(0)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as first:
            first.connect(str(tmp_path / "s.sock"))  # the queue is full now
            with Client(tmp_path / "s.sock", timeout_s=0.1) as client, pytest.raises(TimedOut, match="did not accept"):
                client.request("GET", "/v2")

            def accept():
                for said in (None, answer(200, {})):
                    sock, _ = listener.accept()
                    with sock:
                        if said is not None:
                            sock.recv(65536)
                            sock.sendall(said)

            with Client(tmp_path / "s.sock", timeout_s=10) as client:
                found = []
                thread = threading.Thread(target=lambda: found.append(client.request("GET", "/v2")[0]))
                thread.start()
                accept()
                thread.join(10)
                assert found == [200]
