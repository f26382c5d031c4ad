"""Benchmarks measure again what the host of a virtual machine disturbed, and only that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import calm
from benchmarks.calm import LIMIT, TRIES, Calm, Watch


def host_that_takes(*shares: float) -> Callable[[], Callable[[], float]]:
    """A host that takes the first share during the first measurement, and so on."""
    remaining = iter(shares)
    return lambda: lambda: next(remaining)


def counted() -> Callable[[], int]:
    seen = iter(range(100))
    return lambda: next(seen)


def test_what_was_not_disturbed_is_taken_as_it_is() -> None:
    run = Calm(stolen=host_that_takes(LIMIT))
    assert run(counted()) == 0
    assert (run.measurements, run.repeated, run.disturbed) == (1, 0, 0)


def test_what_was_disturbed_is_measured_again_until_it_was_not() -> None:
    run = Calm(stolen=host_that_takes(0.2, 0.1, 0.0))
    assert run(counted()) == 2
    assert (run.measurements, run.repeated, run.disturbed) == (1, 2, 0)


def test_of_disturbed_ones_the_least_disturbed_is_taken_and_counted() -> None:
    run = Calm(stolen=host_that_takes(0.2, 0.05, 0.3, 0.1, 0.2))
    assert TRIES == 5
    assert run(counted()) == 1
    assert (run.measurements, run.repeated, run.disturbed) == (1, 4, 1)
    assert "1 remain" in str(run)


def test_patience_ends_for_all_measurements_together() -> None:
    run = Calm(patience_s=0, stolen=host_that_takes(0.2, 0.3))
    assert [run(counted()), run(counted())] == [0, 0]
    assert (run.measurements, run.repeated, run.disturbed) == (2, 0, 2)


def test_the_share_is_that_of_all_processors_since_the_watch_began(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    monkeypatch.setattr(calm, "STAT", stat)
    stat.write_text("cpu  100 0 50 800 0 0 0 50 7 0\ncpu0 1 2 3\n")
    watch = Watch()
    stat.write_text("cpu  140 0 60 840 0 0 0 60 9 0\ncpu0 1 2 3\n")
    assert watch.stolen() == pytest.approx(10 / 100)


@pytest.mark.parametrize("text", ["", "cpu\n", "cpu one two\n", "intr 1\n"])
def test_a_kernel_that_does_not_tell_disturbs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    monkeypatch.setattr(calm, "STAT", tmp_path / "stat")
    (tmp_path / "stat").write_text(text)
    assert Watch().stolen() == 0
