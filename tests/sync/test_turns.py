"""Whose trial is next."""

from __future__ import annotations

import threading

import pytest

from agent.sync.problems import Stopped
from agent.sync.trials.turns import Turns
from tests.sync.conftest import eventually


def never() -> bool:
    return False


class Queue:
    """Trials that run until they are let go."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.order: list[str] = []
        self.ends: dict[str, threading.Event] = {}
        self.threads: list[threading.Thread] = []

    def put(self, name: str, priority: int, need: int = 10) -> None:
        self.ends[name] = threading.Event()
        waiting = len(self.turns._waiting) + len(self.turns._running)

        def work() -> None:
            with self.turns.take(priority, need, 1, never):
                self.order.append(name)
                self.ends[name].wait(20)

        self.threads.append(threading.Thread(target=work))
        self.threads[-1].start()
        eventually(lambda: len(self.turns._waiting) + len(self.turns._running) > waiting, name)

    def end(self) -> None:
        for event in self.ends.values():
            event.set()
        for thread in self.threads:
            thread.join(20)


def test_the_smallest_number_goes_first_and_one_at_a_time():
    queue = Queue(Turns(free_bytes=lambda: 10**12, cores=2))
    queue.put("first", 100)
    queue.put("late", 200)
    queue.put("urgent", 1)
    queue.put("usual", 100)
    assert queue.order == ["first"]
    queue.end()

    assert queue.order == ["first", "urgent", "usual", "late"]


def test_a_second_one_runs_beside_it_where_memory_and_cores_are_free():
    free = [100]
    queue = Queue(Turns(free_bytes=lambda: free[0], cores=8))
    queue.put("one", 1, need=60)
    queue.put("large", 1, need=60)
    assert queue.order == ["one"]
    free[0] = 200
    eventually(lambda: queue.order == ["one", "large"], "room for both")
    queue.put("third", 1, need=1)
    assert queue.order == ["one", "large"], "there are no cores for three"
    queue.end()


def test_who_is_stopped_leaves_the_queue():
    turns = Turns(free_bytes=lambda: 0, cores=1)
    with turns.take(1, 0, 1, never):
        with pytest.raises(Stopped), turns.take(0, 0, 1, lambda: True):
            pass
        assert turns._waiting == []
    assert turns._running == []
