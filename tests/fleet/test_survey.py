"""Searching, counting and paging: the database answers, and what is answered is bounded."""

import json

import pytest
from sqlalchemy import event

from agent.contract.codec import encode
from agent.contract.reports import Answer, Hardware, ModelState, Outcome, Phase, Presence
from fleet_server.access import SERVER
from fleet_server.devices import survey as surveys
from fleet_server.devices.survey import Filters
from fleet_server.rollouts import views
from fleet_server.rollouts.gates import Standing
from fleet_server.rollouts.tally import NAMED
from fleet_server.storage.models import Device, VerdictRow
from tests.fleet.stand import model_state, wait_until
from tests.fleet.test_rollouts import Story

PI = Hardware(arch="aarch64", machine="Raspberry Pi 5")


@pytest.fixture
def story(fleet, clock):
    made = Story(fleet, clock)
    made.publish(1, 2)
    made.join("warsaw-1", groups=["canary"])
    made.join("warsaw-2", "Oslo_1", "oslo-2")
    made.join("away", online=False)
    made.commits("warsaw-1", version=1)
    made.say("warsaw-2", 1, phase=Phase.FETCHING)
    made.say("Oslo_1", 2, Outcome.COMMITTED)
    device = made.devices["oslo-2"]
    bad = ModelState(
        serving=1, sha256=None, phase=Phase.STEADY, wanted=2, answers=(Answer(release=2, outcome=Outcome.REFUSED, at=1.0),)
    )  # fmt: skip
    device.state(device.report(1, models={"digits": bad}, hardware=PI))
    return made


def found(story, **filters):
    return [one.id for one in story.fleet.survey.find(Filters(**filters)).devices]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, ["Oslo_1", "away", "oslo-2", "warsaw-1", "warsaw-2"]),
        ({"text": "OSLO"}, ["Oslo_1", "oslo-2"]),
        ({"text": "_"}, ["Oslo_1"]),
        ({"text": "%"}, []),
        ({"text": "canar"}, ["warsaw-1"]),
        ({"text": "digits"}, ["Oslo_1", "oslo-2", "warsaw-1", "warsaw-2"]),
        ({"text": "digits:2"}, ["Oslo_1"]),
        ({"prefix": "warsaw-"}, ["warsaw-1", "warsaw-2"]),
        ({"prefix": "oslo"}, ["oslo-2"]),
        ({"group": "canary"}, ["warsaw-1"]),
        ({"group": "canar"}, []),
        ({"model": "digits"}, ["Oslo_1", "oslo-2", "warsaw-1", "warsaw-2"]),
        ({"model": "digits", "release": 1}, ["oslo-2", "warsaw-1", "warsaw-2"]),
        ({"model": "other", "release": 1}, []),
        ({"phase": "fetching"}, ["warsaw-2"]),
        ({"phase": "steady", "release": 1}, ["oslo-2", "warsaw-1"]),
        ({"online": True, "prefix": "warsaw"}, ["warsaw-1", "warsaw-2"]),
        ({"online": False}, ["away"]),
        ({"hardware": "aarch64/Raspberry Pi 5/-"}, ["oslo-2"]),
        ({"trouble": True}, ["oslo-2"]),
        ({"certificate": "ended"}, []),
        ({"certificate": "good", "text": "away"}, ["away"]),
    ],
)
def test_what_is_found(story, filters, expected):
    assert found(story, **filters) == expected


def test_who_was_heard_lately_is_online_in_lists_as_in_rollouts(story, clock):
    clock.now += story.fleet.config.rollouts.silence_s - 5
    story.devices["oslo-2"].say("presence", Presence(device="oslo-2", session=1, online=True))
    clock.now += 5
    assert found(story, online=True) == ["oslo-2"]
    assert (story.fleet.survey.count().online, story.fleet.survey.count().total) == (1, 5)
    assert story.fleet.inventory.get("oslo-2").online
    story.fleet.inventory.heard_since = clock
    assert len(found(story, online=True)) == story.fleet.survey.count().online == 4


def test_groups_are_searched_as_they_are_now(story):
    story.fleet.inventory.set_groups(SERVER, "oslo-2", ["north", "canary"])
    story.fleet.inventory.set_groups(SERVER, "warsaw-1", [])
    assert found(story, group="canary") == found(story, group="north") == ["oslo-2"]
    story.fleet.inventory.delete(SERVER, "oslo-2")
    assert found(story, group="canary") == []


def test_who_is_well_again_is_out_of_trouble(story):
    assert story.fleet.survey.count().trouble == 1
    story.counters["oslo-2"] = 1
    story.commits("oslo-2", version=2)
    assert story.fleet.survey.count().trouble == 0
    device = story.devices["oslo-2"]
    device.state(device.report(9, models={}, problem="metadata_rollback: timestamp 3 after 5"))
    assert (story.fleet.survey.count().trouble, story.fleet.survey.ahead(5).first) == (1, ["oslo-2"])
    story.fleet.inventory.revoke(SERVER, "oslo-2")
    assert (story.fleet.survey.count().trouble, story.fleet.survey.ahead(5).count) == (0, 0)


def test_pages_are_the_list_in_pieces(story, monkeypatch):
    everyone = found(story)

    def pages(limit):
        after, read = "", []
        while after is not None:
            page = story.fleet.survey.find(Filters(), limit=limit, after=after)
            assert page.next is None or page.devices, "an empty page is the last one"
            read.append([one.id for one in page.devices])
            after = page.next
        return read

    assert [len(one) for one in pages(2)] == [2, 2, 1]
    assert [one for page in pages(2) for one in page] == pages(5)[0] == everyone
    assert len(pages(5)) == 1
    monkeypatch.setattr(surveys, "PAGE_BYTES", 1)
    assert pages(5) == [[one] for one in everyone], "a page of long reports ends before its limit"


