"""Several models on one device: an updater for each, on one store, one `serve` and one clock; stepped in turns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from agent.contract.assignment import Assignment, ModelAssignment
from agent.contract.reports import Phase
from agent.store import Selection, Store
from agent.sync.updating.states import States
from agent.sync.updating.updater import ModelUpdater
from tests.sync.bench import Bench
from tests.sync.fleet import FLEET

MODELS = ("arm", "eye")


class TeamBench(Bench):
    """The models `arm` and `eye`, and any others that are named."""

    def __init__(self, folder: Path, models: tuple[str, ...] = MODELS) -> None:
        self.models = models
        super().__init__(folder)

    def again(self) -> None:
        super().again()
        self.updaters: dict[str, ModelUpdater] = {}
        for model in self.models:
            self.updaters[model] = self.machine.updater(model)

    def desire(
        self,
        releases: Mapping[str, int | None],
        team: tuple[str, ...] = (),
        withdrawn: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """The fleet wants these; the models in `team` switch together."""
        gone = withdrawn or {}
        models = {m: ModelAssignment(release=release, withdrawn=gone.get(m, ())) for m, release in releases.items()}
        group = {model: releases[model] for model in team}
        named = {"g1": {m: r for m, r in group.items() if r is not None}} if group else {}
        self.assignment = Assignment(fleet=FLEET, version=self.assignment.version + 1, models=models, teams=named)
        self.verified_at, self.known = self.clock.wall(), True

    def round(self) -> None:
        """Every updater takes a step; then the shortest of what they wait for passes."""
        if self.link_up:
            self.deliver()
        delays = [self.updaters[model].step(lambda: False) for model in self.models]
        self.clock.pass_(max(min(delays), 0.01))

    def rounds(self, count: int) -> None:
        for _ in range(count):
            self.round()

    def all_in(self, *phases: Phase, within: int = 600) -> None:
        """Goes on until every model is in one of these phases."""
        for _ in range(within):
            if all(updater.state.phase in phases for updater in self.updaters.values()):
                return
            self.round()
        problems = {model: (u.state.phase.value, u.problem) for model, u in self.updaters.items()}
        raise AssertionError(f"still {problems}")

    @property
    def runs(self) -> dict[str, int | None]:
        """What `serve` has active."""
        return {model: self.serve.active.get(model) for model in self.models}

    def on_disk(self) -> dict[str, int | None]:
        """What a `serve` that starts now would load: read as another process reads it."""
        found = Store(self.store.root).selections()
        return {m: s.active.version if isinstance(s := found.get(m), Selection) else None for m in self.models}

    def phases_on_disk(self) -> dict[str, Phase]:
        states = States(self.store.private / "updates")
        found = {model: states.read(model) for model in self.models}
        return {model: state.phase for model, state in found.items() if state is not None}

    def begin(self) -> None:
        """Releases arm:1 and eye:2 are committed and serve; arm:3 and eye:4 are published."""
        for version, model in enumerate(self.models, start=1):
            self.release(version, model=model)
        self.desire({model: version for version, model in enumerate(self.models, start=1)})
        self.rounds(2)
        self.all_in(Phase.STEADY)
        self.rounds(2)
