"""What a report says of a release that runs beside the one that serves. Pure."""

from __future__ import annotations

from agent.contract.reports import Phase, Stage
from agent.sync.gates import canary, shadow
from agent.sync.updating.update import UpdateState


def stage_of(state: UpdateState) -> Stage | None:
    """None outside of SHADOWING and CANARYING, and until there is something to say."""
    if state.target is None:
        return None
    if state.phase is Phase.CANARYING and state.canaried is not None:
        evidence = canary.evidence_of(state.canaried)
        return Stage(name="canary", release=state.target, verdict="running", evidence=evidence)
    shadowed = state.shadowed
    if state.phase is not Phase.SHADOWING or shadowed is None:
        return None
    evidence = shadowed.evidence or shadow.evidence_of(shadowed)
    return Stage(name="shadow", release=state.target, verdict=shadowed.verdict, message=shadowed.message, evidence=evidence)