def test_status_and_counts_read_no_rows_of_devices(story):
    """What is asked every few seconds goes by indexes: no statement fetches a row for each device."""
    fetched = []

    def count(_connection, cursor, statement, *_):
        fetched.append((statement, cursor))

    event.listen(story.fleet.database.engine, "before_cursor_execute", lambda c, cur, s, *_: count(c, cur, s))
    story.fleet.status.view()
    story.fleet.survey.present()
    statements = [statement for statement, _ in fetched if "FROM devices" in statement]
    assert statements
    assert all("count(" in statement or "LIMIT" in statement for statement in statements)
    if story.fleet.database.engine.dialect.name != "sqlite":
        return  # whose plans are read as follows
    with story.fleet.database.engine.connect() as connection:
        for where in (
            "revoked = 0 AND present = 1 AND last_seen > 5",
            "revoked = 0 AND expires <= 5",
            "trouble = 1 AND revoked = 0",
        ):
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN SELECT count(*) FROM devices WHERE {where}").all()
            assert "USING" in str(plan), plan
            assert "INDEX ix_devices_" in str(plan), plan


def test_a_rollouts_view_does_not_grow_with_the_fleet(story, clock):
    rollout = story.start(1, at_once=True)
    small = len(encode(story.fleet.views.rollout(rollout)))
    with story.fleet.database.session() as session:
        session.add_all(
            Device(id=f"more-{n:03}", created=1.0, groups=[], revoked=False, present=True, last_seen=clock())
            for n in range(400)
        )
        session.add_all(
            VerdictRow(rollout=rollout, wave=0, at=1.0, verdict="wait", why="", counts={"pending": n}, evidence=[])
            for n in range(300)
        )  # as they were kept before
    story.fleet.judge.evaluate()
    shown = story.fleet.views.rollout(rollout)
    assert shown.verdict.counts.told >= 400
    assert shown.verdicts[0].counts.to_answer == shown.verdicts[0].counts.pending > 0, "as it was stored"
    assert sum(one.standing is Standing.TOLD for one in shown.verdict.evidence) == NAMED
    assert len(shown.verdicts) == views.VERDICTS_SHOWN
    assert len(encode(shown)) < small + 10_000
    earlier = story.fleet.views.verdicts(rollout, before=shown.verdicts[0].seq, limit=5)
    assert [one.seq for one in earlier] == list(range(shown.verdicts[0].seq - 5, shown.verdicts[0].seq))


def test_long_words_of_a_device_do_not_make_a_view_long(story):
    rollout = story.start(2, max_failures=5, at_once=True)
    device = story.devices["oslo-2"]
    long = Answer(release=2, outcome=Outcome.REFUSED, at=9e9, reason="r" * 50_000, message="m" * 100_000)
    state = ModelState(serving=1, sha256=None, phase=Phase.STEADY, answers=(long,))
    story.fleet.judge.evaluate(device.state(device.report(50, models={"digits": state})).models)
    witness = story.fleet.views.rollout(rollout).verdict.evidence[0]
    assert (witness.device, len(witness.message)) == ("oslo-2", 500)
    assert len(encode(story.fleet.views.rollout(rollout))) < 10_000


def test_the_devices_of_a_rollout_in_pages(story, monkeypatch):
    rollout = story.start(2, max_failures=5, at_once=True)
    everyone = {"Oslo_1": "committed", "away": "offline", "oslo-2": "refused", "warsaw-1": "told", "warsaw-2": "fetching"}

    def read(limit, **options):
        after, read = "", {}
        while after is not None:
            page = story.fleet.views.devices(rollout, limit=limit, after=after, **options)
            read |= {one.device: one.standing.value for one in page.devices}
            after = page.next
        return read

    assert read(100) == read(1) == read(2) == everyone
    assert read(1, standing=Standing.PENDING) == {"warsaw-1": "told", "warsaw-2": "fetching"}, "all that have still to answer"
    assert read(1, standing=Standing.FETCHING) == {"warsaw-2": "fetching"}
    monkeypatch.setattr(views, "ROWS_READ", 2)
    assert read(100) == everyone
    assert read(100, standing=Standing.REFUSED) == {"oslo-2": "refused"}


def test_commands_and_routes_that_search(server, connect):
    manifest = server.publish_simple("digits", 1)
    device = connect(server.enrol("finds-1", ["canary"]))
    server.enrol("finds-2")
    device.report({"digits": model_state(manifest)})
    wait_until(lambda: server.get("/devices?release=1")["devices"], "the report")

    def listed(*words):
        done = server.cli("device", "list", *words, "--json")
        assert done.returncode == 0, done.stderr
        return [one["id"] for one in json.loads(done.stdout)]

    assert listed("--release", "digits:1", "--online") == ["finds-1"]
    assert listed("--prefix", "finds-", "--offline") == ["finds-2"]
    assert listed("--text", "finds", "--limit", "1") == ["finds-1"]
    rollout = server.post("/rollouts", {"release": "digits:1"})["id"]
    done = server.cli("rollout", "devices", rollout, "--standing", "committed", "--json")
    assert [one["device"] for one in json.loads(done.stdout)] == ["finds-1"], done.stderr
    assert server.get(f"/rollouts/{rollout}/verdicts")[-1]["counts"]["committed"] == 1
    assert server.request("GET", "/devices?phase=nonsense").status_code == 400
    page = server.get("/devices?limit=1")
    assert (page["devices"][0]["id"], page["next"]) == ("finds-1", "finds-1")
