"""Bars on stderr for what takes a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fleet_server.cli.tables import safe

if TYPE_CHECKING:
    from rich.progress import Progress


def bars(*, quiet: bool) -> Progress:
    """Bars for files, with their sizes and speeds; nothing is shown when `quiet`."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True)


@contextlib.contextmanager
def bar(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar for as long as the block lasts. It is called with the bytes done and all of them."""
    with bars(quiet=quiet) as shown:
        task = shown.add_task(safe(what), total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
