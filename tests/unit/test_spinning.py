"""How the polling thread waits: asleep, or for a moment awake."""

import pytest

from agent.serving.transport.spinning import LOST_S, PROMPT_ROUNDS, SPIN_S, USUAL_SPARE_S, USUAL_TIMES, Spinner

LOOK_S = 2e-6
LONGEST_S = 5.0
CLIENT, OTHER = 7, 8


class Epoll:
    """Something is there `gap_s` after a poll begins. A look takes `look_s`."""

    def __init__(self):
        self.now_s = 100.0
        self.slept = self.looked = 0
        self.look_s = LOOK_S
        self.due_s = 0.0
        self.spinner = Spinner(lambda: self.now_s)

    def poll(self, longest_s):
        if longest_s:
            self.slept += 1
            self.now_s = min(self.now_s + longest_s, max(self.now_s, self.due_s))
        else:
            self.looked += 1
            self.now_s += self.look_s
        return self.events if self.now_s >= self.due_s else []

    def ask(self, gap_s=50e-6, fds=(CLIENT,), rounds=1):
        """How often it slept for these requests."""
        before = self.slept
        for _ in range(rounds):
            self.due_s = self.now_s + gap_s
            self.events = [(fd, 1) for fd in fds]
            assert self.spinner.poll(self.poll, LONGEST_S) == self.events
        return self.slept - before


@pytest.fixture
def epoll():
    return Epoll()


@pytest.fixture
def awake(epoll):
    """One whose client has been found prompt."""
    epoll.ask(rounds=PROMPT_ROUNDS + 1)
    assert epoll.ask() == 0
    return epoll


def test_a_client_that_asks_again_at_once_is_waited_for_awake(epoll):
    assert epoll.ask(rounds=PROMPT_ROUNDS + 1) == PROMPT_ROUNDS + 1
    assert epoll.looked == 0
    assert epoll.ask(rounds=100) == 0


def test_what_comes_later_is_waited_for_asleep(epoll):
    assert epoll.ask(gap_s=2 * SPIN_S, rounds=100) == 100
    assert epoll.looked == 0


def test_among_several_clients_none_is_waited_for(epoll):
    for n in range(100):
        assert epoll.ask(fds=(CLIENT if n % 2 else OTHER,)) == 1
    assert epoll.ask(fds=(CLIENT, OTHER), rounds=100) == 100
    assert epoll.looked == 0


def test_a_client_that_stops_asking_costs_one_moment(awake):
    looked = awake.looked
    assert awake.ask(gap_s=0.6) == 1
    assert (awake.looked - looked) * LOOK_S == pytest.approx(SPIN_S, rel=0.05)
    looked = awake.looked
    assert awake.ask(gap_s=0.6, rounds=100) == 100
    assert awake.looked == looked


def test_a_quicker_client_costs_a_shorter_moment(awake):
    """As when it cannot ask because this thread has the processor that it needs."""
    assert awake.ask(gap_s=10e-6, rounds=100) == 0
    looked = awake.looked
    assert awake.ask(gap_s=0.6) == 1
    assert (awake.looked - looked) * LOOK_S == pytest.approx(USUAL_TIMES * 10e-6 + USUAL_SPARE_S, rel=0.1)


def test_a_client_that_becomes_slower_is_waited_for_longer(awake):
    awake.ask(gap_s=10e-6, rounds=100)
    assert 1 <= awake.ask(gap_s=200e-6, rounds=100) < 100
    assert awake.ask(gap_s=200e-6, rounds=100) == 0


def test_another_client_is_known_before_it_is_waited_for(awake):
    awake.ask(gap_s=10e-6, rounds=100)
    assert awake.ask(gap_s=200e-6, fds=(OTHER,), rounds=PROMPT_ROUNDS + 1) == PROMPT_ROUNDS + 1
    assert awake.ask(gap_s=200e-6, fds=(OTHER,), rounds=100) == 0


def test_nothing_comes_for_as_long_as_asked(awake):
    awake.due_s = awake.now_s + 3600
    began_s = awake.now_s
    assert awake.spinner.poll(awake.poll, LONGEST_S) == []
    assert awake.now_s - began_s == pytest.approx(LONGEST_S + SPIN_S, rel=0.01)


def tries(epoll, gaps_s, rounds):
    """In how many of these rounds it stayed awake, for a client that asks with these gaps in turns."""
    count = 0
    for n in range(rounds):
        looked = epoll.looked
        epoll.ask(gap_s=gaps_s[n % len(gaps_s)])
        count += epoll.looked > looked
    return count


def test_where_another_takes_the_processor_it_is_tried_ever_more_seldom(awake):
    awake.look_s = 2 * LOST_S
    assert tries(awake, [50e-6], 100) == 5
    assert 9 <= tries(awake, [50e-6], 10_000) <= 12


def test_for_a_client_that_always_stops_again_it_is_tried_ever_more_seldom(epoll):
    gaps_s = [50e-6] * PROMPT_ROUNDS + [2 * SPIN_S]
    assert tries(epoll, gaps_s, 100) >= 3
    assert 5 <= tries(epoll, gaps_s, 10_000) <= 12


def test_a_processor_that_was_taken_once_is_tried_again_soon(awake):
    awake.look_s = 2 * LOST_S
    awake.ask()
    awake.look_s = LOOK_S
    assert awake.ask(rounds=3) <= 2
    assert awake.ask(rounds=100) == 0
    awake.look_s = 2 * LOST_S
    awake.ask()
    awake.look_s = LOOK_S
    assert awake.ask(rounds=3) <= 2, "what was before does not count"
