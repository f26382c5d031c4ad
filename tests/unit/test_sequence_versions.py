"""A sequence stays on the version that it began on: whose statistics count what becomes of its requests."""

import json
import time

import numpy as np
import pytest

from agent.serving.answers import Refusal
from agent.serving.api.oip import OIP
from agent.serving.dataplane import Dataplane
from agent.serving.models.host import ModelHost
from agent.serving.models.version import Version
from agent.serving.routes import Match, Request
from agent.serving.scheduling.demand import Demand, SequenceDemand
from agent.serving.scheduling.scheduler import Scheduler
from runtimes.contract import Placement, TensorSpec


class Stateless:
    placement = Placement("cpu", "cpu")

    def __init__(self, shape):
        self.inputs = self.outputs = (TensorSpec("x", "FP32", shape),)

    def run(self, feeds, _outputs=None):
        return [feeds["x"]]

    def close(self):
        pass


class Remembering(Stateless):
    stateful = True

    def sequence(self):
        return self


@pytest.fixture
def dataplane():
    """Version 1, which has sequence 7 under way, takes one element; version 2, which is active and remembers nothing, any number."""
    host = ModelHost()
    dataplane = Dataplane(host, Scheduler(1))
    for number, model in ((1, Remembering((1,))), (2, Stateless((-1,)))):
        version = Version("m", number, "cpu", "0" * 64, "fake")
        version.ready(model)
        host.add(version)
        host.activate("m", number)
        if number == 1:
            dataplane.predict("m", None, {"x": np.zeros(1, np.float32)}, Demand(sequence=SequenceDemand(7, start=True)))
    return dataplane


def ask(dataplane, elements):
    body = {
        "parameters": {"sequence_id": 7},
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [elements], "data": [1.0] * elements}],
    }
    data = memoryview(bytearray(json.dumps(body).encode()))
    return dataplane.infer(OIP, Request(Match(None, {}, model="m"), data, len(data), time.perf_counter()))


def counted(dataplane):
    """By version: what was answered, what was refused."""
    versions = dataplane.host.get("m").versions
    return {number: (version.stats.ok, version.stats.document()["failed"]["invalid"]) for number, version in versions.items()}


def test_what_the_owner_answers_counts_there(dataplane):
    assert ask(dataplane, 1).status == 200
    assert counted(dataplane) == {1: (2, 0), 2: (0, 0)}


def test_what_the_owner_refuses_counts_there_and_once(dataplane):
    with pytest.raises(Refusal, match="shape"):
        ask(dataplane, 2)
    assert counted(dataplane) == {1: (1, 1), 2: (0, 0)}
    assert [version.inside for version in dataplane.host.get("m").versions.values()] == [0, 0]
