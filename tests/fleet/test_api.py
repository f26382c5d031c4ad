"""The REST API and the page as strangers meet them: roles, hostile requests, the live stream, headers."""

import contextlib
import http.client
import json
import re
import threading

import pytest
import requests

from fleet_server.access import SERVER, Role
from fleet_server.api.operator.app import ROUTES, described_api
from fleet_server.api.operator.routes import API
from fleet_server.errors import Conflict, Denied
from tests.fleet.stand import wait_until

ROLES = ["viewer", "publisher", "operator", "admin"]
GUARDED = [route for route in ROUTES if route.role is not None]


@pytest.fixture(scope="module")
def tokens(server):
    return {role: server.make_token(role) for role in ROLES}


def concrete(path):
    return re.sub(r"\{(\w+)\}", lambda m: {"version": "1", "sha256": "0" * 64}.get(m[1], "nothing"), path)


# -- who may what --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", GUARDED, ids=lambda r: f"{r.method} {r.path}")
def test_every_route_checks_its_role(server, tokens, route):
    """Without a token 401, with less than the role 403, with the role neither. The bodies are empty, so nothing is changed."""
    if route.path == "/events/stream":
        return  # has its own test: it does not end
    ask = {"method": route.method, "path": concrete(route.path)}
    bare = requests.request(route.method, server.url + API + concrete(route.path), verify=str(server.ca), timeout=20)
    assert (bare.status_code, bare.json()["code"]) == (401, "no_token")
    assert server.request(**ask, token="ef_wrong").status_code in {401, 429}  # after some wrong ones in a row: too often
    for role in ROLES:
        answer = server.request(**ask, token=tokens[role])
        if Role(role).rank < route.role.rank:
            assert (answer.status_code, answer.json()["code"]) == (403, "role_too_low")
        else:
            assert answer.status_code not in {401, 403, 500}


def test_the_table_is_the_whole_api(server):
    listed = {(route.method.lower(), API + route.path) for route in ROUTES}
    described = {(m, p) for p, methods in described_api()["paths"].items() for m in methods if m != "head"}
    assert described - listed == {("get", "/enrolment/ca"), ("post", "/enrolment")}
    assert listed <= described


@pytest.mark.parametrize(
    ("least", "method", "path"),
    [
        ("viewer", "GET", "/devices"), ("viewer", "GET", "/rollouts"), ("viewer", "GET", "/assignment"), ("publisher", "POST", "/releases"),
        ("publisher", "PUT", "/blobs/{sha256}"), ("operator", "POST", "/rollouts"), ("operator", "POST", "/devices/{device}/revoke"),
        ("operator", "POST", "/enrolment-tokens"), ("operator", "POST", "/releases/{model}/{version}/withdraw"),
        ("operator", "GET", "/audit"), ("admin", "POST", "/access-tokens"), ("admin", "DELETE", "/access-tokens/{token}"),
    ],
)  # fmt: skip
def test_who_is_meant_to_do_what(least, method, path):
    assert {(r.method, r.path): r.role for r in ROUTES}[method, path] is Role(least)


@pytest.mark.sqlite
def test_tokens_are_kept_as_hashes(server, tokens):
    database = (server.data / "database.sqlite3").read_bytes() + (server.data / "database.sqlite3-wal").read_bytes()
    string = server.enrolment_string()
    for secret in (*tokens.values(), server.token, string.token):
        assert secret.encode() not in database


def test_a_revoked_token_opens_nothing(server):
    made = server.post("/access-tokens", {"name": "gone", "role": "viewer"})
    assert server.request("GET", "/devices", token=made["token"]).status_code == 200
    server.request("DELETE", f"/access-tokens/{made['id']}")
    assert server.request("GET", "/devices", token=made["token"]).status_code in {401, 429}


def test_the_last_admin_stays(fleet):
    only = next(t for t in fleet.access.tokens() if t.role is Role.ADMIN)
    with pytest.raises(Conflict, match="last admin"):
        fleet.access.revoke(only.id)


def test_every_change_is_audited(server, tokens):
    server.post("/enrolment-tokens", {"groups": ["audited"]}, token=tokens["operator"])
    entry = server.get("/audit")[0]
    assert (entry["who"], entry["role"], entry["action"]) == ("a operator", "operator", "token.create")


