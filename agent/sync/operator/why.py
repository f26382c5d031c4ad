"""`edge-agent why`: from the fleet's word over every gate to the bytes that serve, read from disk and from `serve`. It changes
nothing.

What is said of signatures is what was verified when it was stored: the files are python-tuf's own, below `sync/trust`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import DelegatedRole, Metadata, Root, Targets  # type: ignore[attr-defined]

from agent.config import AgentConfig
from agent.contract.assignment import EVERYONE, Rollout, slot
from agent.contract.codec import ContractError
from agent.contract.manifest import ReleaseManifest
from agent.contract.names import ReleaseRef
from agent.contract.reports import hardware_class
from agent.contract.scopes import text_of
from agent.host import hardware
from agent.store import Selection, Store, StoreError
from agent.sync.serving import ServeAway, ServeClient, ServeRefused, VersionStatus
from agent.sync.trust.desired import Desired, read_desired
from agent.sync.trust.metadata import load, stored
from agent.sync.updating.approvals import Approvals
from agent.sync.updating.holds import Holds
from agent.sync.updating.journal import Entry, Journal
from agent.sync.updating.quarantine import Quarantine
from agent.sync.updating.states import States
from agent.sync.updating.update import UpdateState


def explain(config: AgentConfig, model: str) -> dict[str, Any]:
    """Everything that is known here of why the model runs what it runs, in plain values.

    Raises: StoreError when nothing is known of the model; OSError.
    """
    store = Store(config.store)
    store.check_format()
    trust = store.private / "trust"
    state, desired = States(store.private / "updates").read(model), _desired(trust)
    selection = store.selection(model)
    known = Journal(store.private / "journal").entries(model)
    if selection is None and not known and (desired is None or model not in desired.assignment.models):
        raise StoreError(f"nothing is known here of model {model!r}; `edge-agent models` lists what serves")
    state = state or UpdateState(model=model)
    serving, problem = _serving(config.serve.socket, model)
    active = serving.version if serving else selection.active.version if selection else None
    return {
        "model": model,
        "serving": _bytes(store, model, serving, problem, selection),
        "wanted": _wanted(desired, model, Holds(store.private / "holds").held(model)),
        "assignment": _assignment(desired, trust / "metadata"),
        "release": _release(store, model, active, trust / "metadata"),
        "gates": _gates(known, active),
        "update": {
            "phase": state.phase.value,
            "target": state.target,
            "waiting_for": state.waiting_for,
            "failure": msgspec.to_builtins(state.failure),
            "approved": msgspec.to_builtins(Approvals(store.private / "approvals").find(model)),
            "gates": _gates(known, state.target) if state.target not in (None, active) else [],
        },
        "went_back": [msgspec.to_builtins(e) for e in known if e.verdict == "rolled back"][-5:],
        "quarantine": [msgspec.to_builtins(e) for e in Quarantine(store.private / "quarantine").entries(model)],
    }


# -- the fleet's word ------------------------------------------------------------------------------------------------------------


def _desired(trust: Path) -> Desired | None:
    try:
        return read_desired((trust / "desired.json").read_bytes())
    except (OSError, ContractError):
        return None


def _wanted(desired: Desired | None, model: str, held: int | None) -> dict[str, Any]:
    if held is not None:
        return {"release": held, "because": "an operator holds it on this device (edge-agent unhold ends that)"}
    if desired is None:
        return {"release": None, "because": "the fleet has not spoken yet"}
    kind = hardware_class(hardware.machine())
    wanted = desired.wanted(model, kind)
    rules = desired.assignment.models.get(model)
    found: dict[str, Any] = {"release": wanted.release, "rollout": wanted.rollout, "mode": wanted.mode}
    if rules is None:
        return {**found, "because": "the assignment does not name the model"}
    if wanted.attempt:
        found["attempt"] = wanted.attempt
    rule = desired.rule(model, kind, wanted)
    found["scope"] = text_of(rule.scope)
    if wanted.rollout is not None and rule.rollout is not None:
        return {**found, "because": _by_rollout(rule.rollout, wanted.rollout, desired)}
    if wanted.release is None:
        return {**found, "because": "no release of it may run"}
    for exclusion in rules.excluded:
        if exclusion.hardware == kind:
            return {**found, "because": f"release {exclusion.release} is stopped for this kind of hardware ({kind})"}
    if wanted.release != rule.release:
        return {**found, "because": "it is the one before what was withdrawn"}
    who = f"every device in {found['scope']} runs, and this is one" if rule.scope else "every device runs"
    return {**found, "because": f"it is what {who}"}


def _by_rollout(rollout: Rollout, brought_by: str, desired: Desired) -> str:
    if brought_by == rollout.id:
        return _reached_by(rollout, desired)
    return f"rollout {brought_by} brought it here, until rollout {rollout.id} comes, which took its place"


def _reached_by(rollout: Rollout, desired: Desired) -> str:
    place = slot(rollout.team or rollout.id, desired.record.device)
    shares = {group: rollout.group_permille.get(group, EVERYONE) for group in rollout.groups if group in desired.record.groups}
    for group, share in shares.items():
        if share >= EVERYONE:
            return f"rollout {rollout.id} reaches group {group}, and this device is in it"
        if place < share:
            said = f"this device is in it, and its place is {place} of 1000"
            return f"rollout {rollout.id} reaches {share / 10:g} % of group {group} by now, {said}"
    if rollout.permille >= 1000:
        return f"rollout {rollout.id} reaches every device"
    return f"rollout {rollout.id} reaches {rollout.permille / 10:g} % of the devices, and this one's place is {place} of 1000"


def _assignment(desired: Desired | None, metadata: Path) -> dict[str, Any] | None:
    if desired is None:
        return None
    return {
        "fleet": desired.assignment.fleet,
        "version": desired.assignment.version,
        "device": desired.record.device,
        "groups": list(desired.record.groups),
        "labels": dict(desired.record.labels),
        "record_serial": desired.record.serial,
        "verified_at": desired.verified_at,
        "valid_until": desired.valid_until,
        "signed_by": [role for name in ("root", "timestamp", "snapshot", "targets") if (role := _top_role(metadata, name))]
        + [role for role in (_delegated(metadata, "assignments"),) if role],
    }


def _top_role(metadata: Path, name: str) -> dict[str, Any] | None:
    try:
        root, signed = load(metadata, "root", Root), stored(metadata, name)
        keyids = root.get_verification_result(name, signed.signed_bytes, signed.signatures).signed
    except (OSError, RepositoryError, ValueError):
        return None
    role = root.roles[name]
    return _role(name, signed, list(keyids), role.threshold, len(role.keyids), offline=name in ("root", "targets"))


def _delegated(metadata: Path, name: str) -> dict[str, Any] | None:
    try:
        targets, signed = load(metadata, "targets", Targets), stored(metadata, name)
        keyids = targets.get_verification_result(name, signed.signed_bytes, signed.signatures).signed
    except (OSError, RepositoryError, ValueError):
        return None
    role = ((targets.delegations.roles if targets.delegations else None) or {})[name]
    return _role(name, signed, list(keyids), role.threshold, len(role.keyids), offline=name != "assignments")


def _role(name: str, signed: Metadata[Any], keyids: list[str], threshold: int, keys: int, *, offline: bool) -> dict[str, Any]:
    return {
        "role": name,
        "version": signed.signed.version,
        "expires": signed.signed.expires.timestamp(),
        "keyids": sorted(keyids),
        "threshold": threshold,
        "keys": keys,
        "offline": offline,
    }


# -- the release -----------------------------------------------------------------------------------------------------------------


def _release(store: Store, model: str, version: int | None, metadata: Path) -> dict[str, Any] | None:
    if version is None:
        return None
    ref = ReleaseRef(model, version)
    try:
        data, manifest = store.manifest_bytes(ref), store.manifest(ref)
    except StoreError as error:
        return {"release": version, "problem": str(error)}
    return {
        "release": version,
        "manifest": hashlib.sha256(data).hexdigest(),
        "size_bytes": manifest.size_bytes,
        "publisher": _publisher(metadata, ref, hashlib.sha256(data).hexdigest()),
        "provenance": msgspec.to_builtins(manifest.provenance),
        "acceptance": _acceptance(manifest),
    }


def _acceptance(manifest: ReleaseManifest) -> dict[str, Any]:
    acceptance = manifest.acceptance
    return {
        "golden_cases": len(acceptance.golden),
        "max_p95_ms": acceptance.max_p95_ms,
        "max_memory_bytes": acceptance.max_memory_bytes,
        "offline_commit": acceptance.offline_commit,
        "approval": acceptance.approval,
        "lease_s": acceptance.lease_s,
        "watch": msgspec.to_builtins(acceptance.watch),
    }


def _publisher(metadata: Path, ref: ReleaseRef, sha256: str) -> dict[str, Any] | None:
    """Who signed the manifest; None when the metadata here is gone, or its publisher lists another manifest by now."""
    try:
        targets = load(metadata, "targets", Targets)
    except (OSError, RepositoryError, ValueError):
        return None
    roles: dict[str, DelegatedRole] = (targets.delegations.roles if targets.delegations else None) or {}
    for name, role in roles.items():
        if not role.is_delegated_path(ref.target_path):
            continue
        found = _delegated(metadata, name)
        listed = _listed(metadata, name, ref)
        if found is not None:
            return {**found, "patterns": list(role.paths or []), "lists_this_manifest": listed == sha256}
    return None


def _listed(metadata: Path, role: str, ref: ReleaseRef) -> str | None:
    try:
        target = load(metadata, role, Targets).targets.get(ref.target_path)
    except (OSError, RepositoryError, ValueError):
        return None
    return target.hashes.get("sha256") if target else None


def _gates(known: tuple[Entry, ...], release: int | None) -> list[dict[str, Any]]:
    """What the gates said of the release, from the last time it was wanted on."""
    of_it = [entry for entry in known if entry.release == release and release is not None]
    begins = [index for index, entry in enumerate(of_it) if entry.verdict == "wanted"]
    return [msgspec.to_builtins(entry) for entry in of_it[begins[-1] if begins else 0 :]]


# -- the bytes -------------------------------------------------------------------------------------------------------------------


def _serving(socket: Path, model: str) -> tuple[VersionStatus | None, str | None]:
    try:
        return ServeClient(socket).status().model(model).serving, None
    except (ServeAway, ServeRefused) as error:
        return None, str(error)


def _bytes(
    store: Store, model: str, serving: VersionStatus | None, problem: str | None, selection: Selection | None
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "selected": selection.active.version if selection else None,
        "release": serving.version if serving else None,
        "variant": serving.variant if serving else None,
        "sha256": serving.sha256 if serving else None,
        "runs_on": serving.placement.actual if serving and serving.placement else None,
        "problem": problem,
        "signed_sha256": None,
        "equal": None,
    }
    if serving is not None:
        try:
            manifest = store.manifest(ReleaseRef(model, serving.version))
            found["signed_sha256"] = manifest.model_sha256(manifest.variant(serving.variant))
            found["equal"] = found["signed_sha256"] == serving.sha256
        except (StoreError, KeyError) as error:
            found["problem"] = str(error)
    return found
