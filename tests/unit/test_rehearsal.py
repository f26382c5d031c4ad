"""Whatever a model does to the copy of the process in which it is tried: each gets a verdict, once, and the others do not suffer."""

import ctypes
import faulthandler
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from agent.serving.models import rehearsal
from agent.serving.models.loading import Source
from agent.serving.models.rehearsal import MOST_LATE, Rehearsals

pytestmark = pytest.mark.timeout(60)
LIMIT_S = 1.0


def raises():
    raise ValueError("the file is bad")


def breaks_its_contract():
    raise KeyError("surprise")


def closes_its_line_and_goes_on():
    os.closerange(3, 1024)
    time.sleep(600)


def ends_it_after_its_verdict():
    """As an engine does whose own threads run into what it has freed."""
    threading.Timer(0.02, ctypes.string_at, [0]).start()


def leaves_a_process():
    if os.fork() == 0:
        time.sleep(5)
        os._exit(0)


def counts_the_others():
    raise ValueError(str(len(psutil.Process(os.getppid()).children())))


ACTS = {
    "good": (lambda: None, None),
    "raises": (raises, "the file is bad"),
    "breaks its contract": (breaks_its_contract, "KeyError: 'surprise'"),
    "kills": (lambda: ctypes.string_at(0), "ends the process (SIGSEGV)"),
    "exits": (lambda: os._exit(3), "ends the process (exit status 3)"),
    "hangs": (lambda: time.sleep(600), "were not done in 1 s"),
    "closes its line and goes on": (closes_its_line_and_goes_on, "ends the process (SIGKILL)"),
    "ends it after its verdict": (ends_it_after_its_verdict, None),
    "leaves a process": (leaves_a_process, None),
    "counts the others": (counts_the_others, ""),
}


@pytest.fixture
def rehearse(monkeypatch):
    """The verdicts on models that do this, in the order in which they came."""

    def load(source, threads):
        faulthandler.disable()  # of the test run
        ACTS[source.name][0]()
        return SimpleNamespace(model=None)

    def run(names, limit_s=LIMIT_S):
        monkeypatch.setattr(rehearsal.loading, "load", load)
        sources = [Source(name, number, Path(name), "") for number, name in enumerate(names)]
        found = list(Rehearsals(sources, threads=1, limit_s=limit_s).verdicts())
        assert sorted(source.version for source, _ in found) == list(range(len(names)))
        return [(source.name, reason) for source, reason in found]

    return run


def test_each_gets_its_verdict(rehearse):
    names = [name for act in ACTS for name in (act, "good", "good")]
    begun = time.monotonic()
    for name, reason in rehearse(names):
        words = ACTS[name][1]
        assert reason is None if words is None else words in reason, (name, reason)
    assert time.monotonic() - begun < LIMIT_S + 3, "a process that a model left behind is not waited for"


@pytest.mark.long
@pytest.mark.alone  # which of two things comes first depends on processors that have time
def test_where_many_hang_the_others_come_first(rehearse, monkeypatch):
    """And those that hang do not fill the memory meanwhile."""
    monkeypatch.setattr(rehearsal, "PATIENCE_S", 0.05)
    found = rehearse(
        ["hangs"] * 3 * MOST_LATE + ["counts the others"], limit_s=3
    )  # slow processors take a second for the copies
    assert [name for name, _ in found].index("counts the others") < MOST_LATE
    assert int(dict(found)["counts the others"]) <= MOST_LATE + len(os.sched_getaffinity(0))
    assert {reason for name, reason in found if name == "hangs"} == {"loading it and a first run were not done in 3 s"}


@pytest.mark.parametrize("said", [b"", b'[0, null]\n[1, "unfini'], ids=["nothing", "half a verdict"])
def test_a_zygote_that_is_killed_leaves_nobody_without_a_verdict(said, rehearse, monkeypatch):
    def killed(self):
        os.write(self._say, said)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(rehearsal.Zygote, "rehearse_all", killed)
    reasons = [reason for _, reason in rehearse(["good", "good"])]
    lost = "it could not be tried before: the process for that has ended"
    assert reasons == ([None, lost] if said else [lost, lost])
