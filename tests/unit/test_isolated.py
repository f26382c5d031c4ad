"""The parent's side of an isolated model, with a process that does not do its part."""

import contextlib
import gc
import os
import signal
import threading
import time
import weakref

import numpy as np
import psutil
import pytest

from runtimes import isolated
from runtimes.contract import LoadOptions, ModelInvalid, RunFailed
from runtimes.isolated.process import Process
from tests.serving import onnx_models
from tests.waiting import wait_until

DEADLINE_S = 20.0
ROWS = 4096  # of 16 bytes: an answer so large is left where it lies


def load(path, slots=0):
    return isolated.load("onnx", path, LoadOptions(), slots=slots)


@pytest.fixture
def path(tmp_path):
    return onnx_models.scale(tmp_path / "scale.onnx", 2.0)


def inputs(model):
    (spec,) = model.inputs
    return {spec.name: np.ones([ROWS if size == -1 else size for size in spec.shape], np.float32)}


def in_thread(do):
    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    return thread


def test_the_end_of_a_sequence_waits_for_nobody(path):
    """It is told with locks held that all models need; what the process does not hear now it hears before the next order."""
    model = load(path)
    try:
        os.kill(model.pid, signal.SIGSTOP)
        ends = in_thread(lambda: [model.end_sequence(number) for number in range(1, 2001)])
        ends.join(DEADLINE_S)
        assert not ends.is_alive()
        assert model.process.ends
        os.kill(model.pid, signal.SIGCONT)
        assert len(model.run(inputs(model))) == 1
        assert not model.process.ends
    finally:
        os.kill(model.pid, signal.SIGCONT)
        model.close()


def test_all_who_wait_for_a_slot_hear_that_the_process_has_gone(path):
    model = load(path, slots=2)
    feeds, ended = inputs(model), []

    def ask():
        try:
            model.run(feeds)
        except RunFailed as error:
            ended.append(str(error))

    try:
        kept = model.run(feeds)  # a slow reader's, which keeps its slot
        os.kill(model.pid, signal.SIGSTOP)
        threads = [in_thread(ask) for _ in range(5)]
        wait_until(lambda: model.waiting == 4)
        os.kill(model.pid, signal.SIGKILL)
        for thread in threads:
            thread.join(DEADLINE_S)
        assert len(ended) == 5
        del kept
    finally:
        model.close()


def test_a_run_fails_once_whoever_listens_knows(path):
    """Who asks again at once must not meet the process that has ended."""
    model = load(path)
    told, go, known, ended = threading.Event(), threading.Event(), [], []

    def died(how):
        told.set()
        go.wait(DEADLINE_S)
        known.append(how)

    def ask():
        with contextlib.suppress(RunFailed):
            while True:
                model.run(feeds)
        ended.append(list(known))

    try:
        feeds = inputs(model)
        model.on_death(died)
        asking = in_thread(ask)
        os.kill(model.pid, signal.SIGKILL)
        assert told.wait(DEADLINE_S)
        asking.join(0.2)
        go.set()
        asking.join(DEADLINE_S)
        assert ended == [["SIGKILL"]]
    finally:
        go.set()
        model.close()


@pytest.mark.parametrize("slots_before", [1, 0], ids=["a slot of before", "a new slot"])
def test_helpers_that_a_process_leaves_behind_keep_nobody(path, slots_before, monkeypatch):
    """An engine's own child has what its parent had open: the connection does not end with the process."""
    left, tell = [], Process.tell

    def told(process, order, descriptors=()):
        left.extend(os.dup(descriptor) for descriptor in descriptors)
        tell(process, order, descriptors)

    monkeypatch.setattr(Process, "tell", told)
    model = load(path)
    feeds, ended = inputs(model), []

    def ask():
        try:
            model.run(feeds)
        except RunFailed as error:
            ended.append(str(error))

    try:
        for _ in range(slots_before):
            model.run(feeds)
        os.kill(model.pid, signal.SIGSTOP)
        thread = in_thread(ask)
        wait_until(lambda: model.slots and not model.idle_slots)
        os.kill(model.pid, signal.SIGKILL)
        thread.join(DEADLINE_S)
        assert len(ended) == 1
        assert "SIGKILL" in ended[0]
    finally:
        for descriptor in left:
            os.close(descriptor)
        model.close()


def test_one_that_hangs_while_it_loads_is_given_up(tmp_path):
    path = tmp_path / "model.onnx"
    os.mkfifo(path)  # opening it waits for somebody who writes
    children = set(psutil.Process().children())
    started = time.monotonic()
    with pytest.raises(ModelInvalid, match="loading it was not done in 2 s"):
        isolated.load("onnx", path, LoadOptions(), limit_s=2)
    assert time.monotonic() - started < DEADLINE_S
    assert set(psutil.Process().children()) == children


def test_a_closed_model_keeps_nobody_who_listened(path):
    class Listener:
        def __init__(self, model):
            self.model = model

        def died(self, _how):
            pass

    model = load(path)
    listener = Listener(model)
    model.on_death(listener.died)
    listening = weakref.ref(listener)
    gc.disable()
    try:
        model.close()
        del listener
        assert listening() is None
    finally:
        gc.enable()


def test_weights_that_may_be_given_are_left_out_where_they_are_too_many_to_tell(tmp_path):
    """What a process says of its model is one message, which has an end."""
    model = load(onnx_models.many_by_default(tmp_path / "many.onnx", 3000))
    try:
        assert [spec.name for spec in model.inputs] == ["x"]
        assert model.run({"x": np.float32([1, 2])})[0].tolist() == [3001, 3002]
    finally:
        model.close()
    few = load(onnx_models.many_by_default(tmp_path / "few.onnx", 3))
    try:
        assert [spec.optional for spec in few.inputs] == [False, True, True, True]
    finally:
        few.close()
