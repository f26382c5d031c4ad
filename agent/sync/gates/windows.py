"""When a rollout, and when the device's own settings, let a device switch. Pure."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

from agent.contract.assignment import Window, parse_window


def is_open(window: Window | None, local: dt.datetime) -> bool:
    """Whether the device may switch at this local time. A window past midnight belongs to the day it starts on."""
    if window is None:
        return True
    minute = local.hour * 60 + local.minute
    today, yesterday = local.weekday(), (local.weekday() - 1) % 7
    if window.start_minute < window.end_minute:
        return today in window.days and window.start_minute <= minute < window.end_minute
    return (today in window.days and minute >= window.start_minute) or (yesterday in window.days and minute < window.end_minute)


def any_open(windows: Sequence[str], local: dt.datetime) -> bool:
    """Whether one of the windows of agent.yaml is open, or there are none."""
    return not windows or any(is_open(parse_window(window), local) for window in windows)
