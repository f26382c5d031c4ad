"""From a file to a warm model version, and what it cost."""

from __future__ import annotations

import gc
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from agent.serving.host import Version
from agent.store import Release
from runtimes import registry
from runtimes.contract import Array, InputInvalid, LoadOptions, Model, RunFailed, Scalar, TensorSpec

log = logging.getLogger(__name__)

MAX_WARM_UP_BYTES = 256 * 1024 * 1024  # inputs larger than this are not worth a run on zeros


@dataclass(frozen=True, slots=True)
class Source:
    """One file to load as one version of a model. An empty `runtime` is found by the file's suffix."""

    name: str
    version: int
    path: Path
    sha256: str
    runtime: str = ""
    variant: str = ""
    options: Mapping[str, Scalar] = field(default_factory=dict)


def source_of(release: Release) -> Source:
    variant = release.variant
    return Source(
        name=release.manifest.model,
        version=release.manifest.version,
        path=release.path,
        sha256=release.manifest.files[variant.file].sha256,
        runtime=variant.runtime,
        variant=variant.name,
        options=variant.options,
    )


def load(source: Source, *, threads: int) -> Version:
    """The version, READY and warm. May take seconds and may kill the process: a release was tried in another one before.

    Raises: ModelInvalid, RuntimeUnavailable, MemoryError.
    """
    started, memory = time.perf_counter(), _resident_bytes()
    runtime = registry.find(source.runtime) if source.runtime else registry.for_file(source.path)
    threads = int(source.options.get("threads", threads))
    model = runtime.load(source.path, LoadOptions(threads=threads, extra=source.options))
    version = Version(source.name, source.version, source.variant or runtime.name, source.sha256, runtime.name)
    try:
        _warm_up(version, model)
    except BaseException:
        model.close()
        raise
    version.ready(model)
    version.load_s = time.perf_counter() - started
    version.memory_bytes = max(0, _resident_bytes() - memory)
    gc.collect()
    gc.freeze()  # what was loaded lives long: keep the collector from walking it again and again
    _log_loaded(version)
    return version


def failed(source: Source, reason: str) -> Version:
    """A version that could not be loaded, to be listed with its reason."""
    version = Version(source.name, source.version, source.variant, source.sha256, source.runtime)
    version.failed(reason)
    return version


def _warm_up(version: Version, model: Model) -> None:
    """One run on zeros fills the engine's caches, a second one tells what a run costs.

    A model may fail on them and be good: zero means nothing as a size, a position, a factor to resize by.
    """
    feeds = _zeros(model.inputs)
    if feeds is None:
        return
    try:
        for _ in range(2):
            started = time.perf_counter()
            model.run(feeds)
            version.cost_s = time.perf_counter() - started
    except (InputInvalid, RunFailed) as error:
        log.info("model %r version %d was not warmed up, it fails on inputs of zeros: %s", version.name, version.number, error)


def _zeros(specs: tuple[TensorSpec, ...]) -> dict[str, Array] | None:
    """An array per input, free sizes being 1. None when zeros would mean nothing."""
    if any(spec.datatype == "BYTES" for spec in specs):
        return None
    shapes = [tuple(1 if size == -1 else size for size in spec.shape) for spec in specs]
    size = sum(math.prod(shape) * spec.dtype.itemsize for shape, spec in zip(shapes, specs, strict=True))
    if size > MAX_WARM_UP_BYTES:
        return None
    return {spec.name: np.zeros(shape, spec.dtype) for shape, spec in zip(shapes, specs, strict=True)}


def _resident_bytes() -> int:
    with Path("/proc/self/statm").open("rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _log_loaded(version: Version) -> None:
    placement = version.placement
    log.info(
        "loaded model %r version %d (%s on %s) in %.1f ms, %.1f MB",
        version.name, version.number, version.runtime, placement.actual, version.load_s * 1e3, version.memory_bytes / 1e6,
    )  # fmt: skip
    if placement.fallback:
        log.warning("model %r version %d: %s", version.name, version.number, placement.fallback)