# -- the browser's session -----------------------------------------------------------------------------------------------------


def test_a_session(server, tokens):
    with requests.Session() as browser:
        browser.trust_env = False
        browser.verify = str(server.ca)
        answer = browser.post(f"{server.url}{API}/session", json={"token": tokens["operator"]}, timeout=20)
        assert answer.status_code == 200
        cookie = answer.headers["Set-Cookie"]
        for word in ("HttpOnly", "SameSite=strict", "Secure", "Path=/"):
            assert word.lower() in cookie.lower()
        assert tokens["operator"] not in cookie
        assert browser.get(f"{server.url}{API}/me", timeout=20).json() == {"name": "a operator", "role": "operator"}
        new_token = f"{server.url}{API}/enrolment-tokens"
        refused = browser.post(new_token, json={}, timeout=20)
        assert (refused.status_code, refused.json()["code"]) == (403, "no_proof")
        assert browser.post(new_token, json={}, headers={"X-Edge-Fleet": "1"}, timeout=20).status_code == 200
        kept = dict(browser.cookies)
        browser.delete(f"{server.url}{API}/session", timeout=20)
    again = requests.get(f"{server.url}{API}/me", cookies=kept, verify=str(server.ca), timeout=20)
    assert again.status_code == 401


def test_a_session_needs_a_real_token(server):
    answer = requests.post(f"{server.url}{API}/session", json={"token": "x"}, verify=str(server.ca), timeout=20)
    assert answer.status_code == 401


def test_a_session_ends(fleet, clock):
    made = fleet.access.create("x", Role.VIEWER)
    cookie = fleet.access.open_session(fleet.access.by_token(made.token))
    assert fleet.access.by_session(cookie).name == "x"
    clock.now += fleet.config.session_s + 1
    with pytest.raises(Denied):
        fleet.access.by_session(cookie)
    cookie = fleet.access.open_session(fleet.access.by_token(made.token))
    fleet.access.revoke(made.id)
    with pytest.raises(Denied):
        fleet.access.by_session(cookie)


# -- hostile requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[" * 100_000, b'{"release":' * 10_000, b"null", b'"x"', b"\xff\xfe", b'{"release":1}', b'{"release":"a:1","groups":"x"}',
     b'{"release":"a:1","percent":1e400}', b'{"release":"a:1","percent":NaN}', b'{"release":"a:1","max_failures":-1}',
     b'{"release":"a:99999999999999999999"}', b'{"release":"../../x:1"}', b'{"release":"a:1","surprise":1}', b'{"release":"\\ud800:1"}'],
)  # fmt: skip
def test_hostile_bodies(server, body):
    answer = server.request("POST", "/rollouts", data=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()) == {"error", "code"}


@pytest.mark.parametrize(
    "path",
    ["/devices/%00", "/devices/..%2f..", "/devices/" + "x" * 5000, "/releases/a/0", "/releases/a/-1", "/releases/a/x", "/releases/a/1e9",
     "/events?limit=0", "/events?limit=99999", "/events?after=-1", "/events?after=99999999999999999999", "/rollouts/%ff", "/nothing"],
)  # fmt: skip
def test_hostile_paths(server, path):
    answer = server.request("GET", path)
    assert answer.status_code in {400, 404}
    assert set(answer.json()) == {"error", "code"}


def test_bodies_are_limited_before_they_are_read(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.loopback, timeout=10)
    with contextlib.closing(connection):
        connection.putrequest("POST", f"{API}/rollouts")
        connection.putheader("Content-Length", str(10**12))
        connection.endheaders(b"x")
        assert connection.getresponse().status == 413
    chunked = server.request("POST", "/rollouts", data=iter([b"{}"]))
    assert chunked.status_code == 411


def test_openapi(server):
    served = server.get("/openapi.json")
    assert served["openapi"].startswith("3.")
    assert served["paths"].keys() == described_api()["paths"].keys()
    ids = [op["operationId"] for methods in served["paths"].values() for op in methods.values()]
    assert len(ids) == len(set(ids))
    known = served["components"]["schemas"]
    for name in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(served)):
        assert name in known
    assert all(op.get("summary") and op.get("responses") for methods in served["paths"].values() for op in methods.values())


