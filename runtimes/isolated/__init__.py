"""A model in a process of its own, behind the same contract: when its engine crashes, that process ends and no other.

Tensors cross in memory that both processes map, small messages over socket pairs. A run costs one copy of the inputs, one of
the outputs, and two switches of processes.

model      what the contract asks for
slot       one run at a time
process    the child, seen from here
child      what runs there
wire       what both say to each other
"""

from __future__ import annotations

from runtimes.isolated.model import IsolatedModel, load

__all__ = ["IsolatedModel", "load"]
