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


def console(*, err: bool = False) -> Console:
    """Where tables are printed: as wide as they are where nobody looks. `err`: beside what programs read."""
    from rich.console import Console

    found = Console(highlight=False, stderr=err)
    return found if found.is_terminal else Console(width=WIDTH_WITHOUT_TERMINAL, highlight=False, stderr=err)


def table(headings: str, rows: list[list[object]], empty: str, *, err: bool = False) -> None:
    """Prints rows below `headings`, which `|` separates, or `empty` without any. `err`: beside what programs read."""
    from rich.table import Table

    if not rows:
        console(err=err).print(f"[dim]{empty}[/dim]")
        return
    made = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings.split("|"):
        made.add_column(heading)
    for row in rows:
        made.add_row(*(safe(cell) for cell in row))
    console(err=err).print(made)


def labels(found: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in found.items())


def devices(found: list[dict[str, Any]]) -> None:
    rows: list[list[object]] = [
        [
            d["id"], _standing(d), ", ".join([*d["groups"], *filter(None, [labels(d["labels"])])]) or "-",
            "; ".join(_runs(name, m) for name, m in d["models"].items()) or "-", ago(d["last_seen"]),
        ]
        for d in found
    ]  # fmt: skip
    table(
        "DEVICE|STATE|GROUPS AND LABELS|RUNS|SEEN",
        rows,
        "no device yet; make an enrolment string with `edge-fleet token create`",
    )


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
    out = console()
    out.print(f"[bold]{safe(d['id'])}[/bold]  {_standing(d)}, seen {ago(d['last_seen'])}")
    by_scope = d.get("groups_by_scope", [])
    by_hand = [name for name in d["groups"] if name not in by_scope]
    out.print(f"groups  {safe(', '.join(by_hand) or '-')}   record serial {d['record_serial']}")
    if by_scope:
        out.print(f"        {safe(', '.join(by_scope))} by their scopes")
    if d["labels"]:
        out.print(f"labels  {safe(labels(d['labels']))}")
    out.print(f"agent   {safe(d['agent_version'] or '-')}   {safe(_hardware(d['hardware']))}")
    if d["problem"]:
        out.print(f"problem {safe(d['problem'])}")
    for name, m in d["models"].items():
        out.print(
            f"\n[bold]{safe(name)}[/bold]  serves {m['serving']} ({safe(m['variant'])}), {safe(_phase(m))}, wanted {m['wanted']}"
        )
        if (stage := m.get("stage")) is not None:
            found = ", ".join(f"{words(name)} {value}" for name, value in stage["evidence"].items())
            out.print(f"  {stage['name']} of release {stage['release']} {stage['verdict']}: {safe(found or stage['message'])}")
        for answer in m["answers"]:
            why = f": {answer['reason']} {answer['message']}" if answer["reason"] else ""
            out.print(f"  release {answer['release']} {safe(words(answer['outcome']))}{safe(why)} ({moment(answer['at'])})")


def groups(found: list[dict[str, Any]]) -> None:
    rows: list[list[object]] = [[g["name"], g["devices"], _filled(g)] for g in found]
    table("GROUP|DEVICES|FILLED", rows, "no group yet; make one with `edge-fleet device group` or `edge-fleet group set`")


def _filled(g: dict[str, Any]) -> str:
    if not g["scope"]:
        return "by hand"
    return "by " + " and ".join(g["scope"]) + ("" if g["settled"] else " (devices are looked at now)")


def group(g: dict[str, Any]) -> None:
    out = console()
    out.print(f"[bold]{safe(g['name'])}[/bold]  {g['devices']} devices, filled {safe(_filled(g))}")
    if g["updated"] is not None:
        out.print(f"set     {moment(g['updated'])} by {safe(g['updated_by'])}")
    if g["first"]:
        more = f", … (`edge-fleet device list --group {g['name']}`)" if g["devices"] > len(g["first"]) else ""
        out.print(f"devices {safe(', '.join(g['first']) + more)}")
    for one in g["named_by"]:
        out.print(f"named by {safe(one)}")


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
    table("RELEASE|STATE|SIZE|VARIANTS|GOLDEN|PUBLISHED", rows, "no release yet; publish one with `edge-fleet publish`")


def release(r: dict[str, Any]) -> None:
    out = console()
    state = _release_state(r) if _release_state(r) == "published" else f"[bold red]{_release_state(r)}[/bold red]"
    out.print(f"[bold]{safe(r['release'])}[/bold]  {state} {moment(r['published'])}, {size(r['size_bytes'])}")
    out.print(f"signed by {safe(', '.join(key[:12] for key in r['signers']))}   manifest sha256 {safe(r['sha256'])}")
    for variant in r["variants"]:
        out.print(f"  variant {safe(variant['name'])}: {safe(variant['runtime'])}, {safe(variant['file'])}")
    out.print(f"  acceptance: {r['golden_cases']} golden cases")
    for name, value in r["provenance"].items():
        if value:
            out.print(f"  {words(name)}: {safe(value)}")


