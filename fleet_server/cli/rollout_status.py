"""`edge-fleet rollout status`: a rollout as it goes on, with a bar for each wave."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from fleet_server.cli import rollout, rollout_tables
from fleet_server.cli.command import (
    EXIT_ASKS,
    EXIT_FAILED,
    EXIT_TOO_LATE,
    Command,
    connected,
    duration,
    reports_errors,
)
from fleet_server.cli.tables import console, safe, words

if TYPE_CHECKING:
    from collections.abc import Iterator

BAR = 24
NAMED = 5
"""Devices that are named of those that are waited for."""

WAITED_FOR = frozenset({*rollout_tables.TO_ANSWER, "pending", "failed"})

ASKS = {
    "proposed": "edge-fleet rollout approve {id}",
    "waiting": "edge-fleet rollout promote {id}",
    "paused": "edge-fleet rollout resume {id}",
}
"""State → what a person says to let the rollout go on."""


@click.command(cls=Command)
@click.argument("rollout_id", required=False)
@click.option("--timeout", callback=duration, help="For how long at most, such as 30m.")
@click.option("--unattended", is_flag=True, help="End, with exit status 5, as soon as a person must decide.")
@click.pass_context
@reports_errors
def status(ctx: click.Context, rollout_id: str | None, timeout: float | None, *, unattended: bool) -> None:
    """Follows a rollout until it is over, or without an id the newest one: a bar for each wave, and who is waited for and why.

    Exit status 0: it completed; 1: it was aborted; 4: it is not over after --timeout; 5: a person must decide, with --unattended.

    edge-fleet rollout status
    edge-fleet rollout status r3-9f1c --timeout 30m --unattended
    """
    last: dict[str, Any] | None = None
    with connected(ctx) as client:
        chosen = rollout_id or rollout.newest(client)
        for last in _shown(rollout.again_and_again(client, chosen, timeout)):
            if unattended and asks(last) is not None:
                break
    if last is None or last["state"] not in rollout.OVER:
        asked = asks(last) if last is not None and unattended else None
        click.echo(f"edge-fleet: rollout {chosen} {asked or f'is not over after {timeout:g} s'}", err=True)
        sys.exit(EXIT_ASKS if asked else EXIT_TOO_LATE)
    if last["state"] == "aborted":
        sys.exit(EXIT_FAILED)


def _shown(found: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each of them, after it was shown: in the place of the last one on a terminal, else what is new of it."""
    out = console()
    if not out.is_terminal:
        before: list[str] = []
        for data in found:
            now = lines(data)
            for line in now:
                if line not in before:
                    out.print(safe(line))
            before = now
            yield data
        return
    from rich.live import Live

    with Live(console=out, auto_refresh=False) as live:
        for data in found:
            live.update("\n".join(safe(line) for line in lines(data)), refresh=True)
            yield data


def asks(r: dict[str, Any]) -> str | None:
    """What a person must decide, in words; None when the rollout goes on, or is over, without one."""
    if r["state"] in ASKS:
        return f"is {r['state']}: {ASKS[r['state']].format(id=r['id'])}"
    if r["state"] == "running" and r["verdict"] and r["verdict"]["verdict"] == "stall":
        return f"cannot go on by itself: {r['verdict']['why']}"
    return None


def lines(r: dict[str, Any]) -> list[str]:
    """The rollout in words."""
    before = f"{r['model']}:{r['previous']}" if r["previous"] else "nothing"
    found = [f"{r['id']}  {r['model']}:{r['release']} after {before}  {r['state']} {r['reason']}".rstrip()]
    counts = r["verdict"]["counts"] if r["verdict"] else {}
    answered = sum(number for name, number in counts.items() if name not in rollout_tables.NOT_ANSWERED)
    reached = 0
    for number, wave in enumerate(r["waves"]):
        size, past = max(0, wave["devices"] - reached), number < r["wave"] or r["state"] == "completed"
        done = size if past else min(size, max(0, answered - reached)) if number == r["wave"] else 0
        found.append(f"  wave {number + 1}  {bar(done, size)}  {done} of {size}  {rollout_tables.reach(wave)}")
        reached = max(reached, wave["devices"])
    if r["state"] in rollout.OVER:
        return found
    said = ", ".join(f"{number} {words(name)}" for name, number in counts.items() if number)
    if r["reach"] < rollout_tables.EVERYONE and r["state"] == "running":
        said += f"{'; ' if said else ''}more are told as these answer"
    found += [f"  {said}"] if said else []
    waited = [one["device"] for one in (r["verdict"] or {"evidence": []})["evidence"] if one["standing"] in WAITED_FOR]
    if waited:
        more = sum(counts.get(name, 0) for name in WAITED_FOR) - len(waited[:NAMED])
        found.append(f"  waits for {', '.join(waited[:NAMED])}{f' and {more} more' if more > 0 else ''}")
    if r["waits_for"]:
        found.append(f"  waits: {r['waits_for']}")
    if (asked := asks(r)) is not None:
        found.append(f"  {asked}")
    return found


def bar(done: int, size: int) -> str:
    """How much of a wave answered. A wave of nobody is done."""
    full = BAR if not size else BAR * done // size
    return f"[{'#' * full}{'.' * (BAR - full)}]"
