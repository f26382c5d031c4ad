"""One model that waits for `serve` keeps no other from going back."""

from __future__ import annotations

import threading
from pathlib import Path

from agent.contract.reports import Phase
from agent.store import Choice, Selection
from agent.sync.serving import ServeAway
from agent.sync.updating.update import UpdateState
from tests.sync.team_bench import TeamBench


def test_a_lease_that_is_renewed_while_a_release_waits_keeps_no_other_model(tmp_path: Path):
    bench = TeamBench(tmp_path)
    stopped = Selection(model="arm", active=Choice(version=1, variant="cpu"))
    waits = UpdateState(model="arm", phase=Phase.WAITING, waiting_for="window", target=2, stopped=stopped)
    bench.records.states.save(waits)
    bench.records.states.save(UpdateState(model="eye", phase=Phase.WAITING, waiting_for="window", target=3))
    bench.again()
    arm, eye = bench.updaters["arm"], bench.updaters["eye"]
    loading, let_go, stepped = threading.Event(), threading.Event(), threading.Event()

    def load(*_):
        loading.set()
        let_go.wait(20.0)
        raise ServeAway("serve went away", sent=True)

    bench.serve.load = load  # type: ignore[method-assign]
    loads = threading.Thread(target=lambda: arm.step(lambda: False))
    other = threading.Thread(target=lambda: (eye.step(lambda: False), stepped.set()))
    loads.start()
    try:
        assert loading.wait(10.0)
        other.start()
        assert stepped.wait(5.0)
    finally:
        let_go.set()
        loads.join(10.0)
        other.join(10.0)
