"""A device that was away while three releases came and every key changed, and one that wakes up in 1970: both catch up, alone."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.world import World

pytestmark = [pytest.mark.long, pytest.mark.mosquitto, pytest.mark.timeout(180)]

IN_1970 = "@1970-01-02 03:04:05"


def take_away(world: World) -> None:
    """No network, no power: `sync` is gone, after what was under way is over."""
    world.until("the last rollout ends", lambda: world.fleet.get("rollouts")[0]["state"] in {"completed", "aborted"})
    world.kill("sync")


def ceremony(world: World, name: str, *proposal: object, signers: tuple[Path, ...]) -> None:
    """A change of keys, as people do it."""
    path = world.folder / f"{name}.json"
    world.fleet.run("keys", *proposal, "--out", path)
    for key in signers:
        world.fleet.run("keys", "sign", path, "--key", key, "--yes")
    world.fleet.run("keys", "apply", path)


def release_without_the_device(world: World) -> int:
    """Publishes the next release, starts its rollout, and gives it up for the one that follows."""
    world.version += 1
    world.publish()
    rollout = world.fleet.roll_out(world.version)
    world.fleet.post(f"rollouts/{rollout}/abort", {})
    return world.version


@contextlib.contextmanager
def the_clock_says(world: World, moment: str) -> Iterator[None]:
    """What is started inside has this time, as a board without a clock has it; its monotonic clock is the machine's."""
    (library,) = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
    settings = {
        "LD_PRELOAD": str(library),
        "FAKETIME": moment,
        "DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    world.processes.environment.update(settings)
    try:
        yield
    finally:
        for name in settings:
            del world.processes.environment[name]


def test_away_for_three_releases_and_new_keys(world: World) -> None:
    take_away(world)
    failed = len(world.traffic.failed)
    for _ in range(2):
        release_without_the_device(world)
    first, second = world.fleet.keys / "root.key", world.fleet.keys / "root-2.key"
    world.fleet.run("keys", "make", second)
    ceremony(world, "two-roots", "rotate", "root", "--add", f"{second}.pub", "--threshold", "2", signers=(first, second))
    ceremony(world, "online", "rotate", "online", signers=(first, second))
    old = json.loads(world.fleet.run("keys", "status", "--json"))["roles"][0]["keys"][0]["keyid"]
    third = world.fleet.keys / "root-3.key"
    world.fleet.run("keys", "make", third)
    ceremony(
        world, "lost", "rotate", "root", "--remove", old[:16], "--add", f"{third}.pub", signers=(first, second, third)
    )  # fmt: skip
    world.version += 1
    world.publish()
    world.fleet.roll_out(world.version)
    assert world.serving() == 1, "meanwhile it serves what it had"

    world.restart("sync")

    world.until(f"release {world.version} is committed", lambda: world.committed(world.version))
    world.until("the fleet sees it", lambda: world.fleet.devices()["device"]["online"])
    assert world.traffic.failed[failed:] == []


@pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is not installed")
def test_a_board_that_wakes_up_in_1970(world: World) -> None:
    """TLS, MQTT, metadata, trial, watch and reports with that clock."""
    take_away(world)
    failed = len(world.traffic.failed)
    release = release_without_the_device(world) + 1
    world.version = release
    world.publish()
    world.fleet.roll_out(release)

    with the_clock_says(world, IN_1970):
        world.restart("sync")
        world.until(f"release {release} is committed", lambda: world.committed(release))

    world.until("the fleet sees it", lambda: world.fleet.devices()["device"]["online"])
    assert world.answer(release)["at"] > 1_700_000_000, "it says when it was by the signed time"
    world.until("the rollout is complete", lambda: world.fleet.get("rollouts")[0]["state"] == "completed")
    assert world.traffic.failed[failed:] == []
    world.kill("sync")
    world.restart("sync")


@pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is not installed")
def test_a_clock_that_is_years_ahead(world: World) -> None:
    """It serves, says what is wrong, and follows as soon as the clock is right."""
    take_away(world)
    before = world.serving()
    world.version += 1
    world.publish()
    world.fleet.roll_out(world.version)
    log = world.folder / "logs" / "device-sync.log"
    log.write_text("")

    with the_clock_says(world, "@2049-01-01 00:00:00"):
        world.restart("sync")
        doctor = world.processes.environment | {}
        said = _doctor(world, doctor)
    assert "2049" in said
    assert world.serving() == before

    world.kill("sync")
    world.restart("sync")
    world.until(f"release {world.version} is committed", lambda: world.committed(world.version))


def _doctor(world: World, environment: dict[str, str]) -> str:
    import subprocess

    from processes import command

    line = command("edge-agent", "doctor", "--config", world.device.config)
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60, check=False).stdout
