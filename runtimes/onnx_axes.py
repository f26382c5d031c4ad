"""Which axis of an input or output a scale per axis belongs to, when operators that only move elements lie between it and the
tensor that is quantized. Where that cannot be said, or no single axis has it, nothing is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

MOST = 16  # axes that are told apart where any number may be


class Mover(Protocol):
    """A node that moves elements. `numbers` are its attributes of integers and its constant inputs: axis, axes, perm, shape."""

    @property
    def op(self) -> str: ...

    @property
    def numbers(self) -> Mapping[str, Sequence[int]]: ...


@dataclass(frozen=True, slots=True)
class Axes:
    """The axes of a tensor: how many it has (None: unknown), and which one of the end each is. `sizes` are the end's, -1 where
    any goes.
    """

    rank: int | None
    ends: Mapping[int, int]
    sizes: Sequence[int] = ()

    @classmethod
    def of(cls, sizes: Sequence[int] | None) -> Axes:
        """The axes of the end itself; `sizes` None: it may have any number."""
        known = [-1] * MOST if sizes is None else sizes
        return cls(None if sizes is None else len(sizes), {axis: axis for axis in range(len(known))}, tuple(known))

    def end(self, axis: int) -> int | None:
        """The end's axis that this one is."""
        if axis < 0:
            if self.rank is None:
                return None
            axis += self.rank
        return self.ends.get(axis)

    def after(self, node: Mover) -> Axes:
        """The axes of what the node makes of this tensor."""
        rank, numbers = self.rank, node.numbers
        if node.op == "Identity":
            return self
        if rank is None:
            return replace(self, ends={})
        if node.op == "Transpose":
            perm = list(numbers.get("perm") or range(rank - 1, -1, -1))
            return self._made_of([[axis] for axis in perm])
        if node.op == "Flatten":
            at = numbers.get("axis", [1])[0]
            at += rank if at < 0 else 0
            return self._made_of([list(range(at)), list(range(at, rank))])
        if node.op == "Squeeze" and "axes" in numbers:
            gone = {axis % rank for axis in numbers["axes"]}
            return self._made_of([[axis] for axis in range(rank) if axis not in gone])
        if node.op == "Unsqueeze" and "axes" in numbers:
            whole = rank + len(numbers["axes"])
            new = {axis % whole for axis in numbers["axes"]}
            left = iter(range(rank))
            return self._made_of([[] if axis in new else [next(left)] for axis in range(whole)])
        if node.op == "Reshape" and "shape" in numbers:
            return self._reshaped(list(numbers["shape"]))
        return Axes(None, {}, self.sizes)

    def before(self, node: Mover) -> Axes:
        """The axes of what the node has made this tensor of."""
        rank, numbers = self.rank, node.numbers
        if node.op == "Identity":
            return self
        if node.op == "Transpose" and rank is not None:
            perm = list(numbers.get("perm") or range(rank - 1, -1, -1))
            return replace(self, ends={perm[axis]: end for axis, end in self.ends.items() if axis < len(perm)})
        if node.op == "Flatten" and numbers.get("axis", [1])[0] == 1:
            return Axes(None, {0: self.ends[0]} if 0 in self.ends else {}, self.sizes)
        if node.op == "Squeeze" and "axes" in numbers and rank is not None:
            whole = rank + len(numbers["axes"])
            new = {axis % whole for axis in numbers["axes"]}
            kept = [axis for axis in range(whole) if axis not in new]
            return replace(self, rank=whole, ends={kept[axis]: end for axis, end in self.ends.items()})
        if node.op == "Unsqueeze" and "axes" in numbers and rank is not None:
            gone = {axis % rank for axis in numbers["axes"]}
            kept = [axis for axis in range(rank) if axis not in gone]
            ends = {place: self.ends[axis] for place, axis in enumerate(kept) if axis in self.ends}
            return replace(self, rank=len(kept), ends=ends)
        return Axes(None, {}, self.sizes)

    def _made_of(self, groups: Sequence[Sequence[int]]) -> Axes:
        """Each of the new axes is made of these; it is one of the end's where all others in it have size 1."""
        ends = {}
        for axis, group in enumerate(groups):
            sized = [self.ends[one] for one in group if one in self.ends and self.sizes[self.ends[one]] != 1]
            known = all(one in self.ends for one in group)
            if known and len(sized) == 1:
                ends[axis] = sized[0]
            elif len(group) == 1 and group[0] in self.ends:
                ends[axis] = self.ends[group[0]]
        return replace(self, rank=len(groups), ends=ends)

    def _reshaped(self, shape: Sequence[int]) -> Axes:
        """Only axes of size 1 may come and go: then the others are what they were."""
        assert self.rank is not None
        sizes = [self.sizes[self.ends[axis]] if axis in self.ends else None for axis in range(self.rank)]
        shape = [sizes[axis] or 0 if size == 0 and axis < len(sizes) else size for axis, size in enumerate(shape)]
        old = [axis for axis, size in enumerate(sizes) if size != 1]
        new = [axis for axis, size in enumerate(shape) if size != 1]
        if [sizes[axis] for axis in old] != [shape[axis] for axis in new]:
            return Axes(len(shape), {}, self.sizes)
        ends = {place: self.ends[axis] for place, axis in zip(new, old, strict=True)}
        return replace(self, rank=len(shape), ends=ends)
