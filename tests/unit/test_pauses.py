"""Long work in pieces: small ones and rests while others are at work, large ones while nobody is. On clocks that the test moves."""

import pytest

from agent.serving.api import pauses
from agent.serving.api.pauses import ALONE_S, AMONG_S, LARGEST, QUIET_S, RESTS, SMALLEST, Pauses


class Clocks:
    """Of the process, of its threads, and of the wall; `others_s` is what other threads use while this one rests."""

    def __init__(self):
        self.now_s = self.process_s = 100.0
        self.threads = {1: 7.0, 2: 3.0}
        self.ident = 1
        self.others_s = 0.0
        self.rests = 0

    def work(self, seconds, *, thread=1, others=0.0):
        self.now_s += seconds
        self.threads[thread] += seconds
        self.process_s += seconds + others

    def perf_counter(self):
        return self.now_s

    def process_time(self):
        return self.process_s

    def clock_gettime(self, clock):
        if clock not in self.threads:
            raise OSError
        return self.threads[clock]

    def pthread_getcpuclockid(self, ident):
        return ident

    def get_ident(self):
        return self.ident

    def sleep(self, _seconds):
        self.rests += 1
        self.now_s += 55e-6
        self.process_s += self.others_s


@pytest.fixture
def clocks(monkeypatch):
    made = Clocks()
    monkeypatch.setattr(pauses, "time", made)
    monkeypatch.setattr(pauses, "threading", made)
    return made


def test_alone_pieces_grow_and_nobody_rests(clocks):
    one = Pauses()
    for _ in range(10):
        clocks.work(ALONE_S / 10)
        one.rest()
    assert (one.size, clocks.rests) == (LARGEST, 0)


def test_among_others_pieces_shrink_and_each_is_followed_by_rests(clocks):
    one, clocks.others_s = Pauses(), 20e-6
    for _ in range(10):
        clocks.work(2 * AMONG_S, others=20e-6)
        one.rest()
    assert (one.size, clocks.rests) == (SMALLEST, 10 * RESTS)


def test_a_while_after_others_it_is_as_before(clocks):
    one = Pauses()
    clocks.work(1e-6, others=20e-6)
    one.rest()
    assert clocks.rests == 1, "nobody was heard while it rested"
    clocks.work(QUIET_S)
    one.rest()
    assert clocks.rests == 1


def test_readers_are_no_others_and_rest_in_turns(clocks):
    """Two of them would else wait for one another; together they leave as much room as one."""
    one = Pauses()
    clocks.ident = 2
    two = Pauses()
    one.rest()
    for _ in range(5):
        clocks.work(50e-6, thread=2)
        clocks.work(50e-6, thread=1)
        one.rest()
    assert clocks.rests == 0
    clocks.work(50e-6, others=50e-6)
    one.rest()
    assert clocks.rests == 2
    del two
    clocks.work(50e-6, others=50e-6)
    one.rest()
    assert clocks.rests == 3


def test_a_reader_whose_thread_has_ended_is_passed_over(clocks):
    one = Pauses()
    clocks.ident = 3  # which has no clock
    two = Pauses()
    clocks.work(ALONE_S / 10)
    one.rest()
    two.rest()
    assert clocks.rests == 0
