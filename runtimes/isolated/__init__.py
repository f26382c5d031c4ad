"""A model in a process of its own, behind the same contract: when its engine crashes, that process ends and no other.

Tensors cross in memory that both processes map, small messages over socket pairs; `parent` has the model, `child` the process, `wire`
what they say to each other. A run costs one copy of the inputs and one of the outputs, and two switches of processes.
"""

from __future__ import annotations

from runtimes.isolated.parent import IsolatedModel, load

__all__ = ["IsolatedModel", "load"]
