"""The SDK against a server that says exactly what the test wants."""

import json
import socket
import threading

import numpy as np
import pytest

from agent.client import Client, InputRejected, Unavailable


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
