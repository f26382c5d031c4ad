"""What the commands about rollouts print."""

from __future__ import annotations

from typing import Any

from fleet_server.cli.tables import ago, console, moment, safe, size, table, words

EVERYONE = 1000
TO_ANSWER = (
    "told", "fetching", "trialing", "shadowing", "waiting", "canarying", "activating", "watching", "rolling_back",
)  # fmt: skip
"""Standings of devices that are there, were told, and have not answered."""

STANDINGS = (
    "committed", "shadowed", "refused", "failed", "rolled_back", *TO_ANSWER, "timed_out", "lost", "held", "skipped", "offline",
    "not_reached", "left", "pending",
)  # fmt: skip
NOT_ANSWERED = frozenset({*TO_ANSWER, "pending", "failed", "offline", "not_reached", "left"})
MOVED = ("devices", "changing", "online", "serving", "held", "refusing", "unfit", "unknown")
PREVIEWED = ("devices", "online", "serving", "held", "refusing", "unfit", "unknown")


def rollouts(found: list[dict[str, Any]]) -> None:
    rows: list[list[object]] = [
        [
            r["id"], f"{r['model']}:{r['release']}", r["state"], f"{r['wave'] + 1} of {len(r['waves'])}", _counted(r["verdict"]),
            ago(r["updated"]),
        ]
        for r in found
    ]  # fmt: skip
    table("ROLLOUT|RELEASE|STATE|WAVE|DEVICES|CHANGED", rows, "no rollout yet; begin one with `edge-fleet rollout start`")


def _counted(verdict: dict[str, Any] | None) -> str:
    if verdict is None:
        return "-"
    return ", ".join(f"{number} {words(name)}" for name, number in verdict["counts"].items() if number) or "no device"


def previews(found: list[dict[str, Any]]) -> None:
    out = console()
    for one in found:
        out.print(f"[bold]{safe(one['release'])}[/bold]")
        rows: list[list[object]] = [
            [number, wave["reach"], *(wave[name] for name in PREVIEWED), size(wave["fetch_bytes"])]
            for number, wave in enumerate(one["waves"], 1)
        ]
        table("WAVE|ADDS|DEVICES|THERE NOW|SERVE IT|HELD|REFUSE IT|NO VARIANT|UNKNOWN|TO FETCH", rows, "no wave")
        for worry in one["worries"]:
            out.print(f"[yellow]![/yellow] {safe(worry)}")


def change(data: dict[str, Any], *, err: bool = False) -> None:
    """What a change would do. `err`: beside what programs read."""
    out = console(err=err)
    out.print(f"[bold]if done:[/bold] {safe(data['says'])}")
    rows: list[list[object]] = [
        [_goes_to(move), *(move[name] for name in MOVED), size(move["fetch_bytes"])] for move in data["moves"]
    ]
    headings = "TOLD TO RUN|DEVICES|CHANGE|THERE NOW|RUN IT|HELD|REFUSE IT|NO VARIANT|UNKNOWN|TO FETCH"
    table(headings, rows, "no device is told anything else than now", err=err)
    for move in data["moves"]:
        for kind, number in move["unfit_classes"].items():
            out.print(f"[yellow]![/yellow] no variant of {safe(_goes_to(move))} fits {safe(kind)}: {number}")
    for worry in data["worries"]:
        out.print(f"[yellow]![/yellow] {safe(worry)}")


def _goes_to(move: dict[str, Any]) -> str:
    if move["release"] is None:
        return f"no release of {move['model']}"
    return f"{move['model']}:{move['release']}{' on copies of requests' if move['mode'] == 'shadow' else ''}"


def reach(wave: Any) -> str:
    if wave["count"]:
        return "one device" if wave["count"] == 1 else f"{wave['count']} devices"
    if wave["permille"] >= EVERYONE:
        return "everyone"
    return ", ".join([*wave["groups"], *([f"{wave['permille'] / 10:g} %"] if wave["permille"] else [])])


