"""What an operator does on the device itself, read from and written to the store alone: it works while `sync` is stopped and
without any network.

`sync` reads what is written here within seconds. Whatever cannot be done raises StoreError with a sentence that says why.
"""

from __future__ import annotations

import getpass
import hashlib
import time

from agent.contract.names import ReleaseRef
from agent.contract.reports import Phase
from agent.store import Store, StoreError
from agent.sync.updating.approvals import Approval, Approvals
from agent.sync.updating.holds import Holds
from agent.sync.updating.quarantine import Entry, Quarantine
from agent.sync.updating.states import States
from agent.sync.updating.update import UpdateState


def hold(store: Store, model: str, version: int | None = None) -> int:
    """Keeps the model on `version`, without one on the release that serves now; gives it.  Raises: StoreError, OSError."""
    active = _active(store, model)
    if version is None:
        version = active
    if version is None:
        raise StoreError(f"model {model!r} serves no release: there is nothing to hold it on")
    if version != active:
        store.manifest(ReleaseRef(model, version))
    Holds(store.private / "holds").hold(model, version)
    return version


def roll_back(store: Store, model: str, version: int | None) -> int:
    """Holds the model on `version`, or on the newest other release that was committed here; gives it.

    Raises: StoreError when there is none to roll back to; OSError.
    """
    active = _active(store, model)
    if version is None:
        version = _before(store, model, active)
    if version == active:
        raise StoreError(f"model {model!r} serves release {version} already")
    store.manifest(ReleaseRef(model, version))
    Holds(store.private / "holds").hold(model, version)
    return version


def approve(store: Store, model: str, version: int | None = None) -> int:
    """Lets the release that is wanted here serve; gives it.  Raises: StoreError when another one or none is wanted; OSError."""
    state = States(store.private / "updates").read(model) or UpdateState(model=model)
    wanted = state.target if state.target is not None else state.wanted
    if wanted is None:
        raise StoreError(f"no release of model {model!r} is wanted here: there is nothing to approve")
    if version is not None and version != wanted:
        raise StoreError(f"release {model}:{version} is not wanted here; {model}:{wanted} is")
    if state.phase is Phase.QUARANTINED:
        raise StoreError(
            f"this device refuses {model}:{wanted}; `edge-agent quarantine clear {model} {wanted}` lets it be tried again"
        )
    if state.target is None and _active(store, model) == wanted:
        raise StoreError(f"{model}:{wanted} serves already")
    approval = Approval(version=wanted, manifest=state.manifest, at=time.time(), by=_who())
    Approvals(store.private / "approvals").give(model, approval)
    return wanted


def quarantined(store: Store, model: str | None = None) -> dict[str, tuple[Entry, ...]]:
    """Model → what this device refuses of it, oldest first. Models without refusals are left out."""
    quarantine = Quarantine(store.private / "quarantine")
    models = [model] if model is not None else quarantine.models()
    return {name: entries for name in models if (entries := quarantine.entries(name))}


def clear(store: Store, model: str, version: int | None = None) -> list[int]:
    """Forgets refusals of the model, or of one release of it; gives the releases that may be tried again.  Raises: OSError."""
    quarantine = Quarantine(store.private / "quarantine")
    refused = sorted({entry.answer.release for entry in quarantine.entries(model)})
    return [number for number in refused if version in (None, number) and quarantine.forget(model, number)]


def _active(store: Store, model: str) -> int | None:
    selection = store.selection(model)
    return selection.active.version if selection else None


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
        raise StoreError(f"no other release of model {model!r} was committed on this device: there is nothing to roll back to")
    return max((version for version in proved if active is None or version < active), default=max(proved))


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        return ""
