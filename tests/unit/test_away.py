"""Room in memory: who may be put out, without engines."""

import threading
import time

import numpy as np
import pytest

from agent.serving.answers import Refusal
from agent.serving.dataplane import Dataplane
from agent.serving.models.host import ModelHost
from agent.serving.models.loading import Source
from agent.serving.models.residency import NoRoom, Residency
from agent.serving.models.version import Version
from agent.serving.scheduling.demand import Demand, SequenceDemand
from runtimes.contract import Placement, TensorSpec
from tests.waiting import wait_until

FEEDS = {"x": np.zeros(1, np.float32)}


class Remembering:
    inputs = outputs = (TensorSpec("x", "FP32", (1,)),)
    placement = Placement("cpu", "cpu")
    stateful = True

    def run(self, feeds, _outputs=None):
        return [feeds["x"]]

    def sequence(self):
        return Remembering()

    def close(self):
        pass


@pytest.fixture
def host():
    return ModelHost(sequence_idle_s=60.0)


@pytest.fixture
def dataplane(host):
    return Dataplane(host)


@pytest.fixture
def residency(host, dataplane, tmp_path):
    """A model of 80 bytes in a budget of 100."""
    made = Residency(host, dataplane.scheduler, dataplane, engine_threads=1, budget_bytes=100, min_residency_s=0.0)
    dataplane.summon = made.summon
    version = Version("old", 1, "cpu", "0" * 64, "fake")
    version.source = Source("old", 1, tmp_path / "old", "")
    version.ready(Remembering())
    version.took(0.0, 80)
    host.add(version)
    host.activate("old", 1)
    return made


@pytest.mark.alone  # it measures
def test_who_has_sequences_under_way_is_no_room_to_wait_for(host, dataplane, residency, tmp_path):
    """Nobody is inside between two requests of one, and yet the model may not go."""
    (tmp_path / "new").write_bytes(b"x" * 50)
    dataplane.predict("old", None, FEEDS, Demand(sequence=SequenceDemand(7, start=True)))
    begun = time.monotonic()
    with pytest.raises(NoRoom, match="may not be unloaded now"):
        residency.load(Source("new", 1, tmp_path / "new", ""))
    assert time.monotonic() - begun < 5.0
    dataplane.predict("old", None, FEEDS, Demand(sequence=SequenceDemand(7, end=True)))
    with pytest.raises(Exception, match="no runtime"):  # there is room, but it is no model
        residency.load(Source("new", 1, tmp_path / "new", ""))
    assert host.get("old").active.history.evictions == 1


# -- what is left of a process that ended --------------------------------------------------------------------------------------


class Mortal:
    """A process that ends when it is told to."""

    pid, memory_bytes = 7, 0

    def on_death(self, died):
        self.die = died


class Work:
    """What the control thread was given, and when it is due."""

    def __init__(self):
        self.given = []

    def __call__(self, do, delay_s):
        self.given.append((do, delay_s))

    def next(self):
        do, delay_s = self.given.pop(0)
        do()
        return delay_s


@pytest.fixture
def ended(host, residency, monkeypatch):
    """The version, whose process ended with a request in it that does not see it."""
    monkeypatch.setattr("agent.serving.models.restarts.CLEAR_S", 0.05)
    version = host.get("old").active
    process = Mortal()
    version.took(0.0, 80, process)
    residency.begin(work := Work())
    residency.restarts.follow(version)
    assert version.enter()
    process.die("SIGSEGV")
    return version, work


def test_a_request_that_does_not_see_that_its_process_ended_keeps_nobody_else(dataplane, residency, ended):
    version, work = ended
    refused = []

    def ask():
        try:
            dataplane.predict("old", None, FEEDS, Demand())
        except Refusal as refusal:
            refused.append(refusal)

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: version.lane.waiting)
    work.next()
    asking.join(20)

    assert not residency.changing.locked()
    assert (refused[0].status, refused[0].code) == (503, "evicted")
    assert "has not ended" in str(refused[0])
    assert dict(refused[0].headers)[b"retry-after"]
    assert version.loaded.process is not None, "its memory stays while somebody is in it"
    assert version.away


@pytest.mark.alone  # it measures
def test_it_is_started_again_once_that_request_has_ended(residency, ended, monkeypatch):
    version, work = ended
    started = []
    monkeypatch.setattr(residency, "bring_back", started.append)
    assert work.next() == 0.0
    assert len(work.given) == 1
    begun = time.monotonic()
    assert work.next() > 0
    assert time.monotonic() - begun < 5.0
    version.leave()
    work.next()
    assert version.loaded.process is None
    assert version.history.has_crashed
    assert started == []
    work.next()
    assert started == [version]
    assert work.given == []


@pytest.mark.alone  # it measures
def test_who_asks_meanwhile_is_told_at_once(residency, ended, monkeypatch):
    version, work = ended
    work.next()
    monkeypatch.setattr("agent.serving.models.restarts.CLEAR_S", 20.0)
    residency.summon(version)
    work.given.insert(0, work.given.pop())
    begun = time.monotonic()
    work.next()
    assert time.monotonic() - begun < 10.0
    assert len(work.given) == 1, "one try is planned, however many ask"
