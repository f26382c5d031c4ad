"""The models in memory: which versions of each, which one answers, and how one gives way to another without a failed request.

The rules:
- A request resolves its version once, at its start, and finishes on it. `enter` and `leave` count it.
- A version that is to go is first taken out of every reference, then waited for until nobody is in it, then closed. So a
  request that meets a retired version has read an old reference, and reading again gives the new one.
- Only one thread changes the host at a time (the control thread); any thread reads it.
- A version may be away: its model is not in memory and comes back, or is being replaced. Whoever enters it then waits in its
  lane; see `residency`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from agent.serving.answers import Refusal
from agent.serving.models.canary import Canary
from agent.serving.models.outputs import OutputSketch
from agent.serving.models.version import Version

LABELS = ("stable", "candidate", "previous")


class Served:
    """One model name: the version that answers, the one before it, and whatever else is in memory."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.versions: dict[int, Version] = {}
        self.active: Version | None = None
        self.previous: Version | None = None
        self.activations = 0
        self.rollbacks = 0

    @property
    def candidate(self) -> Version | None:
        """The newest version in memory that is neither active nor previous."""
        others = [v for v in self.versions.values() if v.state == "READY" and v is not self.active and v is not self.previous]
        return max(others, key=lambda v: v.number, default=None)

    def pick(self, wanted: str | None) -> Version | None:
        """By number or label; the active one when None."""
        if wanted is None or wanted == "stable":
            return self.active
        if wanted == "previous":
            return self.previous
        if wanted == "candidate":
            return self.candidate
        return self.versions.get(int(wanted))

    @property
    def canary(self) -> Canary[Version] | None:
        return self.active.canary if self.active is not None else None

    def end_canary(self) -> None:
        """The active version answers all requests; those under way on the other one finish there."""
        for version in self.versions.values():
            version.canary = None

    def document(self) -> dict[str, Any]:
        return {
            "active": self.active.number if self.active else None,
            "previous": self.previous.number if self.previous else None,
            "canary": canary.document() if (canary := self.canary) is not None else None,
            "versions": {str(number): version.document() for number, version in sorted(self.versions.items())},
        }


