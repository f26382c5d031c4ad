"""The model host: versions come and go, and whoever is in one finishes on it."""

import threading
import time

import numpy as np
import pytest

from agent.host import priority
from agent.serving.answers import Refusal
from agent.serving.models.cost import INLINE_BODY_BYTES, UNKNOWN_BODY_BYTES, NeverCheap
from agent.serving.models.host import ModelHost
from agent.serving.models.version import Version
from agent.serving.scheduling.lanes import INLINE_RUN_S, LONG_RUN_S
from runtimes.contract import Placement, TensorSpec


class Constant:
    """A model that answers its number, and knows whether it was closed while in use."""

    inputs = (TensorSpec("x", "FP32", (1,)),)
    outputs = (TensorSpec("y", "FP32", (1,)),)
    placement = Placement("cpu", "cpu")

    def __init__(self, number):
        self.number = number
        self.closed = False

    def run(self, _feeds, _outputs=None):
        assert not self.closed
        return [np.array([self.number], np.float32)]

    def close(self):
        assert not self.closed
        self.closed = True


def loaded(number, name="m"):
    version = Version(name, number, "cpu", "0" * 64, "fake")
    version.ready(Constant(number))
    return version


@pytest.fixture
def host():
    made = ModelHost()
    for number in (1, 2, 3):
        made.add(loaded(number))
    made.activate("m", 1)
    return made


def state(host):
    document = host.served("m").document()
    return document["active"], document["previous"], sorted(int(v) for v in document["versions"])


# What is done, and (active, previous, in memory) after it.
STORY = [
    ("activate", 1, (1, None, [1, 2, 3])),
    ("activate", 2, (2, 1, [1, 2, 3])),
    ("activate", 3, (3, 2, [2, 3])),
    ("activate", 2, (2, 3, [2, 3])),
    ("commit", None, (2, None, [2])),
    ("commit", None, (2, None, [2])),
]


def test_a_story_of_activations(host):
    versions = dict(host.served("m").versions)
    for action, number, expected in STORY:
        if action == "activate":
            host.activate("m", number)
        else:
            host.commit("m")
        assert state(host) == expected
    assert versions[1].model is None
    assert versions[3].model is None


def test_keeping_only_one(host):
    host.activate("m", 2)
    host.keep_only("m", 1)
    assert state(host) == (1, None, [1])


@pytest.mark.parametrize(
    ("action", "status", "code"),
    [
        (lambda h: h.activate("m", 9), 409, "not_loaded"),
        (lambda h: h.activate("none", 1), 404, "not_found"),
        (lambda h: h.unload("m", 1), 409, "active"),
        (lambda h: h.commit("none"), 404, "not_found"),
        (lambda h: h.enter("none", None), 404, "not_found"),
        (lambda h: h.enter("m", "9"), 404, "not_found"),
        (lambda h: h.enter("m", "previous"), 404, "not_found"),
    ],
)
def test_what_cannot_be(host, action, status, code):
    before = state(host)
    with pytest.raises(Refusal) as refused:
        action(host)
    assert (refused.value.status, refused.value.code) == (status, code)
    assert state(host) == before


def test_labels(host):
    host.activate("m", 2)
    for label, number in (("stable", 2), ("previous", 1), ("candidate", 3), ("3", 3), (None, 2)):
        version = host.enter("m", label)
        assert version.number == number
        version.leave()


def test_a_version_is_closed_after_the_last_request_in_it(host):
    version = host.enter("m", "2")
    model = version.model
    thread = threading.Thread(target=host.unload, args=("m", 2))
    thread.start()
    while version.state == "READY":
        threading.Event().wait(0.001)
    assert not model.closed
    with pytest.raises(Refusal):
        host.enter("m", "2")
    version.leave()
    thread.join(5)
    assert model.closed


def test_a_request_that_never_ends_keeps_its_model_open(host):
    version = host.enter("m", "1")
    model = version.model
    version.retire(timeout_s=0.01)
    assert not model.closed


def test_what_was_cheap_stays_so_through_a_bad_moment():
    version = Version("m", 1, "cpu", "0" * 64, "fake")
    version.cost.run_s = INLINE_RUN_S / 10
    version.ready(Constant(1))
    for run_s, is_cheap in ((4, True), (9, False), (2, False), (0.5, True)):
        for _ in range(100):
            version.measured(run_s * INLINE_RUN_S - 1e-6)
        assert version.cost.is_cheap is is_cheap, run_s


