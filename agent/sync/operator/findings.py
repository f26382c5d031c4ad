"""What one check of `edge-agent doctor` found."""

from __future__ import annotations

from typing import Literal

import msgspec

Level = Literal["ok", "warning", "failed", "skipped"]


class Finding(msgspec.Struct, frozen=True):
    """One check. `advice` says what to do about it; empty when all is well."""

    name: str
    level: Level
    message: str
    advice: str = ""
