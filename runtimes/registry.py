"""Finds the runtime that loads a model: by name, as release manifests say it, or by the suffix of a file."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import cast

from runtimes.contract import CONTRACT_VERSION, ModelInvalid, Runtime, RuntimeUnavailable
from runtimes.file_kinds import what_it_is

GROUP = "edge_agent.runtimes"


@cache
def _registered() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def names() -> list[str]:
    """Every registered runtime, whether or not its engine is installed."""
    return sorted(_registered())


@cache
def find(name: str) -> Runtime:
    """The runtime called `name`. Its engine is imported only when a model is loaded.

    Raises: RuntimeUnavailable when none is registered, its code cannot be imported, or it speaks another contract version.
    """
    point = _registered().get(name)
    if point is None:
        raise RuntimeUnavailable(f"no runtime {name!r} is installed (installed: {', '.join(names()) or 'none'})")
    try:
        runtime = cast("Runtime", point.load()())
    except Exception as error:
        raise RuntimeUnavailable(f"runtime {name!r} ({point.value}) cannot be imported: {error}") from error
    version = getattr(runtime, "contract_version", None)
    if version != CONTRACT_VERSION:
        raise RuntimeUnavailable(
            f"runtime {name!r} ({point.value}) follows contract version {version}, this agent needs {CONTRACT_VERSION}: update it"
        )
    return runtime


def for_file(path: Path) -> Runtime:
    """The runtime whose suffixes fit `path`.

    Raises: ModelInvalid when no runtime takes such files. A runtime that cannot be imported hides only its own suffixes.
    """
    suffix = path.suffix.lower()
    known: list[str] = []
    for name in names():
        try:
            runtime = find(name)
        except RuntimeUnavailable:
            continue
        if suffix in runtime.suffixes:
            return runtime
        known.extend(runtime.suffixes)
    what = what_it_is(path)
    if what is not None:
        raise ModelInvalid(f"{path.name} is {what}")
    raise ModelInvalid(f"{path.name}: no runtime takes files ending in {suffix!r} (known: {', '.join(known) or 'none'})")
