"""Signing in: guesses are slowed and noted, nobody else is kept out, and a cookie is `Secure` behind a proxy that is trusted."""

import pytest
import requests

from fleet_server import sign_in
from fleet_server.access import Role
from fleet_server.errors import Denied, TooOften
from fleet_server.sign_in import Allowance
from tests.fleet.conftest import Clock
from tests.fleet.stand import API, Server

FAR = "203.0.113.7"


def attempt(server, token, *, address=FAR, proto="https", base=None):
    """Through the reverse proxy on this machine."""
    headers = {"X-Forwarded-For": address, "X-Forwarded-Proto": proto}
    base = base or f"http://127.0.0.1:{server.loopback}"
    return requests.post(f"{base}{API}/session", json={"token": token}, headers=headers, verify=str(server.ca), timeout=20)


def audited(server, *actions):
    return [row for row in server.get("/audit?limit=1000") if row["action"] in actions]


def test_guesses_are_slowed_and_noted_and_keep_nobody_else_out(server):
    guesses = [attempt(server, f"ef_guess{number}") for number in range(sign_in.FAILURES + 5)]

    assert [guess.status_code for guess in guesses] == [401] * sign_in.FAILURES + [429] * 5
    assert 0 < int(guesses[-1].headers["Retry-After"]) <= sign_in.FAILURE_EVERY_S
    assert attempt(server, server.token).status_code == 429, "nor is a right one looked at"
    assert attempt(server, server.token, address="203.0.113.8").status_code == 200
    assert (
        requests.get(
            f"{server.url}{API}/me", headers={"Authorization": f"Bearer {server.token}"}, verify=str(server.ca), timeout=20
        ).status_code
        == 200
    )
    denied, throttled = audited(server, "session.denied"), audited(server, "session.throttled")
    assert (len(denied), len(throttled)) == (sign_in.FAILURES, 6)
    assert {(row["who"], row["subject"]) for row in denied + throttled} == {("", f"@{FAR}")}
    (opened,) = [row for row in audited(server, "session.open") if row["detail"]["address"] == "@203.0.113.8"]
    assert (opened["who"], opened["role"]) == ("init", "admin")
    assert "guess" not in str(server.get("/audit?limit=1000"))
    assert server.token not in str(server.get("/audit?limit=1000"))
    text = server.request("GET", "/metrics").text
    assert f'edge_fleet_sign_ins_total{{outcome="denied"}} {sign_in.FAILURES}' in text


def shown(server, token, *, address, route="/me"):
    headers = {"X-Forwarded-For": address, "X-Forwarded-Proto": "https", "Authorization": f"Bearer {token}"}
    return requests.get(f"http://127.0.0.1:{server.loopback}{API}{route}", headers=headers, timeout=20)


def test_wrong_tokens_are_slowed_and_noted_and_a_right_one_from_there_passes(server):
    address = "203.0.113.40"
    before = len(audited(server, "token.denied")), len(audited(server, "token.throttled"))
    wrong = [shown(server, f"ef_old{number}", address=address) for number in range(sign_in.FAILURES + 5)]

    assert [answer.status_code for answer in wrong] == [401] * sign_in.FAILURES + [429] * 5
    assert 0 < int(wrong[-1].headers["Retry-After"]) <= sign_in.FAILURE_EVERY_S
    assert shown(server, server.token, address=address).status_code == 200, "others stand behind that address, too"
    assert attempt(server, server.token, address=address).status_code == 200
    assert shown(server, "ef_old", address="203.0.113.41").status_code == 401
    denied, throttled = audited(server, "token.denied"), audited(server, "token.throttled")
    assert (len(denied) - before[0], len(throttled) - before[1]) == (sign_in.FAILURES + 1, 5)
    assert {row["subject"] for row in throttled} == {f"@{address}"}
    assert "ef_old" not in str(server.get("/audit?limit=1000"))
    text = server.request("GET", "/metrics").text
    assert 'edge_fleet_wrong_tokens_total{outcome="throttled"} 5' in text