class ModelHost:
    """All models of this process. What a version keeps for sequences is bounded by `max_sequences` and `sequence_idle_s`. `sketches`: what
    versions answer is counted.
    """

    def __init__(self, *, max_sequences: int = 64, sequence_idle_s: float = 60.0, sketches: bool = False) -> None:
        self._sketches = sketches
        self._max_sequences = max_sequences
        self._sequence_idle_s = sequence_idle_s
        self.on_close: Callable[[Version], None] = lambda _: None  # told of a version that is away before it goes for good
        self.models: dict[str, Served] = {}  # replaced as a whole, never changed: readers need no lock

    def __iter__(self) -> Iterator[Served]:
        return iter(sorted(self.models.values(), key=lambda served: served.name))

    def get(self, name: str) -> Served | None:
        return self.models.get(name)

    def served(self, name: str) -> Served:
        """Raises: Refusal (404)."""
        served = self.models.get(name)
        if served is None:
            raise unknown_model(name)
        return served

    def enter(self, name: str, wanted: str | None) -> Version:
        """The version to answer with, kept open: call `leave` on it.  Raises: Refusal (404 unknown, 503 not ready)."""
        served = self.models.get(name)
        if served is None:
            raise unknown_model(name)
        while True:
            version = served.active if wanted is None else served.pick(wanted)
            if version is None:
                raise _not_there(served, wanted)
            if version.enter():
                return version
            if served.pick(wanted) is version:
                version.stats.failed("unavailable")
                raise Refusal(503, _not_ready_text(name, version))

    def find(self, name: str, wanted: str | None) -> Version:
        """The version of this number or label, ready or not, for questions about it. It is not kept open.  Raises: Refusal (404,
        503).
        """
        served = self.served(name)
        version = served.pick(wanted)
        if version is None:
            raise _not_there(served, wanted)
        return version

    # -- changes: one thread at a time ---------------------------------------------------------------------------------------

    def add(self, version: Version) -> None:
        """Puts a version beside the others; nothing is answered by it yet."""
        version.sketch = OutputSketch() if self._sketches else None
        version.arrange(max_sequences=self._max_sequences, sequence_idle_s=self._sequence_idle_s)
        served = self.models.get(version.name)
        if served is None:
            served = Served(version.name)
            served.versions[version.number] = version
            self.models = {**self.models, version.name: served}
            return
        served.versions = {**served.versions, version.number: version}

    def replace(self, version: Version) -> None:
        """Puts a version in the place of the one with its number, which is drained and closed; it answers where that one did,
        and where nothing does.
        """
        served = self.models.get(version.name)
        old = served.versions.get(version.number) if served else None
        self.add(version)
        served = self.models[version.name]
        served.end_canary()
        if served.active is None or served.active is old:
            served.active = version
        if served.previous is not None and served.previous is old:
            served.previous = None
        if old is not None:
            self._retire(old)

    def activate(self, name: str, number: int) -> Served:
        """One reference switch; the version that was active stays loaded as `previous`.  Raises: Refusal (404, 409)."""
        served = self.served(name)
        version = served.versions.get(number)
        if version is None or version.state != "READY":
            detail = f": {version.reason}" if version is not None and version.reason else ""
            raise Refusal(409, f"model {name!r} version {number} is not loaded{detail}; load it first", code="not_loaded")
        if served.active is version:
            return served
        superseded = served.previous if served.previous is not version else None
        served.active, served.previous = version, served.active
        served.end_canary()
        served.activations += 1
        if superseded is not None:
            self._drop(served, superseded)
        return served

    def keep_only(self, name: str, number: int) -> Served:
        """Makes version `number`, which must be loaded, the only one: everything else is drained and unloaded."""
        before = self.served(name).active
        served = self.activate(name, number)
        served.rollbacks += before is not None and served.active is not before
        served.previous = None
        for version in [v for v in served.versions.values() if v is not served.active]:
            self._drop(served, version)
        return served

    def commit(self, name: str) -> Served:
        """Unloads `previous`.  Raises: Refusal (404)."""
        served = self.served(name)
        previous, served.previous = served.previous, None
        if previous is not None:
            self._drop(served, previous)
        return served

    def unload(self, name: str, number: int | None) -> Served | None:
        """One version, or the whole model when None. None when the model is gone.  Raises: Refusal (404, 409)."""
        served = self.served(name)
        if number is None:
            self.unload_models({name})
            return None
        found = served.versions.get(number)
        if found is None:
            return served
        if found is served.active:
            raise Refusal(409, f"version {number} of model {name!r} is active; activate another one first", code="active")
        if found is served.previous:
            served.previous = None
        self._drop(served, found)
        if not served.versions:
            self.models = {n: s for n, s in self.models.items() if n != name}
            return None
        return served

    def unload_models(self, names: Collection[str]) -> None:
        """All versions of these models, where they are there. None of them answers any more before the first one is drained."""
        gone = [served for served in self if served.name in names]
        self.models = {name: served for name, served in self.models.items() if name not in names}
        versions = [version for served in gone for version in served.versions.values()]
        for served in gone:
            served.end_canary()
            served.active = served.previous = None
            served.versions = {}
        for version in versions:
            self._retire(version)

    def close(self) -> None:
        self.unload_models(set(self.models))

    def supersede(self, version: Version, old: Version) -> Served:
        """Makes a version active in place of one that is away, which goes."""
        self.add(version)
        served = self.models[version.name]
        served.end_canary()
        served.active = version
        served.activations += 1
        if served.previous is old:
            served.previous = None
        self._drop(served, old)
        return served

    def _drop(self, served: Served, version: Version) -> None:
        canary = served.canary
        if canary is not None and canary.candidate is version:
            served.end_canary()
        served.versions = {number: v for number, v in served.versions.items() if v is not version}
        self._retire(version)

    def _retire(self, version: Version) -> None:
        if version.part():
            self.on_close(version)
        version.retire()


def unknown_model(name: str) -> Refusal:
    return Refusal(404, f"Request for unknown model: '{name}' is not found", code="not_found")


def _not_there(served: Served, wanted: str | None) -> Refusal:
    if wanted is not None:
        return Refusal(404, f"Request for unknown model: '{served.name}' version {wanted} is not found", code="not_found")
    reasons = "; ".join(f"version {v.number}: {v.reason or v.state}" for v in served.versions.values())
    return Refusal(
        503, f"model '{served.name}' has no version at ready state ({reasons or 'none is loaded'})", code="unavailable"
    )


def _not_ready_text(name: str, version: Version) -> str:
    reason = f": {version.reason}" if version.reason else ""
    return f"Request for unknown model: '{name}' version {version.number} is not at ready state{reason}"
