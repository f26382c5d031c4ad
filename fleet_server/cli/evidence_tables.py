"""What `rollout evidence` prints, and what `device show` says of a device's health."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fleet_server.cli.tables import ago, console, moment, safe, size, table, words

if TYPE_CHECKING:
    from fleet_server.rollouts.evidence import Difference


def evidence(data: dict[str, Any], differences: Sequence[Difference]) -> None:
    out = console()
    devices = len({one["sample"]["device"] for one in data["samples"]})
    out.print(
        f"[bold]{safe(data['rollout'])}[/bold]  {safe(data['model'])}:{data['release']}, health known of {devices} devices by "
        f"{len(data['samples'])} samples"
    )
    for verdict in data["verdicts"]:
        counted = ", ".join(f"{number} {words(name)}" for name, number in verdict["counts"].items() if number)
        out.print(
            f"\nwave {verdict['wave'] + 1}, {moment(verdict['at'])}: [bold]{verdict['verdict']}[/bold] {safe(verdict['why'])}"
        )
        out.print(f"  standings: {safe(counted or 'no device')}")
        known = (verdict["health"] or {}).get("models", {}).get(data["model"])
        out.print(f"  health: {safe(known['action'] + ': ' + known['why'] if known else 'not judged in this rollout')}")
    known = next((one["health"] for one in reversed(data["verdicts"]) if one["health"]), None)
    if known is not None and data["model"] in known["models"]:
        out.print()
        rows: list[list[object]] = [
            [
                one["test"],
                one["devices"],
                one["worse"],
                _figure(one["figure"]),
                f"{one['confidence']:.2%}",
                "yes" if one["found"] else "no",
            ]
            for one in known["models"][data["model"]]["findings"]
        ]
        table("TEST|DEVICES|WORSE|FIGURE|CONFIDENCE|FOUND", rows, "no test is made")
    for one in differences:
        out.print(
            f"[bold red]verdict {one.seq} comes out otherwise[/bold red]: recorded {safe(one.recorded)}; again {safe(one.again)}"
        )
    if not differences:
        out.print(f"\njudged again, {'all' if data['verdicts'] else 'no'} verdicts come out the same")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def telemetry(view: dict[str, Any] | None) -> None:
    """What a device told last of how its models do."""
    out = console()
    if view is None:
        out.print("\nhealth  never told (an older agent, or telemetry is switched off)")
        return
    told, machine = view["told"], view["told"]["machine"]
    out.print(f"\nhealth  of {told['seconds']:.0f} s, told {ago(view['received'])}{_machine(machine) if machine else ''}")
    for one in told["figures"]:
        name, figures = f"{one['model']}:{one['release']}", one["figures"]
        failed = {why: figures.get(why, 0) for why in ("invalid", "run", "unavailable")}
        said = ", ".join(f"{number} {why}" for why, number in failed.items() if number)
        median = view["medians_ms"].get(name)
        out.print(
            f"  {safe(name)}  {figures.get('ok', 0)} answered{f', median {median:.3g} ms' if median is not None else ''}, "
            f"{f'failed: {said}' if said else 'none failed'}"
        )
        if figures.get("rows"):
            best = sorted(figures.get("classes", {}).items(), key=lambda item: -item[1])[:5]
            mix = ", ".join(f"{key} {number / sum(figures['classes'].values()):.0%}" for key, number in best)
            out.print(
                f"    {figures['rows']} rows looked at, {figures.get('unusable', 0)} of them no numbers{f'; classes {mix}' if mix else ''}"
            )


def _machine(machine: dict[str, Any]) -> str:
    heat = f", {machine['celsius']:.0f} °C" if machine.get("celsius") is not None else ""
    slowed = ", slowed down for heat" if machine.get("throttled") else ""
    free = f", {size(machine.get('memory_free_bytes', 0))} of {size(machine.get('memory_bytes', 0))} memory free"
    return f"{free}, load {machine.get('load', 0):g}{heat}{slowed}"


def series(found: list[dict[str, Any]]) -> None:
    """Figures of a device by time."""
    rows: list[list[object]] = [
        [
            moment(one["start"]), f"{one['model']}:{one['release']}", one["requests"], one["errors"],
            f"{one['median_ms']:.3g} ms" if one["median_ms"] is not None else "-", one["figures"].get("rows", 0), one["figures"].get("unusable", 0),
        ]
        for one in found
    ]  # fmt: skip
    table("FROM|RELEASE|REQUESTS|ERRORS|MEDIAN|ROWS SEEN|NO NUMBERS", rows, "nothing was told of that time")
