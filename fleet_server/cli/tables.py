"""What commands print for people: tables and summaries. Everything a device said is shown without its control characters."""

from __future__ import annotations

import datetime as dt
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from agent.contract.manifest import ReleaseManifest
    from fleet_server.setup import Made

WIDTH_WITHOUT_TERMINAL = 1_000_000  # a line stays a line for grep; nothing is padded to it
MARKS = {"ok": "✓", "warning": "!", "failed": "✗"}


def safe(value: object) -> str:
    """Text that can neither move the cursor nor be taken for markup."""
    from rich.markup import escape

    text = "" if value is None else str(value)
    return escape("".join(c if c.isprintable() else "�" for c in text))


PREVIEWED = ("devices", "online", "serving", "held", "refusing", "unfit", "unknown")


def words(code: str) -> str:
    """`rolled_back` as people write it."""
    return code.replace("_", " ")


def ago(at: float | None) -> str:
    if at is None:
        return "never"
    seconds = max(0, int(time.time() - at))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


def moment(at: float) -> str:
    return dt.datetime.fromtimestamp(at, tz=dt.timezone.utc).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=WIDTH_WITHOUT_TERMINAL, highlight=False)


def _table(headings: str, rows: list[list[object]], empty: str) -> None:
    from rich.table import Table

    if not rows:
        _console().print(f"[dim]{empty}[/dim]")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings.split("|"):
        table.add_column(heading)
    for row in rows:
        table.add_row(*(safe(cell) for cell in row))
    _console().print(table)


def devices(found: list[dict[str, Any]]) -> None:
    rows: list[list[object]] = [
        [
            d["id"], _standing(d), ", ".join(d["groups"]) or "-",
            "; ".join(_runs(name, m) for name, m in d["models"].items()) or "-", ago(d["last_seen"]),
        ]
        for d in found
    ]  # fmt: skip
    _table("DEVICE|STATE|GROUPS|RUNS|SEEN", rows, "no device yet; make an enrolment string with `edge-fleet token create`")


def _standing(d: dict[str, Any]) -> str:
    if d["revoked"]:
        return "revoked"
    several = ", several machines" if d.get("shared") else ""
    certificate = {"ended": ", certificate ended", "ends_soon": ", certificate ends soon"}.get(d.get("certificate", ""), "")
    return ("online" if d["online"] else "offline") + several + certificate


def _runs(name: str, model: dict[str, Any]) -> str:
    serving = f"{name}:{model['serving']}" if model["serving"] is not None else f"{name} (nothing)"
    if model["phase"] == "steady":
        return serving
    progress = f" {model['progress']:.0%}" if model.get("progress") is not None else ""
    waits = f" for {model['waiting_for']}" if model["phase"] == "waiting" and model.get("waiting_for") else ""
    return f"{serving} ({words(model['phase'])}{waits}{progress})"


def device(d: dict[str, Any]) -> None:
    console = _console()
    console.print(f"[bold]{safe(d['id'])}[/bold]  {_standing(d)}, seen {ago(d['last_seen'])}")
    console.print(f"groups  {safe(', '.join(d['groups']) or '-')}   record serial {d['record_serial']}")
    console.print(f"agent   {safe(d['agent_version'] or '-')}   {safe(_hardware(d['hardware']))}")
    if d["problem"]:
        console.print(f"problem {safe(d['problem'])}")
    for name, m in d["models"].items():
        console.print(
            f"\n[bold]{safe(name)}[/bold]  serves {m['serving']} ({safe(m['variant'])}), {safe(_phase(m))}, wanted {m['wanted']}"
        )
        if (stage := m.get("stage")) is not None:
            found = ", ".join(f"{words(name)} {value}" for name, value in stage["evidence"].items())
            console.print(
                f"  {stage['name']} of release {stage['release']} {stage['verdict']}: {safe(found or stage['message'])}"
            )
        for answer in m["answers"]:
            why = f": {answer['reason']} {answer['message']}" if answer["reason"] else ""
            console.print(f"  release {answer['release']} {safe(words(answer['outcome']))}{safe(why)} ({moment(answer['at'])})")


