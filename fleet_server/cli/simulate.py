"""`edge-fleet simulate`: a rollout rehearsed with simulated devices."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fleet_server.cli.command import EXIT_FAILED, EXIT_TOO_LATE, Command, agreed, duration, reports_errors
from fleet_server.errors import Invalid

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from fleet_server.simulation.orders import Wish
    from fleet_server.simulation.report import Report

DEVICES = 100
STDOUT = Path("-")


def _share(_ctx: click.Context, _param: click.Parameter, value: str) -> float:
    """`5%` → 0.05.  Raises: click.BadParameter."""
    try:
        found = float(value.removesuffix("%")) / 100
    except ValueError:
        found = -1.0
    if not value.endswith("%") or not 0 <= found <= 1:
        raise click.BadParameter(f"{value!r} is not a share; write for example 1% or 100%")
    return found


@click.command(cls=Command)
@click.option("--devices", type=click.IntRange(1, 100_000), help=f"How many devices are made up [default: {DEVICES}].")
@click.option(
    "--inventory",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Instead of made-up devices those that `edge-fleet device list --json` printed: their groups, hardware, and what they run.",
)
@click.option(
    "--release", metavar="MODEL:VERSION", help="What is brought out [default: a next version of what most devices run]."
)
@click.option(
    "--waves", default="10%,100%", show_default=True, help="Shares of the devices, or a group: 10%,100% or canary,100%."
)
@click.option(
    "--failure-percent",
    type=click.FloatRange(0, 50, min_open=True, max_open=True),
    default=3.0,
    show_default=True,
    help="Which part of the devices may refuse it or roll back.",
)
@click.option("--max-failures", type=click.IntRange(0), help="And how many at most.")
@click.option("--at-once", is_flag=True, help="Each wave tells all of its devices in one step.")
@click.option(
    "--behave",
    multiple=True,
    metavar="BEHAVIOUR=SHARE",
    help="Devices that misbehave, a share (3%) or a number: offline, slow, flapping, refusing, rolling-back, silent, wrong-digest, "
    "unsigned, wrong-key, cloned, wrong-clock. Repeatable.",
)
@click.option(
    "--verify", default="1%", show_default=True, callback=_share, help="Share of devices that verify with TUF what they hear."
)
@click.option(
    "--fetch", default="0%", show_default=True, callback=_share, help="Share of devices that fetch the files over HTTPS."
)
@click.option(
    "--speed",
    type=click.FloatRange(0.1, 1000),
    default=10.0,
    show_default=True,
    help="How many times as fast as real devices they fetch, try and watch a release.",
)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="The same seed, the same devices.")
@click.option(
    "--timeout", default="30m", show_default=True, callback=duration, help="How long at most. Exit status 4 beyond that."
)
@click.option(
    "--on-server",
    is_flag=True,
    help="On the running server of your profile, with devices that are enrolled there for it and deleted afterwards.",
)
@click.option("--yes", is_flag=True, help="With --on-server: do not ask.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the report for programs; - prints it.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw the course of the rollout (SVG).",
)
@click.pass_context
@reports_errors
def simulate(
    ctx: click.Context, devices: int | None, inventory: Path | None, release: str | None, waves: str, failure_percent: float,
    max_failures: int | None,
    behave: tuple[str, ...], verify: float, fetch: float, speed: float, seed: int, timeout: float, json_file: Path | None,
    plot: Path | None, *, at_once: bool, on_server: bool, yes: bool,
) -> None:  # fmt: skip
    """Rehearses a rollout with simulated devices: real certificates, MQTT, HTTPS and signed reports, but no models.

    They run against a server that is started on this machine for it, and gone afterwards. Exit status 0: the rollout ended as its gates
    say and every device that does nothing wrong is where it should be; 1: it did not; 4: the time ran out.

    edge-fleet simulate --devices 300 --behave refusing=3%
    edge-fleet simulate --devices 300 --behave offline=5% --behave rolling-back=2% --plot rollout.svg

    edge-fleet device list --json > inventory.json
    edge-fleet simulate --inventory inventory.json --waves canary,100%

    edge-fleet simulate --devices 20 --on-server --release digits:4
    """
    from agent.contract.names import ReleaseRef
    from fleet_server.simulation import behaviours, expected
    from fleet_server.simulation.orders import Wish
    from fleet_server.simulation.pace import Realism

    if devices is not None and inventory is not None:
        raise click.UsageError("--devices makes devices up, --inventory names real ones; give one of them")
    if on_server and (inventory is not None or release is None):
        raise click.UsageError("--on-server goes with --release, one that was published there, and with made-up devices")
    wish = Wish(
        release=ReleaseRef.parse(release) if release is not None else None,
        plan=expected.Plan(expected.stages(waves), max_failures, failure_percent / 100, at_once=at_once),
        shares=tuple(behaviours.parse(text) for text in behave),
        realism=Realism(verify=verify, fetch=fetch, speed=speed), seed=seed, timeout_s=timeout,
    )  # fmt: skip
    for file in (json_file, plot):
        _refuse_unwritable(file)
    with _ends_in_order(), _bars(quiet=json_file == STDOUT) as bars:
        found = (
            _on_server(ctx, devices or DEVICES, wish, _Shown(bars), yes=yes)
            if on_server
            else _on_its_own(devices or DEVICES, inventory, wish, _Shown(bars))
        )
    _tell(found, json_file, plot)
    if not found.as_expected:
        sys.exit(EXIT_TOO_LATE if found.late else EXIT_FAILED)


def _on_its_own(devices: int, inventory: Path | None, wish: Wish, shown: _Shown) -> Report:
    from fleet_server.simulation import members, orders, rehearsal

    if inventory is None:
        return rehearsal.rehearse(orders.of_made_up(devices, wish), shown)
    if inventory.stat().st_size > members.MAX_INVENTORY_BYTES:
        raise Invalid(f"{inventory} is larger than the {members.MAX_INVENTORY_BYTES >> 20} MiB that are read")
    return rehearsal.rehearse(orders.of_inventory(inventory.read_bytes(), wish), shown)


def _on_server(ctx: click.Context, devices: int, wish: Wish, shown: _Shown, *, yes: bool) -> Report:
    from fleet_server.client import Profile
    from fleet_server.simulation import orders, rehearsal

    profile = Profile.chosen(ctx.find_root().params["profile"])
    agreed(
        f"Enrol {devices} simulated devices at {profile.url}, start a rollout of {wish.release} that reaches them alone, and delete them "
        "afterwards? Nobody may start another rollout of that model meanwhile.",
        yes=yes,
    )
    return rehearsal.rehearse_on(orders.on_a_server(devices, wish), profile, shown)


def _tell(found: Report, json_file: Path | None, plot: Path | None) -> None:
    from fleet_server.simulation import plot as plots
    from fleet_server.simulation import report

    if json_file == STDOUT:
        click.echo(json.dumps(found.to_builtins(), indent=2))
    else:
        click.echo("\n".join(report.lines(found)))
        if json_file is not None:
            json_file.write_text(json.dumps(found.to_builtins(), indent=2) + "\n")
    if plot is not None:
        plot.write_text(plots.svg(found))


def _refuse_unwritable(file: Path | None) -> None:
    """Said before the rehearsal, not after it.  Raises: OSError."""
    if file is not None and file != STDOUT:
        with file.open("a"):
            pass


@contextlib.contextmanager
def _ends_in_order() -> Iterator[None]:
    """SIGTERM ends a rehearsal as Ctrl-C does: nothing stays behind."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Shown:
    """A bar for each part of a rehearsal."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def show(self, what: str, done: int, total: int, /) -> None:
        task = self._tasks.get(what)
        if task is None:
            task = self._tasks[what] = self._bars.add_task(what)
        self._bars.update(task, completed=done, total=total)


def _bars(*, quiet: bool) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True)
