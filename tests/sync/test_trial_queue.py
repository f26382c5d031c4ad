"""Whose trial is next."""

from __future__ import annotations

import threading

import pytest

from agent.sync.problems import Stopped
from agent.sync.trials.queue import TrialQueue
from tests.sync.conftest import eventually


def never() -> bool:
    return False


class Crowd:
    """Trials that run until they are let go."""

    def __init__(self, queue: TrialQueue) -> None:
        self.queue = queue
        self.order: list[str] = []
        self.ends: dict[str, threading.Event] = {}
        self.threads: list[threading.Thread] = []

    def put(self, name: str, priority: int, need: int = 10) -> None:
        self.ends[name] = threading.Event()
        waiting = self.queue.waiting + self.queue.running

        def work() -> None:
            with self.queue.turn(priority, need, 1, never):
                self.order.append(name)
                self.ends[name].wait(20)

        self.threads.append(threading.Thread(target=work))
        self.threads[-1].start()
        eventually(lambda: self.queue.waiting + self.queue.running > waiting, name)

    def end(self) -> None:
        for event in self.ends.values():
            event.set()
        for thread in self.threads:
            thread.join(20)


def test_the_smallest_number_goes_first_and_one_at_a_time():
    crowd = Crowd(TrialQueue(free_bytes=lambda: 10**12, cores=2))
    crowd.put("first", 100)
    crowd.put("late", 200)
    crowd.put("urgent", 1)
    crowd.put("usual", 100)
    assert crowd.order == ["first"]
    crowd.end()

    assert crowd.order == ["first", "urgent", "usual", "late"]


def test_a_second_one_runs_beside_it_where_memory_and_cores_are_free():
    free = [100]
    crowd = Crowd(TrialQueue(free_bytes=lambda: free[0], cores=8))
    crowd.put("one", 1, need=60)
    crowd.put("large", 1, need=60)
    assert crowd.order == ["one"]
    free[0] = 200
    eventually(lambda: crowd.order == ["one", "large"], "room for both")
    crowd.put("third", 1, need=1)
    assert crowd.order == ["one", "large"], "there are no cores for three"
    crowd.end()


def test_who_is_stopped_leaves_the_queue():
    queue = TrialQueue(free_bytes=lambda: 0, cores=1)
    with queue.turn(1, 0, 1, never):
        with pytest.raises(Stopped), queue.turn(0, 0, 1, lambda: True):
            pass
        assert queue.waiting == 0
    assert queue.running == 0