def test_whoever_shows_no_token_or_an_ended_session_is_not_a_guesser(server):
    address = "203.0.113.50"
    headers = {"X-Forwarded-For": address, "X-Forwarded-Proto": "https"}
    url = f"http://127.0.0.1:{server.loopback}{API}/me"
    statuses = {requests.get(url, headers=headers, timeout=20).status_code for _ in range(sign_in.FAILURES * 2)}
    cookies = {"edge_fleet_session": "ended"}
    statuses |= {
        requests.get(url, headers=headers, cookies=cookies, timeout=20).status_code for _ in range(sign_in.FAILURES * 2)
    }
    assert statuses == {401}


def test_an_account_that_signs_in_without_end(server):
    token = server.make_token("viewer")
    statuses = [attempt(server, token, address=f"198.51.100.{number}").status_code for number in range(sign_in.SIGN_INS + 2)]
    assert statuses == [200] * sign_in.SIGN_INS + [429] * 2
    assert attempt(server, server.token, address="198.51.100.250").status_code == 200


@pytest.mark.parametrize(
    ("proto", "listener", "secure"), [("https", "loopback", True), ("http", "loopback", False), ("http", "operator", True)]
)
def test_a_cookie_is_secure_when_the_browser_speaks_https(server, proto, listener, secure):
    if listener == "operator":  # who is no proxy says nothing of the way it came
        answer = requests.post(f"{server.url}{API}/session", json={"token": server.token}, verify=str(server.ca), timeout=20)
    else:
        answer = attempt(server, server.token, address="192.0.2.1", proto=proto)
    assert answer.status_code == 200
    assert ("secure" in answer.headers["Set-Cookie"].lower()) is secure


def test_whoever_is_not_a_trusted_proxy_is_not_believed(tmp_path):
    server = Server(tmp_path)
    config = (server.data / "fleet.yaml").read_text()
    head, _, rest = config.partition("trusted_proxies:\n")
    (server.data / "fleet.yaml").write_text(
        head + "trusted_proxies: []\n" + rest.partition("- 127.0.0.1\n")[2].partition("- ::1\n")[2]
    )
    server.start()
    try:
        answer = attempt(server, server.token)
        assert "secure" not in answer.headers["Set-Cookie"].lower()
        for number in range(sign_in.FAILURES):
            attempt(server, "x", address=f"198.51.100.{number}")
        assert attempt(server, "x", address="198.51.100.99").status_code == 429, "all of it came from one address"
    finally:
        server.stop()


def test_what_is_noted_of_strangers_is_bounded(fleet, monkeypatch):
    fleet.database.migrate()
    monkeypatch.setattr(sign_in, "KEPT", 50)
    for number in range(sign_in.NOTES * 2):
        with pytest.raises(Denied):
            fleet.sign_ins.open("x", f"@{number}")
    assert len(fleet.journal.audited(limit=1000)) == sign_in.NOTES
    assert fleet.sign_ins.outcomes["denied"] == sign_in.NOTES * 2


def test_a_revoked_token_is_refused_in_the_words_of_an_unknown_one(fleet):
    fleet.database.migrate()
    made = fleet.access.create("x", Role.VIEWER)
    fleet.access.revoke(made.id)
    said = set()
    for token in (made.token, "ef_never", "", "x" * 1000):
        with pytest.raises(Denied) as denied:
            fleet.sign_ins.open(token, "@a")
        said.add((str(denied.value), denied.value.code))
    assert len(said) == 1


def test_an_allowance_comes_back_with_time():
    clock = Clock(1000.0)
    allowance = Allowance(3, 10.0, clock)
    for _ in range(3):
        assert allowance.wait_s("a") == 0
        allowance.spend("a")
    assert (allowance.wait_s("a"), allowance.wait_s("b")) == (10.0, 0)
    clock.now += 10
    assert allowance.wait_s("a") == 0
    allowance.spend("a")
    assert allowance.wait_s("a") == 10.0
    clock.now += 1000
    for _ in range(3):
        assert allowance.wait_s("a") == 0
        allowance.spend("a")
    assert allowance.wait_s("a") == 10.0


def test_too_often_says_when(fleet):
    fleet.database.migrate()
    for _ in range(sign_in.FAILURES):
        with pytest.raises(Denied):
            fleet.sign_ins.open("x", "@a")
    with pytest.raises(TooOften) as refused:
        fleet.sign_ins.open("x", "@a")
    assert 0 < refused.value.after_s <= sign_in.FAILURE_EVERY_S
