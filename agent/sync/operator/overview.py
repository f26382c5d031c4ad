"""What `edge-agent updates` shows, read from the store alone: it works while `sync` is stopped, and changes nothing."""

from __future__ import annotations

from typing import Any

import msgspec

from agent.contract.codec import ContractError
from agent.host.clock import text as moment
from agent.store import Store, StoreError
from agent.sync.trust.desired import Desired, read_desired
from agent.sync.updating.approvals import Approvals
from agent.sync.updating.holds import Holds
from agent.sync.updating.quarantine import Entry, Quarantine
from agent.sync.updating.states import States
from agent.sync.updating.update import UpdateState

ANSWERS_SHOWN = 5

_WAITS = {
    "retry": "the time to try again",
    "window": "its maintenance window",
    "approval": "approval",
    "team": "the other releases of its team",
}


def read(store: Store) -> dict[str, Any]:
    """Model → where its update stands, in plain values.  Raises: OSError."""
    states, quarantine = States(store.private / "updates"), Quarantine(store.private / "quarantine")
    found = {model: _model(store, states, quarantine, model) for model in states.models()}
    desired = _desired(store)
    for model, said in found.items():
        members = desired.team(model, said["target"]) if desired is not None and said["target"] is not None else None
        said["team"] = members or {}
        said["missing"] = [
            f"{other}:{release}"
            for other, release in sorted((members or {}).items())
            if other != model and not _ready(found.get(other), release)
        ]
    return found


def _ready(other: dict[str, Any] | None, release: int) -> bool:
    """Whether the other member of a team is ready to switch, or serves already."""
    if other is None:
        return False
    return bool(other["active"] == release or (other["target"] == release and other["waiting_for"] == "team"))


def _desired(store: Store) -> Desired | None:
    try:
        return read_desired((store.private / "trust" / "desired.json").read_bytes())
    except (OSError, ContractError):
        return None


def _model(store: Store, states: States, quarantine: Quarantine, model: str) -> dict[str, Any]:
    state = states.read(model) or UpdateState(model=model)
    try:
        selection = store.selection(model)
    except StoreError as error:
        active: Any = str(error)
    else:
        active = selection.active.version if selection else None
    return {
        "phase": state.phase.value,
        "active": active,
        "wanted": state.wanted,
        "target": state.target,
        "attempt": state.attempt,
        "since": state.since,
        "waiting_for": state.waiting_for,
        "retry_at": state.retry_at,
        "failure": msgspec.to_builtins(state.failure),
        "interruptions": state.interruptions,
        "passed": state.watched is not None and state.watched.passed_s is not None,
        "approved": msgspec.to_builtins(Approvals(store.private / "approvals").find(model)),
        "stopped": state.stopped.active.version if state.stopped else None,
        "held": Holds(store.private / "holds").held(model),
        "answers": msgspec.to_builtins(state.answers),
        "quarantine": [msgspec.to_builtins(entry.answer) for entry in quarantine.entries(model)],
    }


def text(models: dict[str, Any]) -> str:
    """What `read` gives, as a page for people."""
    if not models:
        return "no model was updated on this device yet\n"
    lines: list[str] = []
    for name, model in models.items():
        lines.append(
            f"{name}: {model['phase']}, active {model['active'] or 'none'}, wanted {model['wanted'] or 'none'}{_target(model)}"
        )
        if model["waiting_for"] == "approval":
            lines.append(f"    → it passed its trial; let it serve with: edge-agent approve {name}")
        if model["waiting_for"] == "team" and model["missing"]:
            lines.append(f"    → it passed its trial, and waits for {', '.join(model['missing'])}, of its team")
        if model["approved"]:
            lines.append(f"    release {model['approved']['version']} was approved here {moment(model['approved']['at'])}")
        lines += [f"    {_answer(answer)}" for answer in model["answers"][-ANSWERS_SHOWN:]]
        lines += [f"    refused here: {_answer(answer)}" for answer in model["quarantine"]]
    return "\n".join(lines) + "\n"


def _target(model: dict[str, Any]) -> str:
    attempt = f" (attempt {model['attempt']})" if model["attempt"] else ""
    parts = [f", target {model['target']}{attempt}" if model["target"] else ""]
    if model["waiting_for"]:
        until = f" until {moment(model['retry_at'])}" if model["retry_at"] else ""
        parts.append(f", waiting for {_WAITS[model['waiting_for']]}{until}")
    if model["failure"]:
        parts.append(f" ({model['failure']['reason']}: {model['failure']['message']})")
    if model["stopped"]:
        parts.append(f", release {model['stopped']} stopped: its lease has ended")
    if model["held"]:
        parts.append(f", held on {model['held']} by an operator here")
    if model["passed"]:
        parts.append(", its watch ended well: committed as soon as the fleet has heard of it")
    return "".join(parts)


def _answer(answer: dict[str, Any]) -> str:
    reason = f" ({answer['reason']}: {answer['message']})" if answer["reason"] else ""
    return f"{moment(answer['at'])} release {answer['release']} {answer['outcome']}{reason}"


def refusal(model: str, entry: Entry) -> str:
    """A refused release, with its numbers."""
    answer = entry.answer
    numbers = ", ".join(f"{name} {value}" for name, value in sorted(answer.evidence.items()))
    lines = [f"{model}:{answer.release} {answer.outcome.value} {moment(answer.at)}: {answer.reason}", f"    {answer.message}"]
    if numbers:
        lines.append(f"    {numbers}")
    return "\n".join([*lines, f"    try it again with: edge-agent quarantine clear {model} {answer.release}"])
