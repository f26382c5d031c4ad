"""sd_notify, the watchdog's interval and socket activation, as systemd documents them."""

import os
import socket

from agent.common import systemd


def test_nobody_listens():
    assert not systemd.notify("READY=1", {})


def test_a_message_arrives(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(5)
        listener.bind(str(tmp_path / "n"))
        assert systemd.notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "n")})
        assert listener.recv(100) == b"READY=1"


def test_an_abstract_socket(tmp_path):
    name = f"edge-agent-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(5)
        listener.bind("\0" + name)
        assert systemd.notify("STOPPING=1", {"NOTIFY_SOCKET": "@" + name})
        assert listener.recv(100) == b"STOPPING=1"


def test_a_listener_that_is_gone_holds_nobody_up(tmp_path):
    assert not systemd.notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "none")})


def test_half_of_what_the_watchdog_allows():
    own = str(os.getpid())
    assert systemd.watchdog_interval_s({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": own}) == 1.5
    assert systemd.watchdog_interval_s({"WATCHDOG_USEC": "3000000"}) == 1.5
    assert systemd.watchdog_interval_s({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}) is None
    assert systemd.watchdog_interval_s({}) is None
    assert systemd.watchdog_interval_s({"WATCHDOG_USEC": "x"}) is None
    assert systemd.watchdog_interval_s({"WATCHDOG_USEC": "0"}) is None


def test_sockets_for_another_process_are_not_taken():
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x"}
    assert systemd.passed_sockets(environ) == []
    assert environ == {}, "children do not see them"
