"""Whatever is asked in whatever order by however many callers: nobody gets another's rows, and a bad row fails only its caller."""

import threading
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.contract.manifest import Serving
from agent.host import priority
from agent.serving.answers import Refusal
from agent.serving.dataplane import Dataplane
from agent.serving.models.host import ModelHost
from agent.serving.models.version import Version
from agent.serving.scheduling.demand import Demand, SequenceDemand
from agent.variants import check_batches
from runtimes.contract import ModelInvalid, Placement, RunFailed, TensorSpec

DEADLINE_S = 20.0


class Doubling:
    """y = 2 x for [n, any]; a negative number fails the run. It holds each run until it is let."""

    inputs = (TensorSpec("x", "INT64", (-1, -1)),)
    outputs = (TensorSpec("y", "INT64", (-1, -1)), TensorSpec("n", "INT64", (-1,)))
    placement = Placement("cpu", "cpu")
    stateful = False

    def __init__(self):
        self.sizes = []
        self.going_on = threading.Event()
        self.going_on.set()

    def run(self, feeds: Mapping, outputs=None):
        assert self.going_on.wait(DEADLINE_S)
        x = feeds["x"]
        self.sizes.append(len(x))
        if (x < 0).any():
            raise RunFailed("a negative number")
        found = {"y": 2 * x, "n": np.full(len(x), x.shape[1])}
        return [found[name] for name in outputs or ("y", "n")]

    def close(self):
        pass


class Counting(Doubling):
    """The sum of all x of a sequence."""

    inputs = (TensorSpec("x", "INT64", (1,)),)
    outputs = (TensorSpec("y", "INT64", (1,)),)
    stateful = True

    def run(self, feeds, outputs=None):
        return [feeds["x"].copy()]

    def sequence(self):
        return Sum()


class Sum:
    def __init__(self):
        self.sum = 0

    def run(self, feeds, outputs=None):
        before = self.sum
        after = before + int(feeds["x"][0])
        self.sum = after
        return [np.array([after])]

    def close(self):
        pass


def dataplane_of(model, **rules):
    host = ModelHost()
    version = Version("m", 1, "cpu", "", "test")
    version.serving = Serving(**rules)
    version.cost.run_s = 1e-6
    version.ready(model)
    host.add(version)
    host.activate("m", 1)
    return Dataplane(host), version


requests = st.lists(
    st.tuples(
        st.integers(1, 4),  # rows
        st.integers(1, 3),  # columns
        st.integers(0, 6),  # priority
        st.sampled_from(("good", "good", "good", "bad", "gone", "late")),
        st.sampled_from((None, ("y",), ("n", "y"))),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=40, deadline=None)
@given(requests, st.integers(0, 2))
def test_rows_never_cross_callers_and_a_bad_one_fails_only_its_own(asked, instances):
    model = Doubling()
    model.going_on.clear()
    plane, version = dataplane_of(model, max_batch_size=6, max_delay_us=2000, instances=instances)
    found = {}

    def ask(number, rows, columns, priority, fate, outputs):
        x = np.arange(rows * columns).reshape(rows, columns) + 1000 * (number + 1)
        x = -x if fate == "bad" else x
        demand = Demand(outputs, priority, 0.0 if fate == "late" else None)
        try:
            found[number] = x, plane.predict("m", None, {"x": x}, demand, lambda: fate != "gone").arrays
        except Refusal as refusal:
            found[number] = x, refusal

    threads = [threading.Thread(target=ask, args=(n, *one)) for n, one in enumerate(asked)]
    for thread in threads:
        thread.start()
    model.going_on.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    for number, (_, columns, _, fate, outputs) in enumerate(asked):
        x, got = found[number]
        if fate == "good" or (fate == "gone" and not isinstance(got, Refusal)):
            assert not isinstance(got, Refusal), got
            for name, array in zip(outputs or ("y", "n"), got, strict=True):
                assert np.array_equal(array, 2 * x if name == "y" else np.full(len(x), columns))
        else:
            assert got.status == {"bad": 500, "gone": 499, "late": 503}[fate]
    assert max(model.sizes, default=0) <= 6
    assert (version.lane.waiting, version.lane.running, plane.scheduler.waiting, version.inside) == (0, 0, 0, 0)
    stats = version.stats
    assert stats.ok == sum(not isinstance(got, Refusal) for _, got in found.values())
    assert stats.requests + stats.cancelled == len(asked)
    assert stats.inferences == sum(len(x) for x, got in found.values() if not isinstance(got, Refusal))
    assert sum(b.executions for b in stats.batches) == stats.executions
    assert sum(b.executions * b.size for b in stats.batches) == stats.inferences


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 100)), min_size=1, max_size=24))
def test_no_step_of_a_sequence_is_lost_whoever_brings_it(steps):
    plane, version = dataplane_of(Counting())

    def ask(number, value, **flags):
        return plane.predict("m", None, {"x": np.array([value])}, Demand(sequence=SequenceDemand(number, **flags)))

    for number in (7, 8, 9):
        ask(number, 0, start=True)
    threads = [threading.Thread(target=ask, args=(7 + which, value)) for which, value in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    for which in range(3):
        total = sum(value for w, value in steps if w == which)
        assert ask(7 + which, 0, end=True).arrays[0] == total
    assert len(version.lane.sequences) == 0


def test_many_callers_make_few_runs(monkeypatch):
    model, long = Doubling(), []
    monkeypatch.setattr(
        priority, "giving_way", lambda run: lambda feeds, names: long.append(len(feeds["x"])) or run(feeds, names)
    )
    plane, version = dataplane_of(model, max_batch_size=8, max_delay_us=10_000_000)
    while not version.cost.is_long:
        version.measured(1.0)
    threads = [threading.Thread(target=plane.predict, args=("m", None, {"x": np.full((2, 1), n)}, Demand())) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert model.sizes == [8], "four requests of two rows are one full batch; nobody waits for the delay"
    assert long == model.sizes, "it gives way"
    stats = version.stats
    assert (stats.ok, stats.executions, stats.inferences) == (4, 1, 8)
    (batch,) = stats.batches
    assert (batch.size, batch.executions) == (8, 1)
    assert stats.total_s == pytest.approx(stats.queue_s + stats.input_s + stats.run_s + stats.output_s)


def test_what_cannot_be_batched_is_refused_when_it_is_loaded():
    class Fixed(Doubling):
        outputs = (TensorSpec("y", "INT64", (4,)),)

    check_batches(Doubling(), 8)
    check_batches(Fixed(), 1)
    with pytest.raises(ModelInvalid, match="output 'y' has shape"):
        check_batches(Fixed(), 8)


def test_a_model_that_mixes_rows_is_run_one_by_one():
    class Summing(Doubling):
        def run(self, feeds, outputs=None):
            return [feeds["x"].sum(axis=0, keepdims=True), np.zeros(1)]

    plane, version = dataplane_of(Summing(), max_batch_size=2, max_delay_us=10_000_000)
    found = {}

    def ask(number):
        found[number] = plane.predict("m", None, {"x": np.array([[number]])}, Demand()).arrays[0].item()

    threads = [threading.Thread(target=ask, args=(n,)) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert found == {1: 1, 2: 2}
    assert version.stats.executions == 2
