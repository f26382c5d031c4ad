"""The fleet server's disk runs full, or lets nobody write: what cannot be stored is refused, and it goes on when there is room."""

import contextlib

import pytest

from tests.fleet.stand import Server, answer, model_state, wait_until

pytestmark = pytest.mark.survival


@pytest.fixture
def server(card):
    base = card.path / "server"
    base.mkdir()
    made = Server(base).start()
    yield made
    made.stop()


def write(server):
    return server.request("POST", "/access-tokens", json={"name": "x" * 100, "role": "viewer"})


def fill(card, server):
    """Nothing can be stored; the database's log may have had some room left in it."""
    stack = contextlib.ExitStack()
    stack.enter_context(card.full())
    wait_until(lambda: write(server).status_code != 200, "the last room is used")
    return stack


@pytest.fixture
def started(server):
    """A rollout that waits for its one device."""
    manifest = server.publish_simple("m", 1)
    device = server.enrol("d1")
    device.connect()
    yield manifest, device, server.post("/rollouts", {"release": "m:1"})["id"]
    device.disconnect()


def nothing_is_stored(server, device, rollout):
    refused = write(server)
    assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
    assert any(word in refused.json()["error"] for word in ("full", "readonly", "I/O"))
    assert any("NOTHING IS STORED" in warning for warning in server.get("/status")["warnings"])
    assert device.get("/metadata/timestamp.json").status_code == 200
    assert server.get(f"/rollouts/{rollout}")["state"] == "running", "nothing was decided on what is not stored"


def test_a_full_disk(card, server, started):
    manifest, device, rollout = started
    with fill(card, server):
        device.report({"m": model_state(manifest, answers=(answer(manifest),))})
        nothing_is_stored(server, device, rollout)
    wait_until(lambda: write(server).status_code == 200, "it stores again")
    wait_until(lambda: server.get(f"/rollouts/{rollout}")["state"] == "completed", "what was said meanwhile was kept")
    wait_until(lambda: server.get("/status")["warnings"] == [], "and says that all is well")


def test_a_file_system_that_the_kernel_made_read_only(card, server, started):
    manifest, device, rollout = started
    card.sync()
    card.fail()
    wait_until(lambda: write(server).status_code != 200, "nothing can be written")
    nothing_is_stored(server, device, rollout)
    server.stop()
    card.power_up()
    server.start()
    assert write(server).status_code == 200
    device.connect()
    device.report({"m": model_state(manifest, answers=(answer(manifest),))})
    wait_until(lambda: server.get(f"/rollouts/{rollout}")["state"] == "completed", "the rollout goes on")
