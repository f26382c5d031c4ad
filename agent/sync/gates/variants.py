"""Which variant of a release fits this device: the first, in the publisher's order, whose demands are met. Pure."""

from __future__ import annotations

from agent.contract.fitting import unfit
from agent.contract.manifest import ReleaseManifest, Variant
from agent.contract.reasons import Reason
from agent.contract.reports import Hardware
from agent.sync.problems import Problem


def choose(manifest: ReleaseManifest, hardware: Hardware) -> Variant:
    """Raises: Problem NO_VARIANT with the reason for each variant."""
    refusals = []
    for variant in manifest.variants:
        why_not = unfit(variant, hardware)
        if why_not is None:
            return variant
        refusals.append(f"{variant.name!r}: {why_not}")
    raise Problem(Reason.NO_VARIANT, f"no variant of release {manifest.ref} fits this device ({'; '.join(refusals)})")


def passed_over(manifest: ReleaseManifest, chosen: Variant, hardware: Hardware) -> tuple[str, ...]:
    """Why each of the other variants was not chosen."""
    others = [variant for variant in manifest.variants if variant.name != chosen.name]
    return tuple(f"{v.name!r}: {unfit(v, hardware) or f'{chosen.name!r} stands before it'}" for v in others)
