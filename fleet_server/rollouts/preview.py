"""What a rollout would reach, before it begins."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from agent.contract import fitting
from agent.contract.assignment import slot
from agent.contract.codec import convert
from agent.contract.manifest import File, ReleaseManifest, Variant
from agent.contract.names import ReleaseRef
from agent.contract.reports import Hardware
from fleet_server.releases import catalogue
from fleet_server.rollouts import facts, rules, wording
from fleet_server.rollouts.facts import Hearing
from fleet_server.rollouts.machine import Wave
from fleet_server.rollouts.tally import quarantined
from fleet_server.storage.models import Device, DeviceModel, ReleaseRow, RolloutRow

DRAW = "preview"  # as the id of a rollout: by it the devices of a share are drawn
CAUSES_NAMED = 5


class WavePreview(msgspec.Struct, frozen=True, kw_only=True):
    """A wave, and what is known of the devices that it adds to those of the waves before. `devices`: how many, of which `online` are
    there now, `serving` run the release already, `held` are kept by an operator on what they run, `refusing` quarantined the release and do
    not try it again, and `unfit` have no variant of it. `unknown` never said what hardware they are. `fetch_bytes`: what the others fetch
    together at most, less the blocks that they have in what they serve and in what they served before.
    """

    reach: str
    devices: int = 0
    online: int = 0
    serving: int = 0
    held: int = 0
    refusing: int = 0
    unfit: int = 0
    unknown: int = 0
    fetch_bytes: int = 0


class RolloutPreview(msgspec.Struct, frozen=True, kw_only=True):
    """What a rollout of the release would reach. Which devices are in a share is drawn when it begins; the numbers are of one such
    draw. `worries`: what a person should know first.
    """

    release: str
    waves: tuple[WavePreview, ...]
    worries: tuple[str, ...]


def of(
    session: Session, ref: ReleaseRef, waves: Sequence[Wave], drawn: RolloutRow, hearing: Hearing, now: float
) -> RolloutPreview:
    """Of these waves, resolved for the rollout `drawn`, whose id is `DRAW`.  Raises: NotFound."""
    scope, ahead = rules.scope_of(drawn), rules.ahead_of(session, drawn)
    manifest = catalogue.manifest_of(catalogue.find(session, ref))
    fits, fetches = Fits(manifest), Fetches(session, ref.model, manifest)
    found, why = [collections.Counter[str]() for _ in waves], collections.Counter[str]()
    for row in session.execute(rows(ref.model)):
        place, groups = slot(DRAW, row.id), set(row.groups)
        wave = next((n for n, one in enumerate(waves) if place < one.permille or groups & set(one.groups)), None)
        if wave is None or not rules.follows(scope, ahead, rules.identity_of(row)):
            continue
        counts, said = found[wave], row if row.phase is not None else None
        counts["devices"] += 1
        counts["online"] += is_online(row, hearing, now)
        fact = facts.fact_of(row.id, True, said, ref.version, {}, DRAW)
        variant, reason = fits.of(row.hardware)
        if said is not None and said.serving == ref.version:
            counts["serving"] += 1
        elif fact.held:
            counts["held"] += 1
        elif quarantined(fact):
            counts["refusing"] += 1
        elif row.hardware is None:
            counts["unknown"] += 1
        elif variant is None:
            counts["unfit"] += 1
            why[reason] += 1
        else:
            counts["fetch_bytes"] += fetches.bytes_of(variant, said.serving if said is not None else None, row.previous)
    shown = tuple(WavePreview(reach=wording.reach(wave, scope), **one) for wave, one in zip(waves, found, strict=True))
    return RolloutPreview(release=str(ref), waves=shown, worries=tuple(_worries(shown, why)))


def rows(model: str) -> Select[Any]:
    """The query of every device that is not shut out, with what it says of the model if it does; `previous`: what it ran before."""
    columns = (
        Device.id, Device.groups, Device.labels, Device.present, Device.last_seen, Device.hardware, Device.hardware_class,
        Device.retries, Device.state["models", model, "previous"].as_integer().label("previous"),
    )  # fmt: skip
    said = (
        DeviceModel.serving, DeviceModel.sha256, DeviceModel.variant, DeviceModel.phase, DeviceModel.answers, DeviceModel.held,
    )  # fmt: skip
    mine = (DeviceModel.device == Device.id) & (DeviceModel.model == model)
    return select(*columns, *said).outerjoin(DeviceModel, mine).where(Device.revoked.is_(False))


def is_online(row: Any, hearing: Hearing, now: float) -> bool:
    """Whether the device of a row of `rows` is there now."""
    return bool(row.present and row.last_seen is not None and now < hearing.silent_at(row.last_seen))


def _worries(shown: Sequence[WavePreview], why: Mapping[str, int]) -> list[str]:
    found = [
        f"wave {number} ({wave.reach}): none of its devices is there now, so it waits until one is"
        for number, wave in enumerate(shown, 1)
        if wave.devices and not wave.online
    ]
    ranked = sorted(why.items(), key=lambda one: (-one[1], one[0]))[:CAUSES_NAMED]
    found += [f"devices that no variant fits: {number} ({reason})" for reason, number in ranked]
    if refusing := sum(wave.refusing for wave in shown):
        found.append(
            f"devices that quarantined it before and refuse it again: {refusing}; begin it with --retry, or publish a new version"
        )
    if held := sum(wave.held for wave in shown):
        found.append(f"devices that are held on what they run, and not waited for: {held}")
    return found


class Fits:
    """Which variant each hardware takes; asked of many devices, most of them alike."""

    def __init__(self, manifest: ReleaseManifest) -> None:
        self._manifest = manifest
        self._known: dict[bytes, tuple[Variant | None, str]] = {}

    def of(self, hardware: Any) -> tuple[Variant | None, str]:
        """The variant, or none and why not."""
        if hardware is None:
            return None, ""
        key = msgspec.json.encode(hardware, order="sorted")
        if key not in self._known:
            self._known[key] = self._choose(convert(hardware, Hardware))
        return self._known[key]

    def _choose(self, hardware: Hardware) -> tuple[Variant | None, str]:
        reasons = []
        for variant in self._manifest.variants:
            reason = fitting.unfit(variant, hardware)
            if reason is None:
                return variant, ""
            reasons.append(f"{variant.name!r}: {reason}")
        return None, "; ".join(reasons)


class Fetches:
    """How much a device fetches, by its variant and by the releases that it has."""

    def __init__(self, session: Session, model: str, manifest: ReleaseManifest) -> None:
        self._session, self._model, self._manifest = session, model, manifest
        self._known: dict[tuple[str, frozenset[int]], int] = {}

    def bytes_of(self, variant: Variant, *has: int | None) -> int:
        key = (variant.name, frozenset(version for version in has if version is not None))
        if key not in self._known:
            had = {sha for version in key[1] for sha in self._had(version)}
            files = [self._manifest.files[name] for name in fitting.needed_files(self._manifest, variant)]
            missing = {
                sha: size for file in files if file.sha256 not in had for sha, size in pieces(file).items() if sha not in had
            }
            self._known[key] = sum(missing.values())
        return self._known[key]

    def _had(self, version: int) -> frozenset[str]:
        """The hashes of the files of a release, and of their blocks."""
        row = self._session.get(ReleaseRow, (self._model, version))
        files = catalogue.manifest_of(row).files.values() if row is not None else ()
        return frozenset(sha for file in files for sha in (file.sha256, *pieces(file)))


def pieces(file: File) -> dict[str, int]:
    """Hash → size of what is fetched of a file: its blocks, or the whole."""
    return {block.sha256: block.size_bytes for block in file.blocks} or {file.sha256: file.size_bytes}