def _phase(model: dict[str, Any]) -> str:
    """`waiting for approval`, `watching (passed)`, `stopped: …`."""
    if model.get("stopped"):
        return f"stopped: {model['stopped']}"
    if model["phase"] == "waiting" and model.get("waiting_for"):
        return f"waiting for {model['waiting_for']}"
    return words(model["phase"]) + (" (passed)" if model.get("passed") else "")


def _hardware(hardware: dict[str, Any] | None) -> str:
    if not hardware:
        return "hardware not reported"
    return f"{hardware['arch']} {hardware['machine']}, {hardware['cpus']} CPUs, {size(hardware['memory_bytes'])}"


def _release_state(release: dict[str, Any]) -> str:
    words = [word for word in ("withdrawn", "deleted") if release.get(word)]
    return ", ".join(words) or "published"


def releases(found: list[dict[str, Any]]) -> None:
    rows: list[list[object]] = [
        [
            r["release"], _release_state(r), size(r["size_bytes"]),
            ", ".join(f"{v['name']} ({v['runtime']})" for v in r["variants"]), r["golden_cases"], moment(r["published"]),
        ]
        for r in found
    ]  # fmt: skip
    _table("RELEASE|STATE|SIZE|VARIANTS|GOLDEN|PUBLISHED", rows, "no release yet; publish one with `edge-fleet publish`")


def release(r: dict[str, Any]) -> None:
    console = _console()
    state = _release_state(r) if _release_state(r) == "published" else f"[bold red]{_release_state(r)}[/bold red]"
    console.print(f"[bold]{safe(r['release'])}[/bold]  {state} {moment(r['published'])}, {size(r['size_bytes'])}")
    console.print(f"signed by {safe(', '.join(key[:12] for key in r['signers']))}   manifest sha256 {safe(r['sha256'])}")
    for variant in r["variants"]:
        console.print(f"  variant {safe(variant['name'])}: {safe(variant['runtime'])}, {safe(variant['file'])}")
    console.print(f"  acceptance: {r['golden_cases']} golden cases")
    for name, value in r["provenance"].items():
        if value:
            console.print(f"  {words(name)}: {safe(value)}")


def manifest(m: ReleaseManifest) -> None:
    console = _console()
    console.print(f"[bold]{safe(m.ref)}[/bold]  {len(m.files)} files, {size(m.size_bytes)}")
    for variant in m.variants:
        blocks = sum(len(m.files[name].blocks) for name in variant.files)
        listed = safe(variant.file) + "".join(f" + {safe(name)}" for name in variant.data.values())
        console.print(
            f"  variant {safe(variant.name)}: {safe(variant.runtime)}, {listed}, {size(m.model_bytes(variant))}, {blocks} blocks"
        )
    console.print(f"  acceptance: {len(m.acceptance.golden)} golden cases")


def rollouts(found: list[dict[str, Any]]) -> None:
    rows: list[list[object]] = [
        [
            r["id"], f"{r['model']}:{r['release']}", r["state"], f"{r['wave'] + 1} of {len(r['waves'])}", _counted(r["verdict"]),
            ago(r["updated"]),
        ]
        for r in found
    ]  # fmt: skip
    _table("ROLLOUT|RELEASE|STATE|WAVE|DEVICES|CHANGED", rows, "no rollout yet; begin one with `edge-fleet rollout start`")


def _counted(verdict: dict[str, Any] | None) -> str:
    if verdict is None:
        return "-"
    return ", ".join(f"{number} {words(name)}" for name, number in verdict["counts"].items() if number) or "no device"


def previews(found: list[dict[str, Any]]) -> None:
    console = _console()
    for one in found:
        console.print(f"[bold]{safe(one['release'])}[/bold]")
        rows: list[list[object]] = [
            [number, wave["reach"], *(wave[name] for name in PREVIEWED), size(wave["fetch_bytes"])]
            for number, wave in enumerate(one["waves"], 1)
        ]
        _table("WAVE|ADDS|DEVICES|THERE NOW|SERVE IT|HELD|REFUSE IT|NO VARIANT|UNKNOWN|TO FETCH", rows, "no wave")
        for worry in one["worries"]:
            console.print(f"[yellow]![/yellow] {safe(worry)}")