def rollout(r: dict[str, Any]) -> None:
    out = console()
    before = f"{r['model']}:{r['previous']}" if r["previous"] else "nothing"
    out.print(
        f"[bold]{safe(r['id'])}[/bold]  {safe(r['model'])}:{r['release']} after {safe(before)}  [bold]{r['state']}[/bold] {safe(r['reason'])}"
    )
    if r.get("scope"):
        out.print(f"  for {safe(scope(r['scope']))}")
    if r.get("superseded"):
        out.print(f"  took the place of {safe(', '.join(r['superseded']))}")
    if r["mode"] == "shadow":
        out.print("  only tried on copies of live requests: nothing is installed")
    if r["team"]:
        out.print(_team(r))
    if r["window"]:
        out.print(f"  in the window {safe(r['window'])} of each device's local time")
    if r["waits_for"]:
        out.print(f"  waits: {safe(r['waits_for'])}")
    for one in r["exclusions"]:
        out.print(f"  {safe(one['hardware'])} is [bold red]excluded[/bold red]{_ended(one)}: {safe(one['reason'])}")
    for number, wave in enumerate(r["waves"]):
        named = reach(wave)
        mark = "done" if number < r["wave"] or r["state"] == "completed" else "now" if number == r["wave"] else "later"
        out.print(f"  wave {number + 1}: {safe(named)} ({mark})")
    if r["verdict"]:
        out.print(f"  {r['verdict']['verdict']}: {safe(r['verdict']['why'])} ({_counted(r['verdict'])})")
        for witness in r["verdict"]["evidence"]:
            if witness["standing"] in {"refused", "rolled_back", "failed"}:
                out.print(
                    f"    {safe(witness['device'])} {words(witness['standing'])}: {safe(witness['reason'])} {safe(witness['message'])}"
                )
    if refusals := r.get("refusals"):
        causes = ", ".join(f"{number} {cause}" for cause, number in refusals["causes"].items())
        out.print(f"  [bold red]refused after the end[/bold red]: {safe(causes)} ({safe(', '.join(refusals['devices']))})")
    if r["state"] == "waiting":
        out.print(f"  waits for confirmation: edge-fleet rollout promote {safe(r['id'])}")


def scope(conditions: list[dict[str, Any]]) -> str:
    return " and ".join(f"{one['kind']}:{','.join(one['values'])}" for one in conditions) or "everyone"


def rules(found: list[dict[str, Any]]) -> None:
    rows: list[list[object]] = [
        [one["model"], scope(rule["scope"]), rule["release"] or "-", rule["previous"] or "-", rule["rollout"] or "-"]
        for one in found
        for rule in [*one["rules"], {**one, "scope": [], "rollout": None}]
    ]
    table("MODEL|SCOPE|RELEASE|BEFORE|ROLLOUT", rows, "no model has a release yet")


def standings(found: list[dict[str, Any]]) -> None:
    rows: list[list[object]] = [[one["device"], words(one["standing"]), one["reason"] or "-", one["message"]] for one in found]
    table("DEVICE|STANDING|REASON|SAYS", rows, "no device like that")


def _team(r: dict[str, Any]) -> str:
    others = ", ".join(f"{one['model']}:{one['release']}" for one in r["team"])
    return f"  in a team with {safe(others)}: each device switches to all of them or to none"


def _ended(one: dict[str, Any]) -> str:
    if one["ended"] is not None:
        return f" no more (ended by {safe(one['ended_by'])})"
    return f" (to end it: edge-fleet exclusion end {one['id']})"


def exclusions(found: list[dict[str, Any]]) -> None:
    rows: list[list[object]] = [
        [
            one["id"], f"{one['model']}:{one['release']}", one["hardware"], one["count"], one["devices"][0]["reason"] if one["devices"] else "-",
            f"{one['model']}:{one['instead']}" if one["instead"] else "nothing", f"ended by {one['ended_by']}" if one["ended"] else "in force",
            moment(one["at"]),
        ]
        for one in found
    ]  # fmt: skip
    table("ID|RELEASE|HARDWARE|DEVICES|REASON|RUNS INSTEAD|STATE|SINCE", rows, "no hardware class is excluded from a release")
