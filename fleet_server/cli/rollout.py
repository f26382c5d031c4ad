"""`edge-fleet rollout …` and `rollback`."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from fleet_server.cli import rollout_tables
from fleet_server.cli.command import (
    EXIT_FAILED,
    EXIT_TOO_LATE,
    Command,
    Group,
    connected,
    duration,
    reports_errors,
    segment,
    show,
    with_json,
    with_plan,
    with_scope,
)
from fleet_server.errors import FleetError, Unavailable

if TYPE_CHECKING:
    from fleet_server.client import Client

WATCH_S = 1.0
AWAY_S = 60.0
MOST_RATE = 1_000_000.0
OVER = frozenset({"completed", "superseded", "aborted"})


@click.group(cls=Group)
def rollout() -> None:
    """Staged changes of what the fleet runs."""


def _per_minute(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | None:
    """`60/min` → 60.0.  Raises: click.BadParameter."""
    if value is None:
        return None
    number, _, unit = value.partition("/")
    try:
        found = float(number) * {"min": 1.0, "h": 1 / 60, "s": 60.0}[unit]
    except (ValueError, KeyError):
        found = 0.0
    if not 0 < found <= MOST_RATE:
        raise click.BadParameter(f"{value!r} is not a rate; write for example 60/min, 500/h or 2/s")
    return found


def _with_reach(command: Callable[..., None]) -> Callable[..., None]:
    """The releases of a rollout and which devices each wave reaches."""
    for one in reversed(
        (
            click.argument("releases", nargs=-1, required=True, metavar="RELEASE..."),
            click.option(
                "--team",
                is_flag=True,
                help="Several releases, of different models: each device switches to all of them at once, or to none.",
            ),
            click.option(
                "--waves",
                help="The waves before everyone, with commas between: so many devices (1), a share of all (5%), or a group: 1,5%,canary,25%.",
            ),
            click.option("--group", "groups", multiple=True, help="First wave: devices in this group. Repeatable."),
            click.option(
                "--percent", type=click.FloatRange(0, 100, min_open=True), help="First wave: this share of the devices."
            ),
        )
    ):
        command = one(command)
    return command


def _reach(
    releases: tuple[str, ...], waves: str | None, groups: tuple[str, ...], percent: float | None, *, team: bool
) -> dict[str, Any]:
    if team != (len(releases) > 1):
        raise click.UsageError("--team goes with two or more releases; rollouts of their own are started one by one")
    first, *others = releases
    return {
        "release": first, "team": others, "waves": waves.split(",") if waves else [], "groups": list(groups), "percent": percent,
    }  # fmt: skip


@rollout.command("plan")
@_with_reach
@with_scope
@with_json
@click.pass_context
@reports_errors
def rollout_plan(
    ctx: click.Context, releases: tuple[str, ...], waves: str | None, groups: tuple[str, ...], percent: float | None,
    scopes: tuple[str, ...], *, team: bool, as_json: bool,
) -> None:  # fmt: skip
    """Shows what a rollout would reach, and what would stand in its way. Begins nothing.

    edge-fleet rollout plan digits:4 --waves 1,5%,canary,25%
    """
    body = _reach(releases, waves, groups, percent, team=team) | {"scope": list(scopes)}
    with connected(ctx) as client:
        show(client.post("/rollouts/plan", body), as_json, rollout_tables.previews)


@rollout.command("start")
@_with_reach
@with_scope
@click.option("--window", help="When devices may switch, in their local time, such as 'mon-fri 22:00-05:00'.")
@click.option(
    "--shadow",
    is_flag=True,
    help="Only try it: devices run it on copies of live requests, say how it did, and install nothing.",
)
@click.option("--confirm", is_flag=True, help="Wait for `rollout promote` between waves.")
@click.option("--at-once", is_flag=True, help="Each wave tells all of its devices in one step, and not a few first.")
@click.option("--start-at", help="When it begins, with its time zone, such as 2026-12-24T02:00+01:00.")
@click.option("--bake", callback=duration, help="For how long a wave must have passed before the next one begins, such as 30m.")
@click.option("--rate", callback=_per_minute, help="How many devices are told in a minute at most, such as 60/min.")
@click.option(
    "--failure-percent",
    type=click.FloatRange(0, 50, min_open=True, max_open=True),
    help="Which part of the devices may refuse it or roll back: it ends when it is surely more [default: rollouts.failure_share in fleet.yaml].",
)
@click.option(
    "--max-failures", type=click.IntRange(0), help="It ends as well when more devices than so many refuse it or roll back."
)
@click.option(
    "--min-percent",
    type=click.FloatRange(0, 100),
    help="Which part of a wave's devices that were there must have committed [default: rollouts.min_share in fleet.yaml].",
)
@click.option(
    "--time-limit",
    callback=duration,
    help="How long a device may take from when it was told, such as 2h [default: rollouts.time_limit_s in fleet.yaml].",
)
@click.option("--retry", is_flag=True, help="Devices that refused the release before try it again.")
@with_json
@click.pass_context
@reports_errors
def rollout_start(
    ctx: click.Context,
    releases: tuple[str, ...],
    waves: str | None,
    groups: tuple[str, ...],
    percent: float | None,
    scopes: tuple[str, ...],
    window: str | None,
    start_at: str | None,
    bake: float | None,
    rate: float | None,
    failure_percent: float | None,
    max_failures: int | None,
    min_percent: float | None,
    time_limit: float | None,
    *,
    team: bool,
    shadow: bool,
    confirm: bool,
    at_once: bool,
    retry: bool,
    as_json: bool,
) -> None:
    """Begins a rollout: the waves that you name, then everyone. Each wave reaches one device at least. It tells a few devices first, more as
    they answer, and the rest when it is sure that few fail.

    edge-fleet rollout start digits:4 --waves 1,5%,25%
    edge-fleet rollout start digits:4 --group canary --confirm
    edge-fleet rollout start digits:4 --percent 10 --max-failures 1
    edge-fleet rollout start digits:4 --waves 1,5% --bake 2h --rate 60/min --start-at 2026-12-24T02:00+01:00
    edge-fleet rollout start digits:4 --scope label:site=berlin --scope group:kiosk --waves 1,25%
    edge-fleet rollout start digits:4 --shadow --group canary
    edge-fleet rollout start detector:7 classifier:3 --team --window 'sat,sun 02:00-05:00'
    """
    body = _reach(releases, waves, groups, percent, team=team) | {
        "window": window, "confirm": confirm, "max_failures": max_failures, "mode": "shadow" if shadow else "install",
        "min_share": None if min_percent is None else min_percent / 100, "time_limit_s": time_limit, "at_once": at_once,
        "failure_share": None if failure_percent is None else failure_percent / 100, "bake_s": bake, "rate": rate, "starts": start_at,
        "retry": retry, "scope": list(scopes),
    }  # fmt: skip
    with connected(ctx) as client:
        show(client.post("/rollouts", body), as_json, rollout_tables.rollout)


@rollout.command("show")
@click.argument("rollout_id", required=False)
@click.option("--watch", is_flag=True, help="Follow it until it is over. Exit status 1 when it is aborted or superseded.")
@click.option(
    "--timeout",
    callback=duration,
    help="With --watch: how long at most, such as 30m. Exit status 4 when it is not over by then.",
)
@with_json
@click.pass_context
@reports_errors
def rollout_show(ctx: click.Context, rollout_id: str | None, *, watch: bool, timeout: float | None, as_json: bool) -> None:
    """Shows one rollout, or without an id the newest one.

    While it is watched, a server that is away for a minute, or for as long as --timeout allows, is waited for.

    edge-fleet rollout show --watch --timeout 30m
    edge-fleet rollout show r3-9f1c --json
    """
    if timeout is not None and not watch:
        raise click.UsageError("--timeout goes with --watch")
    with connected(ctx) as client:
        chosen = rollout_id or newest(client)
        last = None
        for data in again_and_again(client, chosen, timeout) if watch else [client.get(f"/rollouts/{segment(chosen)}")]:
            if data != last:
                show(data, as_json, rollout_tables.rollout)
                last = data
    if watch and (last is None or last["state"] not in OVER):
        click.echo(f"edge-fleet: rollout {chosen} is not over after {timeout:g} s", err=True)
        sys.exit(EXIT_TOO_LATE)
    if watch and last is not None and last["state"] in {"aborted", "superseded"}:
        sys.exit(EXIT_FAILED)


def again_and_again(client: Client, rollout_id: str, timeout_s: float | None) -> Iterator[dict[str, Any]]:
    """The rollout as it is, again and again until it is over or the time is up.

    Raises: ServerRefused; Unavailable when the server is away for longer than AWAY_S and no limit was given.
    """
    end = None if timeout_s is None else time.monotonic() + timeout_s
    heard = time.monotonic()
    while True:
        try:
            data = client.get(f"/rollouts/{segment(rollout_id)}")
        except Unavailable:
            if end is None and time.monotonic() - heard > AWAY_S:
                raise
        else:
            heard = time.monotonic()
            yield data
            if data["state"] in OVER:
                return
        left_s = WATCH_S if end is None else min(WATCH_S, end - time.monotonic())
        if left_s <= 0:
            return
        time.sleep(left_s)


def newest(client: Client) -> str:
    found = client.get("/rollouts", limit=1)
    if not found:
        raise FleetError("there was no rollout yet; begin one with `edge-fleet rollout start MODEL:VERSION`")
    return str(found[0]["id"])


@rollout.command("list")
@click.option("--model", help="Only this model.")
@with_json
@click.pass_context
@reports_errors
def rollout_list(ctx: click.Context, model: str | None, *, as_json: bool) -> None:
    """Lists rollouts, newest first.

    edge-fleet rollout list
    """
    with connected(ctx) as client:
        show(client.get("/rollouts", model=model), as_json, rollout_tables.rollouts)


@rollout.command("devices")
@click.argument("rollout_id")
@click.option(
    "--standing",
    type=click.Choice(rollout_tables.STANDINGS),
    help="Only devices that stand like this to its release; pending: all that have still to answer.",
)
@click.option("--limit", type=click.IntRange(1), help="At most so many [default: all].")
@with_json
@click.pass_context
@reports_errors
def rollout_devices(ctx: click.Context, rollout_id: str, standing: str | None, limit: int | None, *, as_json: bool) -> None:
    """Lists the devices in the scope of a rollout, and how each stands to its release by its last report. Those that were told and then
    deleted, shut out or moved to where the rollout does not go are among them (left).

    edge-fleet rollout devices r3-9f1c --standing rolled_back
    edge-fleet rollout devices r3-9f1c --standing pending
    """
    with connected(ctx) as client:
        show(list(itertools.islice(_all_of(client, rollout_id, standing), limit)), as_json, rollout_tables.standings)


def _all_of(client: Client, rollout_id: str, standing: str | None) -> Iterator[Any]:
    after: str | None = ""
    while after is not None:
        page = client.get(f"/rollouts/{segment(rollout_id)}/devices", standing=standing, limit=1000, after=after or None)
        yield from page["devices"]
        after = page["next"]


def _rollout_verb(verb: str, text: str) -> None:
    @rollout.command(verb, help=f"{text}\n\nedge-fleet rollout {verb} r3-9f1c")
    @click.argument("rollout_id")
    @with_json
    @click.pass_context
    @reports_errors
    def command(ctx: click.Context, rollout_id: str, *, as_json: bool) -> None:
        with connected(ctx) as client:
            show(client.post(f"/rollouts/{segment(rollout_id)}/{verb}"), as_json, rollout_tables.rollout)


_rollout_verb("approve", "Lets a rollout begin that another person started (rollouts.approval in fleet.yaml).")


@rollout.command("promote")
@click.argument("rollout_id")
@with_plan
@with_json
@click.pass_context
@reports_errors
def rollout_promote(ctx: click.Context, rollout_id: str, *, plan: bool, as_json: bool) -> None:
    """Confirms that the next wave of a rollout begins.

    edge-fleet rollout promote r3-9f1c --plan
    edge-fleet rollout promote r3-9f1c
    """
    where = f"/rollouts/{segment(rollout_id)}/promote"
    with connected(ctx) as client:
        if plan:
            show(client.post(f"{where}/plan"), as_json, rollout_tables.change)
        else:
            show(client.post(where), as_json, rollout_tables.rollout)


_rollout_verb("pause", "Begins no further wave; devices already reached go on.")
_rollout_verb("resume", "Lets a paused rollout go on.")
_rollout_verb("abort", "Ends a rollout; every device goes back to the release before.")


def _of_a_device(verb: str, text: str) -> None:
    @rollout.command(verb, help=f"{text}\n\nedge-fleet rollout {verb} r3-9f1c crane-7")
    @click.argument("rollout_id")
    @click.argument("device")
    @with_json
    @click.pass_context
    @reports_errors
    def command(ctx: click.Context, rollout_id: str, device: str, *, as_json: bool) -> None:
        where = f"/rollouts/{segment(rollout_id)}/devices/{segment(device)}/skip"
        with connected(ctx) as client:
            show(client.post(where) if verb == "skip" else client.delete(where), as_json, rollout_tables.rollout)


_of_a_device(
    "skip",
    "Takes a device out of a rollout's count: no wave waits for it, whatever it answers. It is told to run the release all the same.",
)
_of_a_device("unskip", "Lets a device that was skipped count again.")


@click.command(cls=Command)
@click.argument("model")
@click.option("--to", "version", type=click.IntRange(1), help="The version to go back to [default: the one before].")
@click.option("--forward", is_flag=True, help="With --to: it may be newer than what runs, if every device had it before.")
@with_scope
@with_plan
@with_json
@click.pass_context
@reports_errors
def rollback(
    ctx: click.Context, model: str, version: int | None, scopes: tuple[str, ...], *, forward: bool, plan: bool, as_json: bool
) -> None:
    """Takes every device back to an earlier release at once. It never goes to a newer one unless you say so.

    edge-fleet rollback digits --plan
    edge-fleet rollback digits
    edge-fleet rollback digits --to 2
    edge-fleet rollback digits --to 4 --forward
    edge-fleet rollback digits --scope group:kiosk
    """
    if forward and version is None:
        raise click.UsageError("--forward goes with --to: which release is it?")
    where, body = f"/models/{segment(model)}/rollback", {"to": version, "forward": forward, "scope": list(scopes)}
    with connected(ctx) as client:
        if plan:
            show(client.post(f"{where}/plan", body), as_json, rollout_tables.change)
            return
        done = client.post(where, body)
    show(done, as_json, lambda data: click.echo(f"{data['model']} goes from version {data['left']} to {data['release']}"))
