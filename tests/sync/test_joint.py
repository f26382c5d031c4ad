"""One model that waits for `serve` keeps no other from going back."""

from __future__ import annotations

import threading
from pathlib import Path

from agent.contract.reports import Phase
from agent.store import Choice, Selection
from agent.sync.serving import ServeAway
from tests.sync.crew import Crew


def test_a_lease_that_is_renewed_while_a_release_waits_keeps_no_other_model(tmp_path: Path):
    crew = Crew(tmp_path)
    arm, eye = crew.updaters["arm"], crew.updaters["eye"]
    stopped = Selection(model="arm", active=Choice(version=1, variant="cpu"))
    arm.state = arm.state.but(phase=Phase.WAITING, waiting_for="window", target=2, stopped=stopped)
    loading, let_go, saved = threading.Event(), threading.Event(), threading.Event()

    def load(*_):
        loading.set()
        let_go.wait(20.0)
        raise ServeAway("serve went away", sent=True)

    crew.serve.load = load  # type: ignore[method-assign]
    waits = threading.Thread(target=lambda: arm.step(lambda: False))
    goes_back = threading.Thread(target=lambda: (eye._apply_all([(eye, eye.state)]), saved.set()))
    waits.start()
    try:
        assert loading.wait(10.0)
        goes_back.start()
        assert saved.wait(5.0)
    finally:
        let_go.set()
        waits.join(10.0)
        goes_back.join(10.0)
