"""Many requests, one run: which may go together, their inputs joined along the first dimension, and the outputs split again."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from agent.serving.answers import Refusal
from runtimes.contract import Array, RunFailed, TensorSpec

Feeds = Mapping[str, Array]


def rows_of(model: str, specs: Sequence[TensorSpec], feeds: Feeds, max_batch_size: int) -> int:
    """How many rows a request has; 1 for one that runs alone. `specs` are the model's own inputs.

    Raises: Refusal (400) when its inputs disagree or when they are too many for one run.
    """
    if not _may_join(specs, feeds):
        return 1
    sizes = {name: array.shape[0] for name, array in feeds.items()}
    rows = max(sizes.values(), default=1)
    if len(set(sizes.values())) > 1:
        raise Refusal(400, f"the inputs of a request for model '{model}' must have one batch size, got {sizes}")
    if rows > max_batch_size:
        raise Refusal(400, f"inference request batch-size must be <= {max_batch_size} for '{model}', got {rows}")
    return rows


def key_of(specs: Sequence[TensorSpec], feeds: Feeds, outputs: Sequence[str] | None) -> Hashable:
    """Requests of equal keys may go together; None: it runs alone."""
    if not _may_join(specs, feeds):
        return None
    return (
        tuple([feeds[spec.name].shape[1:] for spec in specs if not spec.optional]),
        None if outputs is None else tuple(outputs),
    )


def _may_join(specs: Sequence[TensorSpec], feeds: Feeds) -> bool:
    """Not when it gives an optional input, which may have no rows, or asks for another signature than the default one."""
    required = [spec.name for spec in specs if not spec.optional]
    return len(feeds) == len(required) and all(name in feeds and feeds[name].ndim for name in required)


def join(requests: Sequence[Feeds]) -> dict[str, Array]:
    return {name: np.concatenate([feeds[name] for feeds in requests]) for name in requests[0]}


def split(arrays: Sequence[Array], rows: Sequence[int]) -> list[list[Array]]:
    """For each request its rows of every output.  Raises: RunFailed when the model did not keep the rows apart."""
    total = sum(rows)
    for array in arrays:
        if array.ndim == 0 or array.shape[0] != total:
            raise RunFailed(f"an output has shape {list(array.shape)} for a batch of {total} rows")
    found, at = [], 0
    for count in rows:
        found.append([array[at : at + count] for array in arrays])
        at += count
    return found
