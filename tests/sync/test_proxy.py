"""The way out through an HTTP proxy: a real one, on this machine, that is asked with CONNECT."""

import socket
import threading

import msgspec
import pytest

from agent.config import AgentConfig, ConfigError, SyncSettings, load
from agent.sync import proxy
from agent.sync.proxy import ProxyFailed, Way
from tests.ways import ConnectProxy

GOAL = "fleet.invalid:443"  # no name server knows it: only the proxy can lead there


@pytest.fixture
def echo():
    """A server that says back what it hears; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            while True:
                try:
                    sock, _ = listening.accept()
                except OSError:
                    return
                with sock:
                    while data := sock.recv(1000):
                        sock.sendall(data)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def test_bytes_pass_both_ways(echo):
    with ConnectProxy({GOAL: echo}) as there, Way(there.url).connect("fleet.invalid", 443) as sock:
        sock.sendall(b"hello")
        assert sock.recv(100) == b"hello"
        assert there.connected == [GOAL]


def test_not_a_byte_of_the_other_side_is_taken_for_the_proxys_answer(echo):
    """The other side may speak first, in the same packet as the end of the proxy's answer."""
    said = b"HTTP/1.0 200 ok\r\nA: b\r\n\r\nfirst words"
    with ConnectProxy({}, answer=said) as there, Way(there.url).connect("fleet.invalid", 443) as sock:
        assert sock.recv(100) == b"first words"


def test_an_ipv6_address_is_asked_for_in_brackets(echo):
    with ConnectProxy({"[2001:db8::7]:8883": echo}) as there, Way(there.url).connect("2001:db8::7", 8883) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"


def test_user_and_password_come_from_a_file(echo, tmp_path):
    secret = tmp_path / "secret"
    with ConnectProxy({GOAL: echo}, secret="me:p:w") as there:
        with pytest.raises(ProxyFailed, match=r"407.*sync.proxy_credentials"):
            Way(there.url).connect("fleet.invalid", 443)
        secret.write_text("me:wrong\n")
        with pytest.raises(ProxyFailed, match=f"does not take the user and password in {secret}"):
            Way(there.url, secret).connect("fleet.invalid", 443)
        secret.write_text("me:p:w\n")
        Way(there.url, secret).connect("fleet.invalid", 443).close()


@pytest.mark.parametrize("content", ["", "nobody", "a:b\nc:d", None])
def test_a_file_that_is_no_user_and_password(content, tmp_path):
    secret = tmp_path / "secret"
    if content is not None:
        secret.write_text(content)
    with ConnectProxy({}) as there, pytest.raises(ProxyFailed, match=r"sync\.proxy_credentials names"):
        Way(there.url, secret).connect("fleet.invalid", 443)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "403 Forbidden; whoever runs the proxy must allow CONNECT"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "502 Bad Gateway; the proxy does not reach it"),
        (b"HTTP/1.1 599\r\n\r\n", "does not connect to fleet.invalid:443: 599"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "does not answer as an HTTP proxy"),
        (b"", "without an answer"),
        (b"HTTP/1.1 200 ok\r\nA:", "breaks off"),
        (b"HTTP/1.1 200 ok\r\nA: " + b"x" * 20_000, "does not end"),
    ],
)
def test_whatever_a_proxy_says_instead_is_told_in_words(answer, said):
    with ConnectProxy({}, answer=answer) as there, pytest.raises(ProxyFailed, match=said):
        Way(there.url).connect("fleet.invalid", 443)


def test_a_proxy_that_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(proxy, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ProxyFailed, match="did not connect to"):
        Way(f"http://127.0.0.1:{silent.getsockname()[1]}").connect("fleet.invalid", 443)


def test_a_proxy_that_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(ProxyFailed, match=f"the proxy 127.0.0.1:{port} cannot be reached"):
        Way(f"http://127.0.0.1:{port}").connect("fleet.invalid", 443)


def test_hosts_that_are_reached_without_it(echo):
    with ConnectProxy({}) as there:
        way = Way(there.url, but=("127.0.0.1", ".lan"))
        way.connect("127.0.0.1", echo).close()
        assert not there.connected
        assert not there.refused
        through = ("LAN", "lan", "x.lan.org", "1127.0.0.1")
        assert [way.proxy_for(host) != "" for host in ("a.lan", "A.LAN.", *through)] == [False, False, True, True, True, True]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"proxy": "proxy:3128"}, "expected http://HOST:PORT"),
        ({"proxy": "https://proxy:3128"}, "expected http://HOST:PORT"),
        ({"proxy": "http://me:secret@proxy:3128"}, "proxy_credentials"),
        ({"proxy_credentials": "/a"}, "of use only with a proxy"),
    ],
)
def test_settings_that_cannot_be_meant(settings, said, tmp_path):
    path = tmp_path / "agent.yaml"
    path.write_bytes(msgspec.yaml.encode({"sync": settings}))
    with pytest.raises(ConfigError, match=said):
        load(path)


def test_the_environment_is_named_and_not_obeyed(monkeypatch):
    for name in proxy.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert proxy.ignored({}) == ""
    assert proxy.ignored({"https_proxy": "http://p:1"}) == "https_proxy"
    monkeypatch.setenv("HTTPS_PROXY", "http://p:1")
    assert Way.configured(AgentConfig(sync=SyncSettings()).sync).proxy == ""