# -- live ----------------------------------------------------------------------------------------------------------------------


def stream(server, after=None, **headers):
    response = server.request(
        "GET", "/events/stream" + (f"?after={after}" if after is not None else ""), stream=True, headers=headers
    )
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith("text/event-stream")
    return response


def read(response, wanted):
    kind = ""
    for line in response.iter_lines(chunk_size=1, decode_unicode=True):
        if line.startswith("event: "):
            kind = line[7:]
        if line.startswith("data: ") and kind == "event" and wanted(data := json.loads(line[6:])):
            return data
    raise AssertionError("the stream ended")


def test_the_stream_tells_what_happens(server):
    with stream(server) as response:
        found = []
        reader = threading.Thread(target=lambda: found.append(read(response, lambda e: e["name"] == "device_enrolled")))
        reader.start()
        server.enrol("streamed")
        reader.join(20)
    assert found[0]["device"] == "streamed"


def test_the_stream_goes_on_where_it_broke_off(server):
    server.enrol("missed-1")
    last = server.get("/events")[-1]["seq"]
    server.enrol("missed-2")
    for options in ({"after": last}, {"Last-Event-ID": str(last)}):
        with stream(server, **options) as response:
            assert read(response, lambda e: True)["device"] == "missed-2"


def test_the_stream_needs_a_token(server):
    assert requests.get(f"{server.url}{API}/events/stream", verify=str(server.ca), timeout=20).status_code == 401


def test_a_stop_does_not_wait_for_open_streams(own_server):
    own_server.start()
    with stream(own_server):
        process = own_server.process
        assert own_server.stop() == 0
    assert process.returncode == 0


# -- the page ------------------------------------------------------------------------------------------------------------------


def page_files(server):
    index = requests.get(server.url, verify=str(server.ca), timeout=20)
    names = re.findall(r'(?:src|href)="(/static/[^"]+)"', index.text)
    assert names
    return [index, *(requests.get(server.url + name, verify=str(server.ca), timeout=20) for name in names)]


def test_the_page_needs_nothing_from_elsewhere(server):
    for answer in page_files(server):
        assert answer.status_code == 200
        outside = [u for u in re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]{2,}", answer.text) if "www.w3.org" not in u]
        assert outside == []


def test_the_page_runs_only_its_own_scripts(server):
    for answer in page_files(server):
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    index = page_files(server)[0].text
    assert "<style" not in index
    assert " style=" not in index
    assert not re.search(r"\son\w+=", index)
    assert not re.search(r"<script(?![^>]*\ssrc=)", index)


def test_the_script_never_writes_html(server):
    script = next(a.text for a in page_files(server) if "javascript" in a.headers["Content-Type"])
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert danger not in script


def test_the_loopback_listener(server):
    assert requests.get(f"http://127.0.0.1:{server.loopback}/", timeout=20).status_code == 200
    assert requests.get(f"http://127.0.0.1:{server.loopback}{API}/status", timeout=20).status_code == 401


def test_status(server):
    found = server.get("/status")
    assert found["broker_connected"]
    assert set(found["expires"]) == {"root", "targets", "releases", "assignments", "snapshot", "timestamp"}


def test_journal_keeps_a_bounded_number(fleet):
    from agent.contract.reports import Event
    from fleet_server.journal import Journal

    journal = Journal(fleet.database, fleet.hub, lambda: 0.0, events_kept=10, prune_every=30)
    for n in range(30):
        with fleet.database.session() as session:
            journal.record_from_devices(session, [Event(id=f"e{n}", device="d", at=0.0, name="x", message=str(n))])
    assert [event.message for event in journal.events()] == [str(n) for n in range(20, 30)]
    assert SERVER.role is Role.ADMIN


def test_a_reader_that_does_not_read_is_let_go():
    import asyncio

    from fleet_server.live import MAX_WAITING, Hub

    async def story():
        hub = Hub()
        with hub.reader() as reader:
            for n in range(MAX_WAITING + 5):
                hub.tell(n)
            return [await reader.get() for _ in range(MAX_WAITING + 1)]

    got = asyncio.run(story())
    assert got[-1] is None
    wait_until(lambda: True, "always")