def _reach(wave: Any) -> str:
    if wave["count"]:
        return "one device" if wave["count"] == 1 else f"{wave['count']} devices"
    if wave["permille"] >= 1000:
        return "everyone"
    return ", ".join([*wave["groups"], *([f"{wave['permille'] / 10:g} %"] if wave["permille"] else [])])


def rollout(r: dict[str, Any]) -> None:
    console = _console()
    before = f"{r['model']}:{r['previous']}" if r["previous"] else "nothing"
    console.print(
        f"[bold]{safe(r['id'])}[/bold]  {safe(r['model'])}:{r['release']} after {safe(before)}  [bold]{r['state']}[/bold] {safe(r['reason'])}"
    )
    if r["mode"] == "shadow":
        console.print("  only tried on copies of live requests: nothing is installed")
    if r["team"]:
        console.print(_team(r))
    if r["window"]:
        console.print(f"  in the window {safe(r['window'])} of each device's local time")
    for one in r["exclusions"]:
        console.print(f"  {safe(one['hardware'])} is [bold red]excluded[/bold red]{_ended(one)}: {safe(one['reason'])}")
    for number, wave in enumerate(r["waves"]):
        reach = _reach(wave)
        mark = "done" if number < r["wave"] or r["state"] == "completed" else "now" if number == r["wave"] else "later"
        console.print(f"  wave {number + 1}: {safe(reach)} ({mark})")
    if r["verdict"]:
        console.print(f"  {r['verdict']['verdict']}: {safe(r['verdict']['why'])} ({_counted(r['verdict'])})")
        for witness in r["verdict"]["evidence"]:
            if witness["standing"] in {"refused", "rolled_back", "failed"}:
                console.print(
                    f"    {safe(witness['device'])} {words(witness['standing'])}: {safe(witness['reason'])} {safe(witness['message'])}"
                )
    if r["state"] == "waiting":
        console.print(f"  waits for confirmation: edge-fleet rollout promote {safe(r['id'])}")


def standings(found: list[dict[str, Any]]) -> None:
    rows: list[list[object]] = [[one["device"], words(one["standing"]), one["reason"] or "-", one["message"]] for one in found]
    _table("DEVICE|STANDING|REASON|SAYS", rows, "no device like that")


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
    _table("ID|RELEASE|HARDWARE|DEVICES|REASON|RUNS INSTEAD|STATE|SINCE", rows, "no hardware class is excluded from a release")


def event_line(e: dict[str, Any]) -> str:
    text = f"{moment(e['received'])}  {e['device'] or 'server':<16} {e['name']:<20} {e['message']}"
    return "".join(c if c.isprintable() else "�" for c in text)


def events(found: list[dict[str, Any]]) -> None:
    if not found:
        click.echo("nothing happened yet")
    for event in found:
        click.echo(event_line(event))


def tokens(found: list[dict[str, Any]]) -> None:
    rows: list[list[object]] = [
        [
            t["id"], "usable" if t["usable"] else "revoked" if t["revoked"] else "used up or expired", t["uses_left"],
            t["device"] or "any", ", ".join(t["groups"]) or "-", moment(t["expires"]), t["created_by"],
        ]
        for t in found
    ]  # fmt: skip
    _table("ID|STATE|USES LEFT|DEVICE|GROUPS|EXPIRES|BY", rows, "no enrolment token; make one with `edge-fleet token create`")


def access_tokens(found: list[dict[str, Any]]) -> None:
    rows: list[list[object]] = [
        [t["id"], t["name"], t["role"], "revoked" if t["revoked"] else "valid", moment(t["created"])] for t in found
    ]
    _table("ID|NAME|ROLE|STATE|CREATED", rows, "no access token")


def audit(found: list[dict[str, Any]]) -> None:
    rows: list[list[object]] = [[moment(a["at"]), a["who"], a["role"], a["action"], a["subject"]] for a in found]
    _table("WHEN|WHO|ROLE|DID|TO", rows, "nobody changed anything yet")


