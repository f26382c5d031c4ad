"""Where log lines go: standard error, with the time unless the journal writes it."""

from __future__ import annotations

import logging
import os
import sys

CHATTY = ("tuf", "urllib3", "securesystemslib")


def set_up(level: int) -> None:
    """Once per process, before anything is logged."""
    by_journal = "JOURNAL_STREAM" in os.environ  # systemd sets it when standard error is the journal
    line = "%(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=level, format=line if by_journal else f"%(asctime)s {line}", stream=sys.stderr)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
