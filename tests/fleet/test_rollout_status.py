"""`edge-fleet rollout status`: what it shows, and how it ends."""

import pytest

from fleet_server.cli import rollout_status, rollout_tables
from fleet_server.rollouts import gates
from fleet_server.rollouts.gates import Standing

COUNTS = {"committed": 4, "fetching": 1, "watching": 1, "offline": 1, "not_reached": 23, "left": 1}
SHOWN = {
    "id": "r1-0000", "model": "digits", "release": 4, "previous": 3, "state": "running", "reason": "", "wave": 1, "reach": 300,
    "waves": [
        {"groups": [], "permille": 2, "count": 1, "devices": 1}, {"groups": ["shop"], "permille": 0, "count": 0, "devices": 9},
        {"groups": [], "permille": 1000, "count": 0, "devices": 30},
    ],
    "verdict": {
        "verdict": "wait", "why": "2 still to answer", "counts": COUNTS,
        "evidence": [{"device": "shop-0", "standing": "fetching"}, {"device": "shop-1", "standing": "watching"}, {"device": "shop-9", "standing": "committed"}],
    },
    "waits_for": None,
}  # fmt: skip


def test_a_bar_for_each_wave_and_who_is_waited_for():
    assert rollout_status.lines(SHOWN) == [
        "r1-0000  digits:4 after digits:3  running",
        "  wave 1  [########################]  1 of 1  one device",
        "  wave 2  [#########...............]  3 of 8  shop",
        "  wave 3  [........................]  0 of 21  everyone",
        "  4 committed, 1 fetching, 1 watching, 1 offline, 23 not reached, 1 left; more are told as these answer",
        "  waits for shop-0, shop-1",
    ]


def test_a_server_from_before_counts_who_is_waited_for_together():
    counts, evidence = {"committed": 4, "pending": 7, "offline": 1}, [{"device": "shop-0", "standing": "pending"}]
    shown = rollout_status.lines(SHOWN | {"verdict": SHOWN["verdict"] | {"counts": counts, "evidence": evidence}})
    assert shown[-1] == "  waits for shop-0 and 6 more"
    assert "3 of 8" in shown[2]


def test_the_commands_know_every_standing():
    assert set(rollout_tables.STANDINGS) == {one.value for one in Standing}
    assert tuple(one.value for one in gates.TO_ANSWER) == rollout_tables.TO_ANSWER
    assert {one.value for one in gates.NOT_COUNTED} < rollout_tables.NOT_ANSWERED


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"state": "waiting"}, "  is waiting: edge-fleet rollout promote r1-0000"),
        (
            {"state": "proposed", "verdict": None, "waits_for": "another person"},
            "  is proposed: edge-fleet rollout approve r1-0000",
        ),
        ({"verdict": {"verdict": "stall", "why": "1 lost", "counts": {}, "evidence": []}}, "  cannot go on by itself: 1 lost"),
        ({"waits_for": "the fleet is frozen"}, "  waits: the fleet is frozen"),
    ],
)
def test_what_keeps_it_from_going_on_is_said(changed, said):
    assert said in rollout_status.lines(SHOWN | changed)


def test_a_rollout_that_is_over_asks_for_nothing():
    shown = rollout_status.lines(SHOWN | {"state": "completed"})
    assert [line.count("#") for line in shown] == [0, 24, 24, 24]
    assert rollout_status.asks(SHOWN | {"state": "aborted"}) is None
    assert rollout_status.bar(0, 0) == rollout_status.bar(5, 5)


def test_how_it_ends(server):
    server.publish_simple("followed", 1)
    server.enrol(groups=["followed"])
    begun = server.post("/rollouts", {"release": "followed:1", "groups": ["followed"]})
    late = server.cli("rollout", "status", "--timeout", "0.1s")
    assert (late.returncode, "is not over after 0.1 s" in late.stderr) == (4, True)
    assert "wave 1" in late.stdout
    server.post(f"/rollouts/{begun['id']}/pause")
    asked = server.cli("rollout", "status", begun["id"], "--unattended", "--timeout", "30s")
    assert (asked.returncode, f"rollout resume {begun['id']}" in asked.stderr) == (5, True)
    server.post(f"/rollouts/{begun['id']}/abort")
    assert server.cli("rollout", "status", begun["id"]).returncode == 1


def test_the_pace_of_a_rollout_is_said_and_begun(server):
    server.publish_simple("paced", 1)
    server.enrol()
    said = server.cli(
        "rollout", "start", "paced:1", "--start-at", "2099-01-01T00:00Z", "--bake", "30m", "--rate", "120/h", "--failure-percent", 5, "--json"
    )  # fmt: skip
    begun = server.get("/rollouts", params={"model": "paced"})[0]
    assert (begun["state"], begun["bake_s"], begun["rate"], begun["failure_share"]) == ("scheduled", 1800.0, 2.0, 0.05), (
        said.stderr
    )
    assert "begins at 2099-01-01 00:00 UTC" in server.cli("rollout", "show", begun["id"]).stdout
    assert server.get("/assignment")["models"].get("paced", {}).get("rollout") is None
    refused = server.cli("rollout", "approve", begun["id"])
    assert (refused.returncode, "cannot be approved" in refused.stderr) == (3, True)
    assert server.cli("rollout", "abort", begun["id"]).returncode == 0


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--start-at", "2099-01-01T00:00"], 3, "does not say its time zone"), (["--start-at", "soon"], 3, "is no moment"),
        (["--rate", "60"], 2, "is not a rate"), (["--rate", "0/min"], 2, "is not a rate"), (["--failure-percent", "50"], 2, "--failure-percent"),
        (["--bake", "soon"], 2, "not a duration"),
    ],
)  # fmt: skip
def test_paces_that_cannot_be(server, words, status, said):
    done = server.cli("rollout", "start", "nothing:1", *words)
    assert (done.returncode, said in done.stderr) == (status, True), done.stderr
