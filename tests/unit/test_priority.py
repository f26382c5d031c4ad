"""Threads that give way for a while, and come back."""

import os
import resource
import subprocess
import sys
import threading
import time

import pytest

from agent.host import priority
from agent.store import hash_file

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="coming back needs a privilege")


def nice():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def in_thread(act):
    """What it returns, in a thread that may have to keep a low priority."""
    found = []
    thread = threading.Thread(target=lambda: found.append(act()))
    thread.start()
    thread.join()
    return found[0]


def given_way_as_nobody(act, before=lambda: None):
    """What `act` returns, a small number, when it gives way in a process that did `before` and then lost all privileges."""
    process = os.fork()
    if not process:
        status = 255
        try:
            priority.can_come_back.cache_clear()
            before()
            os.setresuid(65534, 65534, 65534)
            status = in_thread(priority.giving_way(act))
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@needs_root
def test_a_thread_gives_way_while_it_acts_and_no_longer():
    def act(first, *, second):
        found = {"self": nice(), "made": in_thread(nice), "first": first, "second": second}
        script = "import os; print(os.getpriority(os.PRIO_PROCESS, 0))"
        found["started"] = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout)
        return found

    own = nice()
    low = own + priority.STEP_BACK
    assert priority.giving_way(act)(1, second=2) == {"self": low, "made": low, "started": low, "first": 1, "second": 2}
    assert nice() == own
    assert in_thread(nice) == own


@needs_root
def test_it_comes_back_from_a_failure_too():
    def fail():
        raise KeyError(nice())

    own = nice()
    with pytest.raises(KeyError, match=str(own + priority.STEP_BACK)):
        priority.giving_way(fail)()
    assert nice() == own


@needs_root
def test_who_could_not_come_back_stays():
    """Else the thread would go on with less for the rest of its life, and with it all that it does later."""
    own = nice()
    assert given_way_as_nobody(nice) == own
    assert given_way_as_nobody(nice, before=priority.can_come_back) == own + priority.STEP_BACK, (
        "the privilege went later: nothing fails"
    )


def rests_during(act):
    """How often the thread gave the processor away by itself."""

    def count():
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        act()
        return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before

    return in_thread(count)


def test_who_rests_between_steps_sleeps_after_every_stretch_of_work():
    def work():
        while time.thread_time() < 50 * priority.STRETCH_S:
            priority.rest()

    assert 25 <= rests_during(work) <= 50


def test_who_has_hardly_worked_does_not_sleep():
    worked = []

    def wait():
        begun = time.thread_time()
        for _ in range(20):
            priority.rest()
        worked.append(time.thread_time() - begun)

    rests = rests_during(wait)
    assert rests <= 2 + worked[0] / priority.STRETCH_S  # on slow processors asking alone takes more than a stretch
    assert rests < 10


def test_a_large_file_is_hashed_with_rests(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(32 << 20))
    assert rests_during(lambda: hash_file(path)) >= 10  # some 20 ms of work, on the quickest machines
