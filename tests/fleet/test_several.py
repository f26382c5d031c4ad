"""The server as several processes on PostgreSQL and an object store, behind a HAProxy: who leads, and what happens when it ends."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid

import msgspec
import pytest
import requests
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from agent.contract.reports import Hardware
from fleet_server.access import SERVER, Role
from fleet_server.config import Folder, load
from fleet_server.processes.common import Common
from fleet_server.processes.decide import Term, term_database
from fleet_server.storage import leadership
from fleet_server.storage.database import Database
from fleet_server.storage.documents import StoredDocuments
from fleet_server.storage.leadership import Fenced, Leadership
from tests.fleet import databases
from tests.fleet.several import Several
from tests.fleet.stand import answer, model_state, wait_until
from tests.fleet.stored import ObjectStore
from tests.fleet.test_device_listener import record_of

pytestmark = [pytest.mark.long, pytest.mark.mosquitto, pytest.mark.alone]

TAKEN_OVER_WITHIN_S = 10.0


@pytest.fixture(scope="module")
def cluster():
    with databases.cluster() as made:
        yield made


@pytest.fixture(scope="module")
def store():
    made = ObjectStore()
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(cluster, store, tmp_path_factory):
    made = Several(tmp_path_factory.mktemp("several"), cluster, store.settings)
    try:
        yield made.start()
    finally:
        made.stop()


@pytest.fixture(autouse=True)
def _whole(request):
    """Every test begins with all processes."""
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        for process in server.processes:
            if process.process is None or process.process.poll() is not None:
                process.start()
        server.leading()


def commits(device, manifest):
    device.report({manifest.model: model_state(manifest, answers=(answer(manifest),))})


def state_of(server, rollout):
    return server.ask(1, "GET", f"/rollouts/{rollout}").json()["state"]


def test_a_rollout_through_all_of_them(server, connect):
    device = connect(server.enrol("d1", groups=["canary"]))
    manifest = server.publish_simple("m", 1)
    seen = []
    stream = server.ask(1, "GET", "/events/stream", stream=True)

    def follow():
        with contextlib.suppress(requests.RequestException, AttributeError, ValueError):  # it is closed in the end
            for line in stream.iter_lines(chunk_size=1):
                if line.startswith(b"data: "):
                    seen.append(json.loads(line[6:]))  # noqa: PERF401 - while others look

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    rollout = server.ask(0, "POST", "/rollouts", json={"release": "m:1"}).json()["id"]
    assert device.wait_for_poke()["news"], "the poke carries what was signed elsewhere"
    assert server.get("/assignment")["models"]["m"]["rollout"]["id"] == rollout
    timestamps = {device.get("/metadata/timestamp.json").content for _ in range(4)}
    assert len(timestamps) == 1
    assert device.get("/metadata/99.root.json").status_code == 404
    assert device.get(f"/blobs/{manifest.files['model.onnx'].sha256}").content == b"m 1"
    assert json.loads(device.get("/record").content)["signatures"]

    commits(device, manifest)

    wait_until(lambda: state_of(server, rollout) == "completed", "the rollout is over")
    wait_until(lambda: {"rollout_started", "rollout_completed"} <= {one.get("name") for one in seen}, "told everywhere")
    numbers = [one["seq"] for one in seen if "seq" in one]
    assert numbers == sorted(set(numbers)), "each event once, in order"

    wait_until(lambda: server.get("/status")["messages"]["accepted"] > 0, "who stores says how much")
    status = server.get("/status")
    kinds = sorted(one["kind"] for one in status["processes"] if not one["missing"])
    assert kinds == ["api", "api", "decide", "decide", "ingest"]
    assert status["leader"]["number"] >= 1
    assert status["broker_connected"]
    assert status["warnings"] == []
    assert f"leads with number {status['leader']['number']}" in server.cli("status").stdout
    found = {one["name"]: one for one in json.loads(server.cli("doctor", server.data, "--json").stdout)}
    assert found["leader"]["level"] == "ok", found
    assert found["processes"]["level"] == "ok"
    aside = requests.get(f"http://127.0.0.1:{server.aside}/health", timeout=5)
    assert (aside.status_code, aside.json()["ready"]) == (200, True)
    assert "edge_fleet_database_ok 1" in requests.get(f"http://127.0.0.1:{server.aside}/metrics", timeout=5).text
    assert 'edge_fleet_forwarded_total{outcome="answered"}' in server.ask(0, "GET", "/metrics").text


def test_a_group_with_a_scope_is_filled_by_the_leader_and_by_the_one_after_it(server, connect):
    """Set by one process, from what another stored, signed by the one that leads, whichever that is."""
    device = connect(server.enrol("jetson-1"))
    jetson, plain = Hardware(arch="aarch64", machine="Orin", accelerator="cuda"), Hardware(arch="aarch64", machine="Orin")
    done = server.ask(0, "PUT", "/groups/jetsons", json={"scope": ["class:aarch64/*/cuda"]})
    assert (done.status_code, done.json()["meeting"]) == (200, 0), done.text
    device.report({}, hardware=jetson)
    wait_until(lambda: record_of(device).groups == ("jetsons",), "what was reported to one is signed by another")
    serial = record_of(device).serial
    server.leading().kill()
    device.report({}, hardware=plain)
    wait_until(lambda: record_of(device).groups == (), "the next leader goes on")
    assert record_of(device).serial > serial
    assert server.ask(1, "GET", "/groups/jetsons").json()["devices"] == 0


def test_one_that_answers_is_killed(server):
    """The balancer sends everybody to the other one; what is on its way when it is killed fails, and nothing after."""
    device = server.enrol()
    server.apis[0].kill()
    wait_until(server.answers, "the balancer noticed", within=5)
    for _ in range(10):
        assert server.get("/me")["role"] == "admin"
        assert device.get("/metadata/timestamp.json").status_code == 200
    server.make_token("viewer")


def test_the_one_that_ingests_is_killed(server, connect):
    """What the broker acknowledged, and nobody stored before, is stored when it is back."""
    device = connect(server.enrol("kept"))
    database = Database(Folder(server.data).database_url(load(Folder(server.data))))
    with database.session() as session:
        session.execute(text("SELECT 1"))  # whoever writes is alone, so nothing is stored now
        device.report({}, problem="said while nobody stored")  # returns when the broker has it
        server.ingest.kill()
    database.close()
    assert server.get("/devices/kept")["state"] is None
    server.ingest.start()
    wait_until(
        lambda: (server.get("/devices/kept")["state"] or {}).get("problem") == "said while nobody stored", "it is stored"
    )


def test_a_device_that_is_shut_out_is_so_everywhere(server, connect):
    device = connect(server.enrol("bad"))
    other = connect(server.enrol("good"))
    gone = threading.Event()
    device.mqtt.on_disconnect = lambda *_: gone.set()
    with requests.Session() as session:  # on one connection, for which it was looked up already
        session.trust_env = False
        session.cert, session.verify = (str(device.certificate), str(device.key_file)), str(server.ca)

        def asked():
            return session.get(f"{server.device_url}/metadata/timestamp.json", timeout=20).status_code

        assert asked() == 200
        assert server.post("/devices/bad/revoke")["revoked"]
        wait_until(lambda: asked() == 403, "refused over HTTPS", within=5)
    assert gone.wait(5), "thrown off the broker"
    assert other.mqtt.is_connected()


def test_a_certificate_is_renewed_over_https(server):
    device = server.enrol("old")
    from tests.fleet.stand import make_csr

    def renew(key):
        cert = (str(device.certificate), str(device.key_file))
        body = {"csr_pem": make_csr(key, "old")}
        return requests.post(f"{server.device_url}/renew", json=body, cert=cert, verify=str(server.ca), timeout=20)

    done = renew(device.key)
    assert done.status_code == 200, done.text
    assert done.json()["device"] == "old"
    from cryptography.hazmat.primitives.asymmetric import ec

    foreign = renew(ec.generate_private_key(ec.SECP256R1()))
    assert (foreign.status_code, foreign.json()["code"]) == (403, "wrong_key"), "who hands on cannot ask for a key of its own"


def test_those_that_answer_and_ingest_have_no_key_that_signs(server):
    allowed = {"pki/server.key", "pki/client.key"}
    for process in (*server.apis, server.ingest):
        found = set()
        for path in process.folder.rglob("*"):
            if path.is_file():
                try:
                    load_pem_private_key(path.read_bytes(), None)
                except ValueError:
                    continue
                found.add(path.relative_to(process.folder).as_posix())
        assert found == allowed, process.folder
    ca = load_pem_private_key((server.data / "pki" / "ca.key").read_bytes(), None).public_key()
    for name in allowed:
        assert load_pem_private_key((server.apis[0].folder / name).read_bytes(), None).public_key() != ca


def test_only_our_own_processes_are_answered_by_the_leader(server):
    device = server.enrol("curious")
    port = load(Folder(server.leading().folder)).decide.port
    url = f"https://127.0.0.1:{port}"
    ours = tuple(str(server.data / "pki" / name) for name in ("client.crt", "client.key"))
    theirs = (str(device.certificate), str(device.key_file))
    assert requests.get(f"{url}/internal/records/curious", cert=ours, verify=str(server.ca), timeout=5).status_code == 200
    assert requests.get(f"{url}/internal/records/curious", cert=theirs, verify=str(server.ca), timeout=5).status_code == 403
    with pytest.raises(requests.exceptions.ConnectionError):
        requests.get(f"{url}/internal/records/curious", verify=str(server.ca), timeout=5)
    plain = requests.post(f"{url}/api/v1/access-tokens", json={}, cert=ours, verify=str(server.ca), timeout=5)
    assert plain.status_code == 401, "their certificate makes nobody an operator"
    wrong = {"Authorization": "Bearer ef_wrong"}
    assert server.ask(0, "POST", "/access-tokens", json={"name": "x", "role": "viewer"}, headers=wrong).status_code == 401
    viewer = server.make_token("viewer")
    headers = {"Authorization": f"Bearer {viewer}"}
    assert server.ask(0, "POST", "/access-tokens", json={"name": "x", "role": "viewer"}, headers=headers).status_code == 403


def test_without_a_leader_changes_wait_and_reading_goes_on(server):
    before = server.leader()
    for process in server.deciders:
        process.stop()
    refused = server.ask(0, "POST", "/access-tokens", json={"name": "x", "role": "viewer"})
    assert (refused.status_code, refused.json()["code"]) == (503, "no_leader")
    assert int(refused.headers["Retry-After"]) > 0
    assert server.ask(1, "GET", "/devices").status_code == 200
    status = server.ask(0, "GET", "/status").json()
    assert status["leader"] is None
    assert any("no `edge-fleet decide` leads" in one for one in status["warnings"])
    server.deciders[1].start()
    assert wait_until(server.leader, "it leads")["number"] > before["number"]
    assert server.ask(0, "POST", "/access-tokens", json={"name": "x", "role": "viewer"}).status_code == 200


def takeover(server, end):
    """Ends the leader; how many seconds until another one makes a change, from the first moment of the end."""
    leading, before = server.leading(), server.leader()
    began = time.monotonic()
    end(leading)

    def changed():
        done = server.ask(0, "POST", "/access-tokens", json={"name": uuid.uuid4().hex, "role": "viewer"})
        assert done.status_code in {200, 503}, done.text
        return done.status_code == 200

    wait_until(changed, "somebody else makes changes")
    took = time.monotonic() - began
    after = server.leader()
    assert after["number"] == before["number"] + 1
    assert after["process"] != before["process"]
    return took


def test_taken_over_after_a_kill_and_at_once_after_a_stop(server):
    killed = takeover(server, lambda process: process.kill())
    for process in server.deciders:
        if process.process is None:
            process.start()
    stopped = takeover(server, lambda process: process.stop())
    print(f"\ntaken over after kill -9: {killed:.1f} s; after a clean stop: {stopped:.1f} s")
    assert killed <= TAKEN_OVER_WITHIN_S
    assert stopped <= 4.0


def test_two_that_decide_at_once(server, connect):
    """The leader stands still past its lease, another one leads; then it goes on and finds out before it signs anything."""
    server.publish_simple("two", 1)
    first, second = server.leading(), server.waiting()
    number = server.leader()["number"]
    first.freeze()
    try:
        wait_until(lambda: (server.leader() or {}).get("number") == number + 1, "another leads", within=20)
        rollout = server.ask(0, "POST", "/rollouts", json={"release": "two:1"}).json()["id"]
        signed = server.ask(1, "GET", "/assignment").json()
    finally:
        first.thaw()

    wait_until(lambda: f"led with number {number} and leads no more" in first.log(), "it steps down")
    wait_until(lambda: server.leading() is second, "the other one leads on")
    # Its tick would have signed by now, had it gone on.
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        assert server.leader()["number"] == number + 1
        assert server.ask(1, "GET", "/assignment").json() == signed
        time.sleep(0.1)
    assert first.process.poll() is None, "it waits to lead again"
    assert server.ask(0, "POST", f"/rollouts/{rollout}/abort").status_code == 200
    second.stop()
    assert wait_until(server.leader, "and does")["number"] == number + 2


def test_a_fenced_one_stores_nothing(cluster):
    """Two in this process, on one database: what the first does after the second took over is undone, whatever it is."""
    url = cluster.new()
    databases_ = [Database(url, name=f"decide-{number}") for number in (1, 2)]
    databases_[0].migrate()
    clock = [0.0]
    first = Leadership(databases_[0], "decide-1", "127.0.0.1:1", lease_s=1.5, clock=lambda: clock[0])
    second = Leadership(databases_[1], "decide-2", "127.0.0.1:2")
    databases_[0].at_beginning.append(first.check)
    databases_[1].at_beginning.append(second.check)
    try:
        databases_[0].at_beginning.clear()
        assert first.take()
        databases_[0].at_beginning.append(first.check)
        with databases_[0].session() as session:
            session.execute(text("INSERT INTO settings VALUES ('a', '1')"))
        databases_[1].at_beginning.clear()
        wait_until(second.take, "the lease ends")
        assert (first.number, second.number) == (1, 2)
        clock[0] = -100.0  # its own clock says that all is well
        with pytest.raises(Fenced, match="decide-2 leads with number 2"), databases_[0].session() as session:
            session.execute(text("INSERT INTO settings VALUES ('b', '1')"))
        clock[0] = 100.0
        with pytest.raises(Fenced, match="lease"), databases_[0].session():
            pytest.fail("nothing may begin")
        with databases_[1].reading() as session:
            assert session.execute(text("SELECT name FROM settings WHERE name IN ('a', 'b')")).all() == [("a",)]
            assert leadership.current(session).holder == "decide-2"
        second.give_back()
        with databases_[1].reading() as session:
            assert leadership.current(session) is None
    finally:
        for one in databases_:
            one.close()


def test_a_term_that_is_over_signs_nothing(cluster, store, tmp_path):
    """A whole leader in this process, after another took over: it can decide, certify and sign nothing."""
    made = Several(tmp_path, cluster, store.settings)
    folder = Folder(made.data)
    common = Common(folder, load(folder), "decide")
    other = Database(folder.database_url(load(folder)), name="decide-other")
    common.database.migrate()
    first, second = Leadership(common.database, common.id, ""), Leadership(other, "decide-other", "")
    assert first.take()
    database = term_database(common, first)
    try:
        term = Term(common, database)
        fleet = term.fleet
        documents = StoredDocuments(other)
        before = {name: documents.read(name) for name in documents.all()}
        assert "metadata/timestamp.json" in before
        with other.session() as session:
            session.execute(text("UPDATE leaders SET until = 1"))
        assert second.take()
        attempts = [
            lambda: fleet.repository.assign(fleet.repository.assignment_bytes() + b" "),
            lambda: fleet.repository.renew_for(1.0),
            lambda: fleet.assignment.tell(msgspec.structs.replace(fleet.addresses(), broker="elsewhere:1")),
            lambda: fleet.access.create("x", Role.ADMIN),
            lambda: fleet.enrolment.create_token(SERVER, device=None, groups=[], uses=1, ttl_s=60.0),
            fleet.inventory.write_crl,
            fleet.recover,
        ]
        for attempt in attempts:
            with pytest.raises((Fenced, OperationalError)):
                attempt()
        documents.stale()
        assert {name: documents.read(name) for name in documents.all()} == before
        with other.reading() as session:
            assert session.execute(text("SELECT count(*) FROM enrolment_tokens")).scalar() == 0
            assert session.execute(text("SELECT count(*) FROM access_tokens")).scalar() == 1, "the one of init"
    finally:
        for one in (database, other, common.database):
            one.close()


def test_one_that_stands_still_in_a_transaction_keeps_nobody_out(cluster):
    url = cluster.new()
    stuck, other = Database(url, name="decide-stuck"), Database(url, name="decide-other")
    stuck.migrate()
    try:
        first = Leadership(stuck, "decide-stuck", "", lease_s=1.3)
        assert first.take()
        with pytest.raises(Exception, match=r"terminat|closed"), stuck.session() as session:  # noqa: PT012 - the end of it fails
            session.execute(text("INSERT INTO settings VALUES ('a', '1')"))
            second = Leadership(other, "decide-other", "")
            wait_until(second.take, "taken over in spite of it", within=5)
        with other.reading() as session:
            assert session.execute(text("SELECT count(*) FROM settings WHERE name = 'a'")).scalar() == 0
    finally:
        stuck.close()
        other.close()


def test_changes_during_takeovers_are_made_once_or_not_at_all(server):
    """Each request is answered 200, or 503 with Retry-After, or 409 when it was made and its answer was lost; none is made twice."""
    made: dict[str, list[int]] = {}
    stopping = threading.Event()

    def ask():
        while not stopping.is_set():
            name = f"once-{uuid.uuid4().hex}"
            done = server.ask(len(made) % 2, "POST", "/access-tokens", json={"name": name, "role": "viewer"})
            made.setdefault(name, []).append(done.status_code)
            assert done.status_code in {200, 409, 503}, done.text
            assert done.status_code != 503 or int(done.headers["Retry-After"]) > 0
            if done.status_code == 409:
                assert done.json()["code"] == "already_done"
            if done.status_code == 503:
                time.sleep(0.2)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for end in ("kill", "stop", "kill"):
        time.sleep(1.0)
        leading = server.leading()
        getattr(leading, end)()
        leading.start()
        number = wait_until(server.leader, "somebody leads")["number"]
        assert number
    time.sleep(0.5)
    stopping.set()
    for thread in threads:
        thread.join()
    stored = [one["name"] for one in server.get("/access-tokens") if one["name"].startswith("once-")]
    assert len(stored) == len(set(stored)), "none twice"
    answered = {name for name, codes in made.items() if codes[-1] in {200, 409}}
    assert answered <= set(stored), "what was answered is stored"
    lost = set(stored) - answered
    assert not lost, f"made, and answered 503: {lost}"
    assert len(answered) > 5


def test_the_database_goes_away_in_the_middle_of_a_rollout(server, cluster, connect):
    device = connect(server.enrol("during", groups=["during"]))
    manifest = server.publish_simple("during", 1)
    rollout = server.ask(0, "POST", "/rollouts", json={"release": "during:1", "groups": ["during"]}).json()["id"]
    device.wait_for_poke()
    number = server.leader()["number"]
    cluster.stop()
    refused = server.ask(0, "POST", "/access-tokens", json={"name": "x", "role": "viewer"})
    assert refused.status_code == 503
    assert int(refused.headers["Retry-After"]) > 0
    commits(device, manifest)  # the broker has it
    wait_until(lambda: f"led with number {number} and leads no more" in server_log(server), "the leader steps down", within=20)
    cluster.start()
    wait_until(lambda: (server.leader() or {}).get("number") == number + 1, "somebody leads again")
    shown = f"/rollouts/{rollout}"
    wait_until(lambda: server.ask(1, "GET", shown).json()["wave"] == 1, "what the device said meanwhile counts")
    warnings = []

    def is_well():
        warnings[:] = server.get("/status")["warnings"]
        return not warnings

    wait_until(is_well, warnings)


def server_log(server):
    return "".join(process.log() for process in server.deciders)


def test_one_process_refuses_the_fleet_until_it_is_gathered(cluster, store, tmp_path):
    server = Several(tmp_path, cluster, store.settings)
    try:
        server.start()
        server.publish_simple("m", 1)
        version = server.get("/assignment")["version"]
        for process in (server.ingest, *server.apis, server.deciders[1]):
            process.stop()
        busy = server.cli("gather", server.data)
        assert busy.returncode == 1
        assert "stop" in busy.stderr
        server.deciders[0].stop()
        refused = server.cli("serve", server.data)
        assert refused.returncode == 1
        assert "several processes" in refused.stderr
        done = server.cli("gather", server.data)
        assert done.returncode == 0, done.stderr
    finally:
        server.stop()
    from tests.fleet.stand import Server

    Server.start(server)
    server.url = f"https://127.0.0.1:{server.operator}"
    try:
        assert server.get("/assignment")["version"] >= version
        assert [one["release"] for one in server.get("/releases")] == ["m:1"]
        assert server.get("/status")["processes"] == []
    finally:
        Server.stop(server)


def test_what_several_processes_need_is_said(own_server):
    if databases.ON_POSTGRESQL:
        told = own_server.cli("decide", own_server.data)
        assert "object store" in told.stderr
    else:
        told = own_server.cli("api", own_server.data)
        assert "needs PostgreSQL" in told.stderr
    assert told.returncode == 1


def test_a_rollout_to_many_while_the_leader_is_killed(server):
    """Simulated devices that enrol, hear, fetch and report through all of it; the leader is killed in the middle of the rollout."""
    server.publish_simple("sim", 1)
    report = server.base / "report.json"
    ended = []

    def simulate():
        words = "--devices 30 --on-server --yes --release sim:1 --fetch 20% --timeout 90s --json"
        ended.append(server.cli("simulate", *words.split(), report))

    before = {one["id"] for one in server.get("/rollouts")}
    running = threading.Thread(target=simulate)
    running.start()
    started = wait_until(lambda: {one["id"] for one in server.get("/rollouts")} - before, "the rollout began", within=60).pop()
    done = f"/rollouts/{started}/devices?standing=committed"
    wait_until(lambda: server.ask(1, "GET", done).json()["devices"], "the first has committed")
    server.leading().kill()
    running.join()
    assert ended[0].returncode == 0, ended[0].stdout + ended[0].stderr + server_log(server)[-3000:]
    assert server.get(f"/rollouts/{started}")["state"] in {"completed", "aborted"}
