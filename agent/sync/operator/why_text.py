"""What `edge-agent why` prints for people, from what `why.explain` found."""

from __future__ import annotations

from typing import Any

from agent.host.clock import text as moment

KEY_SHOWN = 12
SHA256_DIGITS = 64
WAITS = {"retry": "for the time to try again", "window": "for its window", "approval": "for `edge-agent approve`", "team": "for the other releases of its team"}  # fmt: skip


def text(found: dict[str, Any]) -> str:
    """A page: what serves, who wanted it, who signed it, what each gate said, what went wrong before."""
    parts = [
        _serving(found["model"], found["serving"]),
        _wanted(found["wanted"], found["assignment"]),
        _release(found["model"], found["release"]),
        _section("gates it passed", [line for gate in found["gates"] for line in _gate(gate)]),
        _update(found["model"], found["update"]),
        _section("went back from", [_went(entry) for entry in found["went_back"]]),
        _section("refused here", [_refused(entry) for entry in found["quarantine"]]),
    ]
    return "\n".join(part for part in parts if part)


def _section(title: str, lines: list[str]) -> str:
    return "".join([f"{title}\n", *(f"  {line}\n" for line in lines)]) if lines else ""


def _serving(model: str, said: dict[str, Any]) -> str:
    if said["release"] is None:
        return _section(f"{model} does not serve", [said["problem"] or "no release of it is selected"])
    lines = [f"variant {said['variant']}, on {said['runs_on'] or 'unknown'}"]
    if said["equal"]:
        lines.append(f"bytes {said['sha256'][:KEY_SHOWN]}…, as signed (serve says so itself)")
    else:
        lines.append(
            f"bytes {said['sha256'] or 'unknown'}, NOT what the manifest says: {said['signed_sha256'] or said['problem']}"
        )
    return _section(f"{model}:{said['release']} serves", lines)


def _wanted(wanted: dict[str, Any], assignment: dict[str, Any] | None) -> str:
    release = f"release {wanted['release']}" if wanted["release"] is not None else "nothing"
    lines = [f"{release}: {wanted['because']}"]
    if wanted.get("attempt"):
        lines.append(f"attempt {wanted['attempt']}: what was refused here in an earlier one is tried again")
    if assignment is not None:
        groups = ", ".join(assignment["groups"]) or "none"
        known = ", ".join(f"{name}={value}" for name, value in assignment["labels"].items())
        labels = f"; labels: {known}" if known else ""
        lines.append(
            f"assignment {assignment['version']} of fleet {assignment['fleet']!r}, for {assignment['device']} (groups: {groups}{labels})"
        )
        lines.append(f"heard {moment(assignment['verified_at'])}, good until {moment(assignment['valid_until'])}")
        lines += [_role(role) for role in assignment["signed_by"]]
    return _section("wanted", lines)


def _role(role: dict[str, Any]) -> str:
    kind = "offline" if role["offline"] else "online"
    keys = ", ".join(keyid[:KEY_SHOWN] for keyid in role["keyids"]) or "nobody"
    return f"signed: {role['role']} {role['version']} by {kind} key {keys} ({role['threshold']} of {role['keys']} needed), ends {moment(role['expires'])}"


def _release(model: str, release: dict[str, Any] | None) -> str:
    if release is None:
        return ""
    if "problem" in release:
        return _section(f"release {model}:{release['release']}", [release["problem"]])
    lines = [f"manifest {release['manifest'][:KEY_SHOWN]}…"]
    publisher = release["publisher"]
    if publisher is None:
        lines.append("its publisher's metadata is not on this device")
    elif not publisher["lists_this_manifest"]:
        lines.append(f"publisher {publisher['role']!r} does not list this manifest any more")
    else:
        lines.append(f"publisher {publisher['role']!r} may sign {', '.join(publisher['patterns'])}")
        lines.append(_role(publisher))
    lines += [f"{name}: {value}" for name, value in release["provenance"].items() if value]
    return _section(f"release {model}:{release['release']}", lines)


def _gate(entry: dict[str, Any]) -> list[str]:
    times = f" ({entry['times']} times)" if entry["times"] > 1 else ""
    reason = f" {entry['reason']}:" if entry["reason"] else ""
    lines = [f"{moment(entry['at'])}  {entry['gate']:<10} {entry['verdict']}{times}:{reason} {entry['message']}"]
    numbers = _numbers(entry["evidence"])
    return [*lines, f"{'':<25}{'':<11}{numbers}"] if numbers else lines


def _numbers(evidence: dict[str, Any]) -> str:
    return ", ".join(_number(name, value) for name, value in evidence.items())


def _number(name: str, value: object) -> str:
    """`p95_ms: 0.25` as `p95 0.25 ms`."""
    if isinstance(value, str):
        short = f"{value[:KEY_SHOWN]}…" if len(value) == SHA256_DIGITS else value
        return f"{name.replace('_', ' ')} {short}"
    number = float(value)  # type: ignore[arg-type]
    base, _, unit = name.rpartition("_")
    if unit == "bytes":
        return f"{base.replace('_', ' ')} {_size(number)}"
    if unit in ("ms", "s"):
        return f"{base.replace('_', ' ')} {number:.4g} {unit}"
    return f"{name.replace('_', ' ')} {number:.0f}" if number.is_integer() else f"{name.replace('_', ' ')} {number:.4g}"


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def _update(model: str, update: dict[str, Any]) -> str:
    if update["target"] is None:
        return ""
    waits = f", waits {WAITS[update['waiting_for']]}" if update["waiting_for"] else ""
    failure = f": {update['failure']['reason']}: {update['failure']['message']}" if update["failure"] else ""
    lines = [
        f"{update['phase'].replace('_', ' ')}{waits}{failure}",
        *(line for gate in update["gates"] for line in _gate(gate)),
    ]
    return _section(f"under way: {model}:{update['target']}", lines)


def _went(entry: dict[str, Any]) -> str:
    numbers = _numbers(entry["evidence"])
    return f"{moment(entry['at'])}  release {entry['release']}: {entry['reason']}: {entry['message']}" + (
        f" ({numbers})" if numbers else ""
    )


def _refused(entry: dict[str, Any]) -> str:
    answer = entry["answer"]
    return f"{moment(answer['at'])}  release {answer['release']}: {answer['reason']}: {answer['message']}"
