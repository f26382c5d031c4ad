"""What is counted of the versions in memory, as telemetry has it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from agent.contract.telemetry import Counters, Figures
from agent.serving.candidates.shadowing import Shadow
from agent.serving.models.host import Served
from agent.serving.models.version import Version


def of(host: Iterable[Served], shadows: Iterable[Shadow]) -> Iterator[Counters]:
    """One for each version that answers, and one for each that shadows another."""
    for served in host:
        for number, version in sorted(served.versions.items()):
            yield Counters(model=served.name, release=number, begun=version.stats.begun, figures=_of_version(version))
    for shadow in shadows:
        compared, agreed = shadow.comparison.samples, shadow.comparison.agreed
        figures = Figures(compared=compared, differ=max(0, compared - agreed))
        yield Counters(
            model=shadow.candidate.name, release=shadow.candidate.number, begun=f"shadow {shadow.begun_s}", figures=figures
        )


def _of_version(version: Version) -> Figures:
    counts: dict[str, Any] = version.stats.counts()
    if version.sketch is not None:
        counts |= version.sketch.counts()
    return Figures(**counts)
