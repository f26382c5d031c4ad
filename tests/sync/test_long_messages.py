"""A release may fail with megabytes of text: what the device remembers of it stays small enough to be read again."""

from __future__ import annotations

from pathlib import Path

from agent.contract.reasons import Reason
from agent.contract.reports import Phase
from agent.sync.problems import Problem
from tests.sync.bench import MODEL, Bench


def test_releases_that_fail_with_much_text_are_remembered(tmp_path: Path):
    bench = Bench(tmp_path)
    bench.link_up = True
    bench.install(1)

    def fails(*_):
        raise Problem(Reason.LOAD_FAILED, "n" * 700_000, {"node": "n" * 700_000})

    bench.trial = fails
    for version in (2, 3):
        bench.release(version)
        bench.want(version)
        bench.step()
        bench.until(Phase.QUARANTINED)
    assert [entry.answer.release for entry in bench.records.quarantine.entries(MODEL)] == [2, 3]

    committed = bench.updater.state.committed
    bench.again()

    assert bench.updater.state.phase is Phase.QUARANTINED
    assert bench.updater.state.committed == committed != ()
