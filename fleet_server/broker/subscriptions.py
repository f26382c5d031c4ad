"""Counts what devices subscribe to that does not exist, because mosquitto 2.0 grants every subscription, keeps each in memory, and
has no limit for them. It says each in its log.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable

from fleet_server.broker import rules
from fleet_server.devices import pki

ALLOWED = 32
"""Of one device. Ours subscribe to what exists; somebody who tries things out by hand may."""

_LINE = re.compile(r"(\S+) [012] (.+)")
"""As mosquitto's log has it: the client, the quality of service, the filter."""


class SubscriptionWatch:
    """For one thread."""

    def __init__(self, on_too_many: Callable[[str], None]) -> None:
        """`on_too_many` is told of a device, and again as often as it goes on."""
        self._on_too_many = on_too_many
        self._strange: collections.Counter[str] = collections.Counter()

    def read(self, line: str) -> bool:
        """Whether the line of the broker's log tells of a subscription."""
        found = _LINE.fullmatch(line)
        if found is None:
            return False
        client, wanted = found.groups()
        if client != pki.SERVER_CN and wanted not in rules.filters(client):
            self._strange[client] += 1
            if self._strange[client] > ALLOWED:
                del self._strange[client]
                self._on_too_many(client)
        return True
