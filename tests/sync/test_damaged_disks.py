"""Damaged records and files, and a disk that is full for a while."""

from __future__ import annotations

import errno
import os

import pytest

from agent.contract.reports import Phase
from tests.sync.bench import MODEL, Bench, numbers
from tests.sync.stories import selected

P = Phase
FULL_IN = [P.STEADY, P.FETCHING, P.TRIALING, P.ACTIVATING, P.WATCHING, P.ROLLING_BACK]


def test_a_release_that_was_damaged_on_disk_is_fetched_again(on_one: Bench):
    manifest = on_one.signed[next(iter(on_one.signed))].manifest
    path = on_one.store.file(manifest, "model.script")
    path.write_bytes(b"rotten")
    on_one.serve.loaded.clear()
    on_one.serve.active.clear()
    on_one.want(1)
    on_one.step()
    on_one.until(P.STEADY)

    assert on_one.serving == 1
    assert on_one.store.release(MODEL, selected(on_one).active)


def test_a_damaged_state_is_put_aside_and_serving_is_not_touched(on_one: Bench):
    path = on_one.store.private / "updates" / f"{MODEL}.json"
    path.write_bytes(b"\0" * 100)
    on_one.again()
    on_one.want(1)
    on_one.step()

    assert on_one.serving == 1
    assert on_one.phase is P.STEADY
    assert path.with_name(f"{MODEL}.json.damaged").exists()


@pytest.mark.parametrize("serve_knows", [True, False])
def test_a_damaged_selection_is_mended(serve_knows, on_one: Bench):
    path = on_one.store.root / "models" / f"{MODEL}.json"
    path.write_bytes(b"")
    if not serve_knows:
        on_one.serve.loaded.clear()
        on_one.serve.active.clear()
    on_one.want(1)
    on_one.step()
    on_one.until(P.STEADY)

    assert on_one.serving == 1
    assert selected(on_one).active.version == 1


@pytest.mark.parametrize("phase", [P.TRIALING, P.ACTIVATING, P.WATCHING])
def test_a_manifest_damaged_on_the_way(phase, on_one: Bench):
    on_one.want(2)
    on_one.step()
    on_one.until(phase)
    (on_one.store.root / "releases" / MODEL / "2.json").write_bytes(b"{}")
    on_one.until(P.STEADY, steps=2000)

    assert on_one.serving == 2
    assert on_one.records.quarantine.entries(MODEL) == ()


@pytest.mark.parametrize("phase", FULL_IN)
def test_a_disk_that_is_full_for_a_while(phase, on_one: Bench, monkeypatch: pytest.MonkeyPatch):
    """Not one byte can be written, in each phase: the old release serves on, and afterwards the update is completed."""
    on_one.want(2)
    if phase is not P.STEADY:
        on_one.step()
    if phase is P.ROLLING_BACK:
        on_one.until(P.WATCHING)
        on_one.serve.numbers[2] = numbers(10, run=90)
    else:
        on_one.until(phase)
    before = on_one.store.selection(MODEL)

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("agent.common.files.replacing", full)
    on_one.clock.pass_(30)
    for _ in range(15):
        on_one.step()
    assert on_one.store.selection(MODEL) == before
    assert on_one.serving == (2 if phase is P.WATCHING else 1), (
        "a bad release is taken away even when that cannot be written down"
    )
    assert "no space left" in (on_one.updater.problem or "")
    monkeypatch.undo()
    on_one.until(P.QUARANTINED if phase is P.ROLLING_BACK else P.STEADY)
    if phase is P.STEADY:
        on_one.step()
        on_one.until(P.STEADY)

    assert on_one.serving == (1 if phase is P.ROLLING_BACK else 2)
    assert on_one.answer.reason == ("error_ratio" if phase is P.ROLLING_BACK else None)
