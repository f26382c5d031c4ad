"""What is left behind is removed in time, is bounded, and nothing goes that somebody needs."""

import contextlib
import fcntl
import http.client
import os
import ssl
import time

from agent.contract.reports import Event
from fleet_server import housekeeping
from fleet_server.access import SERVER
from fleet_server.journal import Happening, Journal
from fleet_server.releases.online_roles import KEPT_VERSIONS, OLD_AFTER_S
from tests.fleet.stand import API, Server, sha256, simple_manifest, wait_until

DAY = 86400.0
LARGE = os.urandom(3_000_000)


def cut_upload(server, data, part):
    """An upload that breaks off."""
    context = ssl.create_default_context(cafile=str(server.ca))
    partial = server.data / "uploads" / sha256(data)
    with contextlib.closing(
        http.client.HTTPSConnection("127.0.0.1", server.operator, context=context, timeout=20)
    ) as connection:
        connection.putrequest("PUT", f"{API}/blobs/{sha256(data)}")
        connection.putheader("Authorization", f"Bearer {server.token}")
        connection.putheader("Content-Length", str(len(data)))
        connection.endheaders()
        connection.send(data[:part])
        wait_until(lambda: partial.exists() and partial.stat().st_size > part - 100_000, "most of it arrived")
    wait_until(lambda: partial.stat().st_size == part, "all that arrived is kept")


