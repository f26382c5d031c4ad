"""What `edge-agent updates` shows, read from the store alone: it works while `sync` is stopped, and changes nothing but on request."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from agent.contract.names import ReleaseRef
from agent.host.clock import text as moment
from agent.store import Store, StoreError
from agent.sync.holds import Holds
from agent.sync.quarantine import Quarantine
from agent.sync.states import States
from agent.sync.update import UpdateState

ANSWERS_SHOWN = 5


def read(store: Store) -> dict[str, Any]:
    """Model → where its update stands, in plain values.  Raises: OSError."""
    states, quarantine = States(store.private / "updates"), Quarantine(store.private / "quarantine")
    return {model: _model(store, states, quarantine, model) for model in states.models()}


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
        "since": state.since,
        "waiting_for": state.waiting_for,
        "retry_at": state.retry_at,
        "failure": msgspec.to_builtins(state.failure),
        "interruptions": state.interruptions,
        "held": Holds(store.private / "holds").pinned(model),
        "answers": msgspec.to_builtins(state.answers),
        "quarantine": [msgspec.to_builtins(entry.answer) for entry in quarantine.entries(model)],
    }


def forget(store: Store, ref: ReleaseRef) -> bool:
    """Lifts the refusal of a release on this device. False when it was not refused.  Raises: OSError."""
    return Quarantine(store.private / "quarantine").forget(ref.model, ref.version)


def hold(store: Store, model: str) -> int:
    """Keeps the model on the release that serves now; gives its version.  Raises: StoreError when none does; OSError."""
    selection = store.selection(model)
    if selection is None:
        raise StoreError(f"model {model!r} serves no release: there is nothing to hold it on")
    Holds(store.private / "holds").pin(model, selection.active.version)
    return selection.active.version


def go_back(store: Store, model: str, version: int | None) -> int:
    """Holds the model on `version`, or on the newest other release that was committed here; gives it.

    Raises: StoreError when there is none to go back to; OSError.
    """
    selection = store.selection(model)
    active = selection.active.version if selection else None
    if version is None:
        version = _before(store, model, active)
    if version == active:
        raise StoreError(f"model {model!r} serves release {version} already")
    store.manifest(ReleaseRef(model, version))
    Holds(store.private / "holds").pin(model, version)
    return version


def _before(store: Store, model: str, active: int | None) -> int:
    state = States(store.private / "updates").read(model) or UpdateState(model=model)
    if state.target == active and state.before is not None:  # under watch: what it would return to
        return state.before.version
    proved = [
        ref.version
        for ref in store.releases()
        if ref.model == model
        and ref.version != active
        and hashlib.sha256(store.manifest_bytes(ref)).hexdigest() in state.committed
    ]
    if not proved:
        raise StoreError(f"no other release of model {model!r} was committed on this device: there is nothing to go back to")
    return max((version for version in proved if active is None or version < active), default=max(proved))


def text(models: dict[str, Any]) -> str:
    """The same for people."""
    if not models:
        return "no model was updated on this device yet\n"
    lines: list[str] = []
    for name, model in models.items():
        lines.append(
            f"{name}: {model['phase']}, active {model['active'] or 'none'}, wanted {model['wanted'] or 'none'}{_target(model)}"
        )
        lines += [f"    {_answer(answer)}" for answer in model["answers"][-ANSWERS_SHOWN:]]
        lines += [f"    refused here: {_answer(answer)}" for answer in model["quarantine"]]
    return "\n".join(lines) + "\n"


def _target(model: dict[str, Any]) -> str:
    parts = [f", target {model['target']}" if model["target"] else ""]
    if model["waiting_for"]:
        until = f" until {moment(model['retry_at'])}" if model["retry_at"] else ""
        parts.append(f", waiting for {model['waiting_for']}{until}")
    if model["failure"]:
        parts.append(f" ({model['failure']['reason']}: {model['failure']['message']})")
    if model["held"]:
        parts.append(f", held on {model['held']} by an operator here")
    return "".join(parts)


def _answer(answer: dict[str, Any]) -> str:
    reason = f" ({answer['reason']}: {answer['message']})" if answer["reason"] else ""
    return f"{moment(answer['at'])} release {answer['release']} {answer['outcome']}{reason}"
