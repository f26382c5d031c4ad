"""What the watcher of the demo sees: a live picture on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text


@dataclass
class Step:
    """One step of the story. `expected` is told beforehand, `seen` afterwards."""

    title: str
    expected: str
    seen: str = ""
    seconds: float | None = None
    ok: bool | None = None


@dataclass
class DeviceRow:
    """One line of the device table."""

    name: str
    serving: str = "–"
    phase: str = "–"
    online: bool = False
    rate: float = 0.0
    requests: int = 0
    failed: int = 0
    note: str = ""


@dataclass
class Picture:
    """Everything on the screen."""

    steps: list[Step]
    devices: list[DeviceRow]
    dashboard: str = ""
    lines: deque[Text] = field(default_factory=lambda: deque(maxlen=9))


PHASE_STYLE = {
    "steady": "green",
    "fetching": "cyan",
    "trialing": "cyan",
    "activating": "yellow",
    "watching": "yellow",
    "rolling_back": "red",
    "quarantined": "red",
}


class Screen:
    """Draws the picture; `say` adds a line below it (or prints it, without a terminal)."""

    def __init__(self, steps: list[Step], devices: list[str], *, plain: bool) -> None:
        self.console = Console(highlight=False)
        self.live_wanted = self.console.is_terminal and not plain
        self.picture = Picture(steps, [DeviceRow(name) for name in devices])
        self.started = time.monotonic()
        self._live: Live | None = None
        self._spinner = Spinner("dots", style="cyan")

    def __enter__(self) -> Screen:  # noqa: PYI034 - typing.Self came with Python 3.11
        if self.live_wanted:
            self._live = Live(get_renderable=self._draw, console=self.console, refresh_per_second=8, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """The live picture goes; what is printed from now on stays."""
        if self._live:
            self._live.stop()
            self._live = None

    def say(self, message: str, *, style: str = "") -> None:
        text = Text.assemble((f"{time.monotonic() - self.started:6.1f} s  ", "dim"), (message, style))
        self.picture.lines.append(text)
        if not self.live_wanted:
            self.console.print(text, soft_wrap=True)

    def device(self, name: str) -> DeviceRow:
        return next(row for row in self.picture.devices if row.name == name)

    def summary(self) -> Table:
        """The table at the end: step, expected, seen, time."""
        table = Table(title="What was told, and what was seen", title_style="bold", show_lines=True, expand=True)
        table.add_column("", width=1)
        table.add_column("step", ratio=3)
        table.add_column("expected", ratio=4)
        table.add_column("seen", ratio=5)
        table.add_column("time", justify="right", width=7)
        for step in self.picture.steps:
            mark = {True: "[green]✓", False: "[red]✗", None: "[dim]·"}[step.ok]
            seconds = "" if step.seconds is None else f"{step.seconds:.1f} s"
            table.add_row(mark, step.title, step.expected, Text(step.seen, style="red" if step.ok is False else ""), seconds)
        return table

    def _draw(self) -> Group:
        steps = Table.grid(padding=(0, 1))
        for step in self.picture.steps:
            if step.ok is None and step.seconds is None:
                steps.add_row(Text("·", style="dim"), Text(step.title, style="dim"), "")
            elif step.ok is None:
                steps.add_row(self._spinner, Text(step.title, style="bold cyan"), Text(step.expected, style="dim"))
            else:
                mark = Text("✓", style="green") if step.ok else Text("✗", style="bold red")
                steps.add_row(mark, Text(step.title), Text(step.seen, style="dim" if step.ok else "red"))
        title = "edge inference agent: the whole story on one machine"
        parts = [Panel(steps, title=title, border_style="cyan"), self._devices(), Padding(Group(*self.picture.lines), (0, 1))]
        if self.picture.dashboard:
            parts.append(Padding(Text(f"dashboard: {self.picture.dashboard}", style="dim"), (0, 1)))
        return Group(*parts)

    def _devices(self) -> Table:
        table = Table(expand=True, border_style="dim")
        for heading, justify in (("device", "left"), ("serves", "left"), ("phase", "left"), ("fleet link", "left")):
            table.add_column(heading, justify=justify)  # type: ignore[arg-type]
        for heading in ("predictions", "per second", "failed"):
            table.add_column(heading, justify="right")
        table.add_column("last answer", ratio=1, no_wrap=True)
        for row in self.picture.devices:
            table.add_row(
                row.name,
                Text(row.serving, style="bold"),
                Text(row.phase, style=PHASE_STYLE.get(row.phase, "dim")),
                Text("● online", style="green") if row.online else Text("○ offline", style="dim"),
                f"{row.requests:,}",
                f"{row.rate:,.0f}",
                Text(f"{row.failed:,}", style="bold red" if row.failed else "green"),
                Text(row.note, style="dim"),
            )
        return table