def age(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def test_an_abandoned_upload_is_removed_at_the_start_and_a_young_one_goes_on(own_server):
    server = own_server.start()
    other = LARGE[::-1]
    cut_upload(server, LARGE, 2_000_000)
    cut_upload(server, other, 1_000_000)
    server.upload(b"whole, and never published")
    server.publish_simple("m", 1, b"published")
    text = server.request("GET", "/metrics").text
    assert "\nedge_fleet_pending_uploads 3\n" in text
    server.stop()
    for path in [*(server.data / "uploads").iterdir(), *(server.data / "blobs").iterdir()]:
        if not path.name.startswith(sha256(other)):
            age(path, DAY + 60)

    server.start()

    wait_until(lambda: "\nedge_fleet_pending_uploads 1\n" in server.request("GET", "/metrics").text, "the old ones are gone")
    assert {path.name for path in (server.data / "uploads").iterdir()} == {sha256(other), sha256(other) + ".by"}
    assert [path.name for path in (server.data / "blobs").iterdir()] == [sha256(b"published")]
    assert 'edge_fleet_removed_total{what="uploads"} 2' in server.request("GET", "/metrics").text
    path, headers = f"/blobs/{sha256(other)}", {"Upload-Offset": "1000000"}
    assert server.request("PUT", path, data=other[1_000_000:], headers=headers).status_code == 200


def test_what_an_account_leaves_behind_is_bounded_and_others_upload(tmp_path):
    server = Server(tmp_path)
    server.set(keep={"upload_bytes": 4_000_000})
    server.start()
    try:
        hoarder, publisher = server.make_token("publisher"), server.make_token("publisher")
        first, second = LARGE, LARGE[::-1]
        assert server.request("PUT", f"/blobs/{sha256(first)}", data=first, token=hoarder).status_code == 200
        refused = server.request("PUT", f"/blobs/{sha256(second)}", data=second, token=hoarder)
        assert (refused.status_code, refused.json()["code"]) == (413, "too_many_uploads")
        third = LARGE[1:]
        refused = server.request("PUT", f"/blobs/{sha256(third)}", data=third, token=hoarder)
        assert (refused.status_code, refused.json()["code"]) == (413, "too_many_uploads")
        together = sum(path.stat().st_size for name in ("uploads", "blobs") for path in (server.data / name).iterdir())
        assert together < 5_000_000
        fourth = LARGE[2:]
        assert server.request("PUT", f"/blobs/{sha256(fourth)}", data=fourth, token=publisher).status_code == 200
        body = server.signed(simple_manifest("m", 1, first))
        assert server.request("POST", "/releases", json=body, token=hoarder).status_code == 200
        fifth = LARGE[3:]
        assert server.request("PUT", f"/blobs/{sha256(fifth)}", data=fifth, token=hoarder).status_code == 200, (
            "published is not pending"
        )
    finally:
        server.stop()


def put(fleet, data, name="blobs", seconds=0.0):
    path = fleet.folder.root / name / sha256(data)
    path.write_bytes(data)
    age(path, seconds)
    return path


def test_an_upload_that_is_under_way_is_left_alone(fleet, clock):
    fleet.database.migrate()
    path = put(fleet, b"slow", "uploads", DAY * 9)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fleet.housekeeping.run()
        assert path.exists()
    fleet.housekeeping.run()
    assert not path.exists()


def test_what_is_no_upload_is_left_alone(fleet):
    fleet.database.migrate()
    foreign = fleet.folder.blobs / "notes.txt"
    foreign.write_text("an operator's")
    age(foreign, DAY * 99)
    fleet.housekeeping.run()
    assert foreign.exists()


def test_the_audit_is_kept_for_as_long_as_it_is_said(fleet, clock):
    fleet.database.migrate()
    now, kept = clock.now, fleet.config.keep.audit_s

    def note(at, action):
        clock.now = at
        with fleet.database.session() as session:
            fleet.journal.audit(session, SERVER, action, "x")

    for number in range(2500):
        if number % 500 == 0:
            note(now - kept - 100, f"old{number}")
    note(now - kept + 100, "kept")
    note(now, "new")
    clock.now = now
    fleet.housekeeping.run()
    assert [row.action for row in fleet.journal.audited(limit=1000)] == ["new", "kept"]
    assert fleet.housekeeping.removed["audit"] == 5


def test_events_are_pruned_in_small_batches_also_the_servers_own(fleet, clock, monkeypatch):
    fleet.database.migrate()
    monkeypatch.setattr(housekeeping, "ROWS", 10)
    journal = Journal(fleet.database, fleet.hub, clock, events_kept=20)
    keeper = housekeeping.Housekeeping(fleet.blobs, fleet.catalogue, fleet.retention, journal, fleet.config.keep, clock)
    with fleet.database.session() as session:
        for number in range(95):
            fleet.journal.record(session, Happening(name="x", message=str(number)))
    assert journal.prune_events(10) == 10
    keeper.run()
    assert [event.message for event in fleet.journal.events(limit=1000)] == [str(number) for number in range(75, 95)]
    assert journal.prune_events(10) == 0


def test_a_setting_that_was_lowered_is_reached_while_events_come(fleet, clock):
    fleet.database.migrate()
    with fleet.database.session() as session:
        for number in range(300):
            fleet.journal.record(session, Happening(name="x", message=str(number)))
        journal = Journal(fleet.database, fleet.hub, clock, events_kept=50, prune_every=10)
        for number in range(300):
            event = Event(device="d", id=str(number), at=0.0, name="x", message="m", model=None, release=None, reason=None)
            journal.record_from_devices(session, [event])
    assert len(fleet.journal.events(limit=1000)) <= 60


def test_old_versions_of_what_publishers_signed_go_and_roots_stay(fleet, clock):
    """A device that was away for all of it follows: it needs the roots, and what is trusted now."""
    repository, folder = fleet.repository, fleet.folder.metadata
    from fleet_server.releases import keys, publisher

    fleet.database.migrate()
    key = keys.load(fleet.releases_key)

    def publish(number):
        manifest = simple_manifest("m", number, b"x")
        data, metadata = publisher.add(repository.releases(), manifest, key, clock.now)
        fleet.catalogue.publish(SERVER, data, metadata)

    put(fleet, b"x")
    for number in range(1, KEPT_VERSIONS + 10):
        publish(number)
    versions = sorted(int(path.name.split(".")[0]) for path in folder.glob("*.releases.json"))
    assert versions[0] == 1, "nothing young goes"
    clock.now += OLD_AFTER_S + 60
    publish(100)
    versions = sorted(int(path.name.split(".")[0]) for path in folder.glob("*.releases.json"))
    newest = repository.metadata.version("releases")
    assert versions == list(range(newest - KEPT_VERSIONS + 1, newest + 1))
    assert (folder / "1.root.json").exists()
    assert (folder / f"{repository.metadata.version('targets')}.targets.json").exists()
    repository.check()
    assert len(list(fleet.folder.targets.glob("releases/m/*"))) == KEPT_VERSIONS + 10, "manifests stay"
