"""The hours in which a device may switch."""

from __future__ import annotations

import datetime as dt

import pytest

from agent.contract.assignment import Window
from agent.sync.gates.windows import is_open

NIGHT = Window(start_minute=22 * 60, end_minute=4 * 60, days=(4,))  # Friday night


@pytest.mark.parametrize(
    ("when", "is_it"),
    [("2026-11-20 21:59", False), ("2026-11-20 22:00", True), ("2026-11-21 03:59", True), ("2026-11-21 04:00", False),
     ("2026-11-21 23:00", False), ("2026-11-20 02:00", False)],
)  # fmt: skip
def test_a_window_past_midnight(when, is_it):
    assert is_open(NIGHT, dt.datetime.fromisoformat(when)) is is_it


def test_no_window_is_always_open():
    assert is_open(None, dt.datetime.fromisoformat("2026-01-01"))
