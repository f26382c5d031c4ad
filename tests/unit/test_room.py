"""Room in memory: who may be put out, without engines."""

import time

import numpy as np
import pytest

from agent.serving.dataplane import Dataplane
from agent.serving.inference import Demand, SequenceDemand
from agent.serving.models.host import ModelHost, Version
from agent.serving.models.loading import Source
from agent.serving.models.residency import NoRoom, Residency
from runtimes.contract import Placement, TensorSpec

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
def residency(host, tmp_path):
    """A model of 80 bytes in a budget of 100."""
    made = Residency(host, Dataplane(host), engine_threads=1, budget_bytes=100, min_residency_s=0.0)
    version = Version("old", 1, "cpu", "0" * 64, "fake")
    version.source = Source("old", 1, tmp_path / "old", "")
    version.memory_bytes = 80
    version.ready(Remembering())
    host.add(version)
    host.activate("old", 1)
    return made


def test_who_has_sequences_under_way_is_no_room_to_wait_for(host, residency, tmp_path):
    """Nobody is inside between two requests of one, and yet the model may not go."""
    (tmp_path / "new").write_bytes(b"x" * 50)
    residency._dataplane.predict("old", None, FEEDS, Demand(sequence=SequenceDemand(7, start=True)))
    begun = time.monotonic()
    with pytest.raises(NoRoom, match="may not be unloaded now"):
        residency.load(Source("new", 1, tmp_path / "new", ""))
    assert time.monotonic() - begun < 5.0
    residency._dataplane.predict("old", None, FEEDS, Demand(sequence=SequenceDemand(7, end=True)))
    with pytest.raises(Exception, match="no runtime"):  # there is room, but it is no model
        residency.load(Source("new", 1, tmp_path / "new", ""))
    assert host.get("old").active.evictions == 1