def manifest(m: ReleaseManifest) -> None:
    out = console()
    out.print(f"[bold]{safe(m.ref)}[/bold]  {len(m.files)} files, {size(m.size_bytes)}")
    for variant in m.variants:
        blocks = sum(len(m.files[name].blocks) for name in variant.files)
        listed = safe(variant.file) + "".join(f" + {safe(name)}" for name in variant.data.values())
        out.print(
            f"  variant {safe(variant.name)}: {safe(variant.runtime)}, {listed}, {size(m.model_bytes(variant))}, {blocks} blocks"
        )
    out.print(f"  acceptance: {len(m.acceptance.golden)} golden cases")


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
            t["device"] or "any", ", ".join([*t["groups"], *filter(None, [labels(t.get("labels", {}))])]) or "-", moment(t["expires"]),
            t["created_by"],
        ]
        for t in found
    ]  # fmt: skip
    table(
        "ID|STATE|USES LEFT|DEVICE|GROUPS AND LABELS|EXPIRES|BY",
        rows,
        "no enrolment token; make one with `edge-fleet token create`",
    )


def access_tokens(found: list[dict[str, Any]]) -> None:
    rows: list[list[object]] = [
        [t["id"], t["name"], t["role"], "revoked" if t["revoked"] else "valid", moment(t["created"])] for t in found
    ]
    table("ID|NAME|ROLE|STATE|CREATED", rows, "no access token")


def audit(found: list[dict[str, Any]]) -> None:
    rows: list[list[object]] = [[moment(a["at"]), a["who"], a["role"], a["action"], a["subject"]] for a in found]
    table("WHEN|WHO|ROLE|DID|TO", rows, "nobody changed anything yet")


def _cluster(broker: dict[str, Any]) -> None:
    if broker["nodes"]:
        up = [node["name"] for node in broker["nodes"] if not node["problem"]]
        waiting = ", ".join(f"{queue['name']} {queue['messages']}" for queue in broker["queues"])
        console().print(
            f"{safe(broker['kind'])}  {len(up)} of {len(broker['nodes'])} nodes answer; waiting: {safe(waiting or 'not known')}"
        )


def status(s: dict[str, Any]) -> None:
    out = console()
    out.print(f"[bold]{safe(s['fleet'])}[/bold]  version {safe(s['version'])}, up since {moment(s['started'])}")
    out.print(f"broker  {'connected' if s['broker_connected'] else 'NOT CONNECTED'}   devices at {safe(s['device_url'])}")
    _cluster(s["broker"])
    out.print(f"messages {s['messages']['accepted']} accepted, dropped: {safe(s['messages']['dropped'] or 'none')}")
    out.print(f"devices {s['devices']['online']} of {s['devices']['total']} online, {s['devices']['trouble']} in trouble")
    for one in s.get("processes", ()):
        leads = s["leader"] is not None and s["leader"]["process"] == one["id"]
        said = (
            f"leads with number {s['leader']['number']} since {moment(s['leader']['since'])}"
            if leads
            else f"up since {moment(one['since'])}"
        )
        said = f"said nothing since {moment(one['seen'])}" if one["missing"] else said
        out.print(f"  {safe(one['kind']):<7} {safe(one['id'])}  {said}")
    for warning in s["warnings"]:
        out.print(f"[bold red]warning[/bold red] {safe(warning)}")
    for role, at in s["expires"].items():
        out.print(f"  {role:<12} signed until {moment(at)}")


def keys(found: dict[str, Any]) -> None:
    rows: list[list[object]] = [
        [
            role["role"], role["kind"], role["state"], role["version"], moment(role["expires"]) if role["expires"] else "-",
            f"{role['threshold']} of {len(role['keys'])}", _keyids(role),
        ]
        for role in found["roles"]
    ]  # fmt: skip
    table("ROLE|KIND|STATE|VERSION|SIGNED UNTIL|NEEDS|KEYS", rows, "")


def publishers(found: list[dict[str, Any]]) -> None:
    rows: list[list[object]] = [
        [role["role"], ", ".join(role["patterns"]), role["state"], f"{role['threshold']} of {len(role['keys'])}", _keyids(role)]
        for role in found
    ]
    table("PUBLISHER|MODELS|STATE|NEEDS|KEYS", rows, "nobody may sign releases")


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
    table("CA|NAME|ENDS|DEVICES|SHOWS", rows, "")
    if data["step"] == "settled":
        return
    out = console()
    out.print(f"being replaced since {moment(data['since'])}: {data['step']}")
    if data["switch_at"] is not None:
        out.print(f"the server's own certificates switch at {moment(data['switch_at'])}")
    out.print(f"{data['followed']} devices have followed")
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
            out.print(safe(f"{left} {meaning}: {named}"))
    if data["tokens"]:
        out.print(f"{data['tokens']} enrolment strings name the old CA; make new ones after the switch")
