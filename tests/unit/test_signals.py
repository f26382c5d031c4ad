"""The end of a process, told by a signal that may come between any two steps of the main thread."""

import signal
import sys

import pytest

from agent.host.signals import Ending


@pytest.mark.timeout(20)
def test_a_signal_between_any_two_steps_of_waiting_ends_the_wait():
    step, sent = 0, True
    while sent:  # until there are no more steps than that
        step, sent = step + 1, False
        left = step

        def trace(_frame, event, _argument):
            nonlocal left, sent
            if event == "line":
                left -= 1
                if left == 0:
                    sent = True
                    signal.raise_signal(signal.SIGTERM)
            return trace

        with Ending() as ending:
            sys.settrace(trace)
            try:
                ending.wait(0.05)
            finally:
                sys.settrace(None)
            assert ending.is_set() is sent
    assert step > 2
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.timeout(20)
def test_every_signal_after_the_first_changes_nothing():
    with Ending() as ending:
        assert not ending.is_set()
        for _ in range(1000):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        ending.wait()
        assert ending.is_set()
