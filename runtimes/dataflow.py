"""A model's graph as far as it matters which value depends on which: operators, the names of values, types, small constants.

`onnx_dataflow`, `ort_dataflow` and `tflite_dataflow` read it from files; `hazards` judges it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

CALL = "a function of the file"
"""The operator of a node that runs one."""


@dataclass(slots=True)
class Node:
    """`bodies` are the graphs that it runs: an If's branches; a Loop's body; a WHILE's condition and body, in this order."""

    op: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    bodies: Sequence[Graph] = ()
    type: str = ""  # of its first output, where the operator itself says it


@dataclass(slots=True)
class Graph:
    """Names are of values; in the bodies of ONNX the names outside are visible too. `types` are those that the file tells."""

    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Collection[int]] = field(default_factory=dict)  # the values of small integer ones
    types: dict[str, str] = field(default_factory=dict)
