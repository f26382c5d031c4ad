"""What stories of updates have in common: how things are stopped, restarted and refused."""

from __future__ import annotations

from agent.contract.assignment import Rollout
from agent.contract.reasons import Reason
from agent.contract.reports import Phase
from agent.store import Selection
from agent.sync.problems import Problem
from tests.sync.bench import MODEL, Bench

P = Phase


def selected(bench: Bench) -> Selection:
    selection = bench.store.selection(MODEL)
    assert selection is not None
    return selection


def no(reason: Reason):
    def trial(*_args):
        raise Problem(reason, "the trial says no", {"agreement": 0.1})

    return trial


def restart_serve(bench: Bench) -> None:
    bench.serve.restart()


def restart_sync(bench: Bench) -> None:
    bench.updater.leave()
    bench.again()


def restart_both(bench: Bench) -> None:
    bench.serve.restart()
    restart_sync(bench)


def reboot(bench: Bench) -> None:
    bench.serve.end()
    bench.updater.leave()
    bench.boot += "'"
    bench.serve.away = False
    bench.serve.start()
    bench.again()


def stop_in(bench: Bench, phase: Phase) -> None:
    """Release 2 stands in `phase` and stays there."""
    if phase is P.WAITING:
        bench.manifest_problem = Problem(Reason.DOWNLOAD_FAILED, "unplugged")
    bench.want(2)
    if phase is P.SHADOWING:
        bench.want(1, rollout=Rollout(id="look-first", release=2, previous=1, permille=1000, mode="shadow"))
    bench.step()
    bench.until(phase)
    bench.manifest_problem = None
