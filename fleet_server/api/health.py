"""Whether a process is of use now, for balancers and for whoever starts it."""

from __future__ import annotations

import msgspec


class Health(msgspec.Struct, frozen=True):
    """`ready`: requests may be sent here. `why_not`: what is missing; empty when nothing is."""

    ready: bool
    why_not: str
