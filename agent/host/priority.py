"""Work that can wait: done by a thread to which every other one on this machine goes first."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

NICE = 10
STEP_BACK = 5  # of a processor that another thread wants too it then gets a quarter
STRETCH_S = 100e-6  # of work between two rests: what a request may have to wait
REST_S = 50e-6  # the kernel makes some 100 µs of it

P = ParamSpec("P")
T = TypeVar("T")

_rested = threading.local()  # at_s: how long the thread had worked when it last rested


def lower() -> None:
    """The calling thread gives way to the others, for the rest of its life."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(NICE, os.getpriority(os.PRIO_PROCESS, 0)))


def lower_process(pid: int) -> None:
    """Lets a process that has just been started give way to the others: threads that it makes from now on, and what it starts,
    give way too.

    Where the kernel shares the processors between sessions first (autogroups), that counts within one only. Lowering a whole
    session was tried for trials: on two busy cores they took four times as long, and no request was answered sooner.
    """
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, pid, max(NICE, os.getpriority(os.PRIO_PROCESS, pid)))


def rest() -> None:
    """To be called between the steps of long work that can wait: sleeps a moment after each STRETCH_S for which the calling
    thread has worked.

    However small its weight: while a thread has some of its share left, the kernel lets it have its whole turn of 1 to 4 ms,
    and who wakes up on that processor waits for it, be it a client whose answer is there. A thread that sleeps gives up the
    rest of its turn.
    """
    worked_s = time.thread_time()
    if worked_s - getattr(_rested, "at_s", 0.0) >= STRETCH_S:
        time.sleep(REST_S)
        _rested.at_s = worked_s


def waited_s() -> float:
    """How long the calling thread has been ready to run while others ran, in all its life; 0 where the kernel does not count
    it.
    """
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def giving_way(act: Callable[P, T]) -> Callable[P, T]:
    """`act`, during which the calling thread, and each thread and process that it starts, gives way to the other threads of
    this process. As it is where the thread could not come back from that.
    """
    return functools.partial(_give_way, act) if can_come_back() else act


def _give_way(act: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
    thread = threading.get_native_id()
    own = os.getpriority(os.PRIO_PROCESS, thread)
    os.setpriority(os.PRIO_PROCESS, thread, own + STEP_BACK)
    try:
        return act(*args, **named)
    finally:
        with contextlib.suppress(PermissionError):  # somebody has lowered the limit meanwhile
            os.setpriority(os.PRIO_PROCESS, thread, own)


@functools.cache
def can_come_back() -> bool:
    """Whether a thread that lowered its priority may raise it again: the limit `nice` says so, or the process is privileged."""
    found = []

    def try_it() -> None:  # in a thread that ends: it may have to stay where it is
        with contextlib.suppress(PermissionError):
            _give_way(lambda: None)
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    thread = threading.Thread(target=try_it, name="priority")
    thread.start()
    thread.join()
    return found == [own]


def in_background(work: Callable[[], None]) -> None:
    """Does `work` in a thread of low priority and waits for it.  Raises: whatever it raises."""
    failures: list[BaseException] = []

    def run() -> None:
        lower()
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - it is raised where it was waited for
            failures.append(error)

    thread = threading.Thread(target=run, name="background")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
