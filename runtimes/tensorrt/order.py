"""What is to be built, and what the process that builds says, line by line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """The sizes that an input with free dimensions may have: the least, the one that is made fastest, and the most."""

    least: Shape
    usual: Shape
    most: Shape

    def __post_init__(self) -> None:
        if not len(self.least) == len(self.usual) == len(self.most):
            raise ValueError("the three shapes of a profile have as many dimensions")
        if any(not 0 < a <= b <= c for a, b, c in zip(self.least, self.usual, self.most, strict=True)):
            raise ValueError("the shapes of a profile grow from the least to the most, and no size is 0")


@dataclass(frozen=True, slots=True)
class Order:
    """One engine. `capability` is `sm86` or the like; empty for the GPU that is here. `batch`: the sizes of free dimensions of inputs that
    `profiles` does not name. `level`: how hard the builder tries, from 0 to 5; None is its own choice. `memory_bytes`: what a kernel
    may take while it runs, beyond its tensors.
    """

    model: Path
    capability: str = ""
    batch: tuple[int, int, int] = (1, 1, 1)
    profiles: dict[str, Profile] = field(default_factory=dict)
    level: int | None = None
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        Profile(*((size,) for size in self.batch))
        if self.level is not None and not 0 <= self.level <= 5:
            raise ValueError(f"level {self.level}: a builder's levels are 0 to 5")

    def encoded(self, out: Path) -> str:
        """As text for the process, which writes the engine to `out`."""
        return json.dumps({**asdict(self), "model": str(self.model), "out": str(out)})

    def settings(self) -> dict[str, Any]:
        """What the engine depends on besides the model and the library, in a form that is always the same."""
        said = asdict(self)
        del said["model"]
        return said


def decoded(text: str) -> tuple[Order, Path]:
    said = json.loads(text)
    profiles = {
        name: Profile(*(tuple(one[key]) for key in ("least", "usual", "most"))) for name, one in said["profiles"].items()
    }
    order = Order(
        Path(said["model"]), said["capability"], tuple(said["batch"]), profiles, said["level"], said["memory_bytes"],
    )  # fmt: skip
    return order, Path(said["out"])