def status(s: dict[str, Any]) -> None:
    console = _console()
    console.print(f"[bold]{safe(s['fleet'])}[/bold]  version {safe(s['version'])}, up since {moment(s['started'])}")
    console.print(f"broker  {'connected' if s['broker_connected'] else 'NOT CONNECTED'}   devices at {safe(s['device_url'])}")
    console.print(f"messages {s['messages']['accepted']} accepted, dropped: {safe(s['messages']['dropped'] or 'none')}")
    console.print(f"devices {s['devices']['online']} of {s['devices']['total']} online, {s['devices']['trouble']} in trouble")
    for one in s.get("processes", ()):
        leads = s["leader"] is not None and s["leader"]["process"] == one["id"]
        said = (
            f"leads with number {s['leader']['number']} since {moment(s['leader']['since'])}"
            if leads
            else f"up since {moment(one['since'])}"
        )
        said = f"said nothing since {moment(one['seen'])}" if one["missing"] else said
        console.print(f"  {safe(one['kind']):<7} {safe(one['id'])}  {said}")
    for warning in s["warnings"]:
        console.print(f"[bold red]warning[/bold red] {safe(warning)}")
    for role, at in s["expires"].items():
        console.print(f"  {role:<12} signed until {moment(at)}")


def keys(found: dict[str, Any]) -> None:
    rows: list[list[object]] = [
        [
            role["role"], role["kind"], role["state"], role["version"], moment(role["expires"]) if role["expires"] else "-",
            f"{role['threshold']} of {len(role['keys'])}", _keyids(role),
        ]
        for role in found["roles"]
    ]  # fmt: skip
    _table("ROLE|KIND|STATE|VERSION|SIGNED UNTIL|NEEDS|KEYS", rows, "")


def publishers(found: list[dict[str, Any]]) -> None:
    rows: list[list[object]] = [
        [role["role"], ", ".join(role["patterns"]), role["state"], f"{role['threshold']} of {len(role['keys'])}", _keyids(role)]
        for role in found
    ]
    _table("PUBLISHER|MODELS|STATE|NEEDS|KEYS", rows, "nobody may sign releases")


def _keyids(role: dict[str, Any]) -> str:
    return ", ".join(key["keyid"][:12] for key in role["keys"])


def made(m: Made, folder: Path) -> str:
    """What `init` says when it is done."""
    return f"""\
Made the fleet {m.config.fleet!r} in {folder}.

Keep offline, and in a second place (whoever has them can make devices run anything):
  {m.root_key}      signs who is trusted
  {m.releases_key}  signs releases: `edge-fleet publish --key` needs it
Keep secret: {folder} (CA and online keys) and {m.profile} (your admin token).

CA fingerprint (in every enrolment string): {m.ca_sha256}
Access token for the page: {m.token}

Next:
  1. edge-fleet serve {folder}
  2. open {m.config.operator_url} and sign in with the token
  3. edge-fleet token create | ssh DEVICE edge-agent enrol -
  4. edge-fleet publish RELEASE.yaml --key {m.releases_key}
  5. edge-fleet rollout start MODEL:VERSION"""


def findings(data: list[dict[str, Any]]) -> None:
    """What `doctor` found, with what to do."""
    for finding in data:
        click.echo(f"{MARKS[finding['level']]} {finding['name']}: {finding['message']}")
        if finding["advice"]:
            click.echo(f"    → {finding['advice']}")


def authorities(data: dict[str, Any]) -> None:
    rows: list[list[object]] = [
        [one["sha256"][:16], one["name"], moment(one["ends"]), one["devices"], "the server's own" if one["shown"] else ""]
        for one in data["authorities"]
    ]
    _table("CA|NAME|ENDS|DEVICES|SHOWS", rows, "")
    if data["step"] == "settled":
        return
    console = _console()
    console.print(f"being replaced since {moment(data['since'])}: {data['step']}")
    if data["switch_at"] is not None:
        console.print(f"the server's own certificates switch at {moment(data['switch_at'])}")
    console.print(f"{data['followed']} devices have followed")
    for state, meaning in (
        ("here", "are here and have not followed: an earlier agent, or something is wrong"),
        ("away", "were not heard of since: they follow when they come back"),
        (
            "ended",
            "have certificates that have ended, and need `edge-fleet device allow-renewal` or a new enrolment in any case",
        ),
    ):
        if left := data[state]["count"]:
            named = ", ".join(data[state]["devices"][:20]) + (", …" if left > 20 else "")
            console.print(safe(f"{left} {meaning}: {named}"))
    if data["tokens"]:
        console.print(f"{data['tokens']} enrolment strings name the old CA; make new ones after the switch")