def test_an_isolated_model_is_never_cheap():
    version = Version("m", 1, "cpu", "0" * 64, "fake", NeverCheap())
    version.cost.run_s = INLINE_RUN_S / 10
    version.ready(Constant(1))
    version.arrange(max_sequences=1, sequence_idle_s=1.0)
    assert not version.cost.is_cheap
    for _ in range(100):
        version.measured(INLINE_RUN_S / 10)
    assert not version.cost.is_cheap


@pytest.mark.parametrize(("shape", "begins"), [((1, 4), INLINE_BODY_BYTES), ((-1, 4), UNKNOWN_BODY_BYTES)])
def test_how_large_a_request_is_cheap_is_learnt_where_a_model_takes_any_size(shape, begins):
    version, model = Version("m", 1, "cpu", "0" * 64, "fake"), Constant(1)
    model.inputs = (TensorSpec("x", "FP32", shape),)
    version.ready(model)
    assert version.cost.inline_bytes == begins
    for size, known in ((5000, max(begins, 5000)), (300, max(begins, 5000)), (1 << 30, INLINE_BODY_BYTES)):
        version.cost.learn(size)
        assert version.cost.inline_bytes == known


def test_only_a_long_run_gives_way(monkeypatch):
    monkeypatch.setattr(priority, "giving_way", lambda run: lambda *given: ["gave way", *run(*given)])
    version = loaded(5)
    assert version.run({}, None) == ["gave way", 5.0], "nobody knows yet how long it is"
    for _ in range(100):
        version.measured(LONG_RUN_S / 2)
    assert version.run({}, None) == [5.0]
    for _ in range(100):
        version.measured(LONG_RUN_S * 2)
    assert version.run({}, None) == ["gave way", 5.0]
    assert version.way(lambda *_: [6])({}, None) == ["gave way", 6]
    version.send_away("it leaves memory")
    version.remove_model()
    version.measured(0.0)
    with pytest.raises(AssertionError, match="not in memory"):
        version.run({}, None)


def test_requests_and_swaps_at_once(host):
    """Whoever enters the active version finds a model, whatever is swapped meanwhile."""
    host.commit("m")
    end, failures, count = threading.Event(), [], [0, 0, 0]

    def work(n):
        while not end.is_set():
            try:
                version = host.enter("m", None)
                version.model.run({})
                version.leave()
                count[n] += 1
            except Exception as error:  # noqa: BLE001
                failures.append(error)
                return

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for number in range(10, 210):
        host.add(loaded(number))
        host.activate("m", number)
        host.commit("m")
    while min(count) < 200 and not failures:
        threading.Event().wait(0.001)
    end.set()
    for thread in threads:
        thread.join(5)
    assert not failures
    assert state(host) == (209, None, [2, 3, 209])


@pytest.mark.timeout(30)
def test_nobody_runs_in_a_version_that_is_away():
    """A thread comes and goes while it goes away and comes back: it is let in each time, and when it may run the model is there."""
    version = loaded(1)
    ended, broken, times = threading.Event(), [], 0

    def come_and_go():
        while not ended.is_set():
            if not version.enter():
                broken.append("turned away")
            try:
                if not version.lane.gated:
                    version.model.run({})
            except Exception as error:  # noqa: BLE001 - told below
                broken.append(repr(error))
            finally:
                version.leave()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    deadline = time.monotonic() + 10
    while times < 50 and time.monotonic() < deadline:
        if version.send_away_if_empty("evicted"):
            times += 1
            version.remove_model().close()
            version.install(loaded(1))
            version.lane.open()
            version.come_back()
    ended.set()
    thread.join()
    assert (broken, version.inside) == ([], 0)
    assert times


def test_a_version_that_somebody_enters_just_then_stays(monkeypatch):
    version = loaded(1)
    close = version.lane.close
    comer = threading.Thread(target=version.enter)

    def close_as_somebody_comes():
        close()
        comer.start()
        while not version.inside:
            threading.Event().wait(0.001)

    monkeypatch.setattr(version.lane, "close", close_as_somebody_comes)
    assert not version.send_away_if_empty("evicted")
    comer.join(5)
    assert (version.state, version.away, version.lane.closed, version.lane.gated) == ("READY", False, False, False)


def test_a_version_whose_process_ended_before_it_was_listed_is_away():
    """Who comes waits for it, as for any other, instead of running into what is left."""
    version = loaded(4)
    assert version.send_away("its process ended (SIGSEGV)")
    version.arrange(max_sequences=1, sequence_idle_s=1.0)
    assert version.lane.closed
    assert version.lane.gated
