"""Whoever has the broker can keep devices from hearing of news at once, and the fleet from hearing of devices. Nothing else.

Every update below ends as it would with an honest broker, or the device stays where it was and says why; afterwards, with an honest
broker, the fleet and the device agree.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import pytest
import yaml
from processes import StepFailed

from tests.e2e.world import GOOD, TREACHEROUS, WEAK, World
from tests.survival.hostile import HostileBroker

pytestmark = [pytest.mark.survival, pytest.mark.mosquitto, pytest.mark.timeout(240)]


class Besieged(World):
    """The device's way to its broker leads through `broker`."""

    broker: HostileBroker

    def begin(self) -> None:
        super().begin()
        self.kill("sync")
        settings = yaml.safe_load(self.device.config.read_text())
        settings["sync"] |= {"poll_interval_s": 1.0, "heartbeat_s": 1.0}
        self.device.config.write_text(yaml.safe_dump(settings))
        identity = self.device.folder / "identity"
        address = json.loads((identity / "fleet.json").read_bytes())
        self.broker = self._stack.enter_context(
            HostileBroker(self.fleet.data / "pki", identity, address["broker_port"], seed=4)
        )
        address["broker_port"] = self.broker.port
        (identity / "fleet.json").write_text(json.dumps(address))
        self.restart("sync")
        self.until("the device is online again", lambda: self.fleet.devices()["device"]["online"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Besieged]:
    with Besieged(tmp_path_factory.mktemp("besieged")) as running:
        yield running


HARMLESS = ("duplicating", "reordering", "delaying", "replaying", "forging")


@pytest.mark.parametrize("manner", HARMLESS)
def test_an_update_is_completed_and_the_fleet_knows(world: Besieged, manner: str) -> None:
    passed, failed = world.broker.passed, len(world.traffic.failed)
    world.broker.manner = manner
    release = world.update(other_than_now(world))
    world.until(f"release {release} is committed", lambda: world.committed(release))
    world.until("the rollout is complete", lambda: world.fleet.get("rollouts")[0]["state"] == "completed")
    assert world.broker.passed > passed + 3, "the messages of this update came by here"
    assert_agreed(world, failed)


@pytest.mark.parametrize("manner", HARMLESS)
def test_a_bad_release_is_rolled_back_and_the_fleet_knows(world: Besieged, manner: str) -> None:
    before = world.serving()
    world.broker.manner = manner
    release = world.update(TREACHEROUS)
    world.until("a rollback", lambda: world.answer(release) and world.serving() == before)
    assert world.answer(release)["reason"] == "error_ratio"
    world.until("the rollout is over", lambda: world.fleet.get("rollouts")[0]["state"] == "aborted")
    assert_agreed(world, None)


def test_reports_that_the_broker_acknowledges_and_keeps(world: Besieged) -> None:
    """The device finds news by itself, and believes that the fleet knows; the fleet knows with the first report that gets through."""
    failed = len(world.traffic.failed)
    world.broker.manner = "swallowing"
    release = world.update(other_than_now(world))
    world.until(f"release {release} is committed", lambda: world.committed(release))
    assert world.fleet.get("rollouts")[0]["state"] not in {"completed", "aborted"}, "the fleet has not heard of it"
    world.broker.manner = "honest"
    world.until("the rollout is complete", lambda: world.fleet.get("rollouts")[0]["state"] == "completed")
    assert_agreed(world, failed)


@pytest.mark.parametrize("manner", ["losing", "silent"])
def test_a_broker_that_acknowledges_nothing(world: Besieged, manner: str) -> None:
    """The device finds news by itself; what cannot be reported does not stay, and is tried again later."""
    before, failed = world.serving(), len(world.traffic.failed)
    world.broker.manner = manner
    release = world.update(other_than_now(world), report_within_s=3)
    world.until("an answer", lambda: world.answer(release))
    assert (world.answer(release)["outcome"], world.answer(release)["reason"]) == ("rolled_back", "cannot_report")
    assert (world.serving(), world.state()["waiting_for"]) == (before, "retry")
    assert_agreed(world, failed)
    with contextlib.suppress(StepFailed):  # it may be over, by its own gate
        world.fleet.post(f"rollouts/{world.fleet.get('rollouts')[0]['id']}/abort", {})
    world.until("the device has heard of it", world.at_rest)


def other_than_now(world: Besieged) -> str:
    return WEAK if world.models[world.serving() or 0] == GOOD else GOOD


def assert_agreed(world: Besieged, failed: int | None) -> None:
    world.broker.manner = "honest"

    def agreed() -> bool:
        known = world.fleet.get("devices/device")["models"]["digits"]
        return bool(known["serving"] == world.serving() and known["phase"] == world.state()["phase"])

    world.until("the fleet sees what serves", agreed)
    assert world.traffic.wrong == []
    if failed is not None:
        assert world.traffic.failed[failed:] == []
    told = [(event["at"], event["name"], event["message"]) for event in world.fleet.get("events?device=device&limit=500")]
    assert len(told) == len(set(told)), "a message that comes twice, or changed, is one event"
