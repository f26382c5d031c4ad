"""kill -9 and orderly restarts of each part in the middle of an update, with the real fleet server, broker, `serve` and `sync`.

After each: nothing wrong serves, no request that reached a `serve` failed, and the update ends as it should.
"""

from __future__ import annotations

import pytest

from tests.e2e.world import GOOD, TREACHEROUS, World

pytestmark = [pytest.mark.long, pytest.mark.mosquitto, pytest.mark.timeout(150)]

COMPLETED = [
    # victim, phase in which it dies
    ("sync", "fetching"),
    ("sync", "trialing"),
    ("sync", "activating"),
    ("sync", "watching"),
    ("serve", "fetching"),
    ("serve", "trialing"),
    ("fleet", "trialing"),
]


@pytest.mark.parametrize(("victim", "phase"), COMPLETED, ids=[f"killed_{v}_in_{p}" for v, p in COMPLETED])
def test_the_update_is_completed_all_the_same(world: World, victim: str, phase: str) -> None:
    failed, answered = len(world.traffic.failed), world.traffic.answered
    release = world.update(ballast=phase == "fetching")
    world.reaches(phase, release)
    world.kill(victim)
    if victim != "serve":
        assert world.serving() in {release - 1, release}
    world.restart(victim)
    world.until(f"release {release} is committed", lambda: world.committed(release))
    assert world.traffic.failed[failed:] == []
    assert world.traffic.answered > answered + 50


def test_killed_trial_refuses_the_release_and_says_so(world: World) -> None:
    """A trial that dies is what a trial is for: the release is not trusted, the one before serves on.

    Who sends SIGKILL to a trial is the kernel, when memory runs out; so that is what it says.
    """
    before = world.serving()
    failed = len(world.traffic.failed)
    release = world.update()
    world.reaches("trialing", release)
    world.until("the trial's process", world.trial_processes, every_s=0.001)
    world.kill("trial")
    world.until("an answer", lambda: world.answer(release))
    assert (world.answer(release)["outcome"], world.answer(release)["reason"]) == ("refused", "too_much_memory")
    assert "SIGKILL" in world.answer(release)["message"]
    assert world.serving() == before
    assert world.traffic.failed[failed:] == []


def test_killed_serve_in_watching_rolls_back(world: World) -> None:
    """A `serve` that dies while a new release is watched counts against the release."""
    before = world.serving()
    release = world.update()
    world.reaches("watching", release)
    world.kill("serve")
    world.restart("serve")
    world.until("a rollback", lambda: world.answer(release) and world.serving() == before)
    assert (world.answer(release)["outcome"], world.answer(release)["reason"]) == ("rolled_back", "serve_crashed")


RESTARTED = [
    (("serve",), "fetching"),
    (("serve",), "trialing"),
    (("sync",), "trialing"),
    (("serve", "sync"), "trialing"),
    (("serve",), "watching"),
    (("sync",), "watching"),
    (("serve", "sync"), "watching"),
]


@pytest.mark.parametrize(("parts", "phase"), RESTARTED, ids=[f"{'_and_'.join(p)}_in_{w}" for p, w in RESTARTED])
def test_an_orderly_restart_is_no_crash(world: World, parts: tuple[str, ...], phase: str) -> None:
    """`systemctl restart` (SIGTERM, exit 0) in the middle of an update: the release stays, and so does the rollout."""
    failed = len(world.traffic.failed)
    release = world.update(ballast=phase == "fetching", duration_s=4)
    world.reaches(phase, release)
    world.end(*parts)
    for part in parts:
        world.restart(part)
    world.until(f"release {release} is committed", lambda: world.committed(release))
    assert world.answer(release)["evidence"]["crashes"] == 0
    world.until("the rollout is complete", lambda: world.fleet.get("rollouts")[0]["state"] == "completed")
    assert world.traffic.failed[failed:] == []


def test_a_crash_after_an_orderly_restart_is_one(world: World) -> None:
    """Whatever ends without saying so counts, however orderly the end before it was: here both lie between two looks of `sync`."""
    before = world.serving()
    release = world.update(duration_s=10)
    world.reaches("watching", release)
    world.kill("sync")
    world.end("serve")
    world.restart("serve")
    world.until("serve answers", lambda: world.serving() == release)
    world.kill("serve")
    world.restart("serve")
    world.until("serve answers", lambda: world.serving() == release)
    world.restart("sync")
    world.until("a rollback", lambda: world.answer(release) and world.serving() == before)
    assert (world.answer(release)["outcome"], world.answer(release)["reason"]) == ("rolled_back", "serve_crashed")


def test_killed_sync_in_rolling_back(world: World) -> None:
    """The rollback is taken up again: nothing can leave a bad release in place."""
    before = world.serving()
    release = world.update(TREACHEROUS)
    world.reaches("rolling_back", release)
    world.kill("sync")
    world.restart("sync")
    world.until("a rollback", lambda: world.answer(release) and world.serving() == before)
    assert (world.answer(release)["outcome"], world.answer(release)["reason"]) == ("rolled_back", "error_ratio")


def test_the_fleet_still_works_after_all_this(world: World) -> None:
    release = world.update(GOOD)
    world.until(f"release {release} is committed", lambda: world.committed(release))
