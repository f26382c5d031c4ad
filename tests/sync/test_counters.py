"""Counters and the known time only grow, and records of refusals and states are read with care."""

from __future__ import annotations

from pathlib import Path

from agent.contract.reports import (
    Answer,
    Outcome,
)
from agent.host.clock import LastKnownGood
from agent.sync.fleet.counters import Counter
from agent.sync.updating.quarantine import Quarantine
from agent.sync.updating.states import States
from agent.sync.updating.update import UpdateState
from tests.sync.conftest import FakeClock


def test_counters_grow_across_restarts_lost_disks_and_clocks_that_go_back(tmp_path: Path):
    clock = FakeClock(wall=2000.0)
    path = tmp_path / "counter.json"
    first = Counter(path, clock).next()
    clock.set_wall(1000.0)
    second = Counter(path, clock).next()
    path.write_bytes(b"")
    clock.set_wall(3000.0)
    third = Counter(path, clock).next()

    assert 0 < first < second < third


def test_the_known_time_survives_and_only_grows(tmp_path: Path):
    path = tmp_path / "clock.json"
    LastKnownGood(path, floor=100.0).advance(1_000_000.0)
    known = LastKnownGood(path)
    known.advance(5.0)

    assert known.time == 1_000_000.0
    assert known.believable(1_000_000.0 - 60)
    assert not known.believable(0.0)
    path.write_bytes(b"\xff")
    assert LastKnownGood(path, floor=7.0).time == 7.0


def test_quarantine_remembers_manifests_not_numbers(tmp_path: Path):
    quarantine = Quarantine(tmp_path / "q")
    answer = Answer(release=3, outcome=Outcome.REFUSED, reason="golden_mismatch", message="wrong")
    quarantine.add("crane", "m1", answer)

    again = Quarantine(tmp_path / "q")
    assert again.find("crane", 3, "m1") == answer
    assert again.find("crane", 3, "m2") is None
    assert again.find("lift", 3, "m1") is None
    assert again.forget("crane", 3)
    assert not again.forget("crane", 3)


def test_a_state_of_a_newer_format_is_not_used(tmp_path: Path):
    states = States(tmp_path / "updates")
    states.save(UpdateState(model="crane"))
    path = tmp_path / "updates" / "crane.json"
    path.write_bytes(path.read_bytes().replace(b'"format":1', b'"format":9'))

    assert states.read("crane") is None
