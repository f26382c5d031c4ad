"""From a file to a warm model version, and what it cost."""

from __future__ import annotations

import gc
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from agent.contract.manifest import Picture, Serving, listed
from agent.host import memory, priority
from agent.serving.models.cost import Cost, NeverCheap
from agent.serving.models.version import Version
from agent.store import Release, hash_model
from agent.variants import prepared
from runtimes import hazards, onnx_external, registry
from runtimes.check import read_npz, zeros
from runtimes.contract import Array, InputInvalid, LoadOptions, Model, ModelInvalid, RunFailed, Runtime, RuntimeFailure, Scalar
from runtimes.messages import without_paths
from runtimes.naming import Interfaces

log = logging.getLogger(__name__)

LOADS_BETWEEN_COLLECTIONS = 16
MAX_LABELS_CHARACTERS = 16 * 1024 * 1024


_loads = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds. `load_s`: loading a model and running it for the first time. `run_s`: one run of a model with a process of its
    own.
    """

    load_s: float = 120.0
    run_s: float = 60.0


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Source:
    """What to load as one version of a model. An empty `runtime` is found by the file's suffix. `sha256` is of all its files.

    `data` are the other files of the model, by the name that it has for each; None where they could not be found out, which
    loading says.
    """

    name: str
    version: int
    path: Path
    sha256: str
    runtime: str = ""
    data: Mapping[str, Path] | None = None
    libraries: tuple[Path, ...] = ()  # with operators for its engine
    variant: str = ""
    options: Mapping[str, Scalar] = field(default_factory=dict)
    serving: Serving = field(default_factory=Serving)
    state: Mapping[str, str] = field(default_factory=dict)
    picture: Picture | None = None
    filename: str = ""  # as people know it; empty: that of `path`
    labels: Mapping[str, Path] = field(default_factory=dict)  # of some outputs: a text file, a class per line
    warm_up: Path | None = None  # an .npz of inputs; None: zeros
    warm_up_signature: str = ""  # which they are for

    @property
    def others(self) -> dict[str, Path]:
        """What it is made of besides `path`."""
        return {**(self.data or {}), **listed(self.libraries)}


def source_of(release: Release) -> Source:
    variant, files = release.variant, release.manifest.files
    blobs = release.path.parent
    warm_up = [golden for golden in release.manifest.acceptance.golden if golden.name == variant.serving.warm_up]
    return Source(
        name=release.manifest.model,
        version=release.manifest.version,
        path=release.path,
        sha256=release.manifest.model_sha256(variant),
        runtime=variant.runtime,
        data=release.data,
        libraries=release.libraries,
        variant=variant.name,
        options=variant.options,
        serving=variant.serving,
        state=variant.state,
        picture=variant.picture,
        filename=variant.file,
        warm_up=blobs / files[warm_up[0].inputs].sha256 if warm_up else None,
        warm_up_signature=warm_up[0].signature if warm_up else "",
        labels={t.name: blobs / files[t.labels].sha256 for t in release.manifest.outputs if t.labels},
    )


def of_file(source: Source) -> Source:
    """The source of a file given by hand, as it is on the disk now: with its other files, and hashed.

    Raises: StoreError when it is not there; OSError.
    """
    data = None
    if source.path.is_file():
        with suppress(RuntimeFailure):
            data = onnx_external.all_beside(source.path)
    source = replace(source, data=data)
    return replace(source, sha256=hash_model(source.path, source.others))


def has_changed(source: Source) -> bool:
    """Whether its files are others than those it was made for.  Raises: StoreError when one is not there; OSError."""
    return hash_model(source.path, source.others) != source.sha256


def reason(source: Source, error: BaseException | str) -> str:
    """Why it could not be loaded, for whoever asks: with the name that people know it by, and no path of this machine."""
    text = str(error)
    if source.filename and source.path.name:
        text = text.replace(source.path.name, source.filename)
    return without_paths(text)


Guard = Callable[[Source], AbstractContextManager[None]]


def unguarded(_source: Source) -> AbstractContextManager[None]:
    return nullcontext()


def load(source: Source, *, threads: int, limits: Limits = DEFAULT_LIMITS, guard: Guard = unguarded) -> Version:
    """The version, READY and warm. May take seconds, hang, or kill the process: a release was tried in another one before, a
    file is rehearsed in a copy. Only what is isolated is held to the limits; whatever else is loaded, is within `guard`.

    Raises: ModelInvalid, RuntimeUnavailable, MemoryError.
    """
    started = time.perf_counter()
    runtime = registry.find(source.runtime) if source.runtime else registry.for_file(source.path)
    dangers = hazards.find(runtime.name, source.path)
    if _needs_a_process(source, dangers):
        return _load_isolated(source, runtime, threads, limits, started, dangers)
    log.info("loading model %r version %d from %s", source.name, source.version, source.filename or source.path.name)
    runtime.version()  # which imports the engine: what that takes is not this model's
    before = memory.resident_bytes()
    with guard(source):
        raw = priority.giving_way(runtime.load)(source.path, _options(source, threads))
        version = _finished(source, runtime, raw, NeverCheap() if dangers else Cost())
    load_s = time.perf_counter() - started
    memory.give_back()  # engines read the file into memory that they do not need afterwards
    version.took(load_s, max(0, memory.resident_bytes() - before))
    _keep_from_the_collector()
    _log_loaded(version)
    return version


def _keep_from_the_collector() -> None:
    """What was loaded lives long, and is not to be walked again and again. What was unloaded lies among it: now and then all is
    looked through, which takes some milliseconds.
    """
    if next(_loads) % LOADS_BETWEEN_COLLECTIONS == 0:
        gc.unfreeze()
    gc.collect()
    gc.freeze()


def is_isolated(source: Source) -> bool:
    """Whether it is loaded into a process of its own.  Raises: ModelInvalid, RuntimeUnavailable when no runtime takes it."""
    runtime = registry.find(source.runtime) if source.runtime else registry.for_file(source.path)
    return _needs_a_process(source, hazards.find(runtime.name, source.path))


def _needs_a_process(source: Source, dangers: Sequence[str]) -> bool:
    isolation = source.serving.isolation
    return isolation == "process" or (isolation == "auto" and bool(dangers or source.libraries))


def _load_isolated(
    source: Source, runtime: Runtime, threads: int, limits: Limits, started: float, dangers: Sequence[str]
) -> Version:
    """The version, loaded in a process of its own: the engine is not even imported here."""
    from runtimes import isolated

    raw = priority.giving_way(isolated.load)(
        runtime.name, source.path, _options(source, threads), slots=source.serving.instances, limit_s=limits.load_s
    )
    raw.run_limit_s = limits.load_s  # its first run may optimise
    version = _finished(source, runtime, raw, NeverCheap())
    if not raw.is_alive:
        raw.close()
        raise ModelInvalid(f"its process ended in its first run ({raw.ending}){_other_inputs(source)}")
    raw.run_limit_s = limits.run_s
    if dangers:
        log.info(
            "model %r version %d has a process of its own (serving: {isolation: in-process} accepts the risk): %s",
            source.name, source.version, "; ".join(dangers),
        )  # fmt: skip
    version.took(time.perf_counter() - started, raw.memory_bytes, raw)
    _log_loaded(version)
    return version


def _other_inputs(source: Source) -> str:
    """What to do about a first run on zeros that went wrong; only a release can say anything else."""
    if source.warm_up is not None or not source.variant:
        return ""
    return ", which was on zeros: a release may name a golden case for it (serving: {warm_up: NAME})"


def _options(source: Source, threads: int) -> LoadOptions:
    return LoadOptions(
        threads=int(source.options.get("threads", threads)), extra=source.options, data=source.data, libraries=source.libraries
    )


def _finished(source: Source, runtime: Runtime, raw: Model, cost: Cost) -> Version:
    """The version with this model, as it is declared, warm.  Raises: ModelInvalid, RuntimeUnavailable, and `raw` is closed."""
    model = prepared(raw, state=source.state, serving=source.serving, picture=source.picture)
    version = Version(source.name, source.version, source.variant or runtime.name, source.sha256, runtime.name, cost)
    version.source = source
    version.serving = source.serving
    version.picture = source.picture
    version.filename = source.filename or source.path.name
    version.labels = {output: _read_labels(version, output, path) for output, path in source.labels.items()}
    try:
        run_s = priority.giving_way(warm_up)(version, model, source)
    except BaseException:
        model.close()
        raise
    version.ready(model, run_s)
    return version


def _read_arrays(version: Version, path: Path) -> dict[str, Array] | None:
    """None when the file cannot be used: a model answers without having been warm, too."""
    try:
        return read_npz(path)
    except ValueError as error:
        log.warning("model %r version %d: its inputs to warm up with cannot be read: %s", version.name, version.number, error)
        return None


def _read_labels(version: Version, output: str, path: Path) -> tuple[str, ...]:
    """None of them when the file cannot be used: a model answers without names for its classes too."""
    try:
        with path.open(encoding="utf-8") as file:
            return tuple(file.read(MAX_LABELS_CHARACTERS).splitlines())
    except (OSError, ValueError) as error:
        log.warning(
            "model %r version %d: the labels of output %r cannot be read: %s", version.name, version.number, output, error
        )
        return ()


def failed(source: Source, why: str) -> Version:
    """A version that could not be loaded, to be listed with its reason."""
    version = Version(source.name, source.version, source.variant, source.sha256, source.runtime)
    version.source = source
    version.failed(reason(source, why))
    return version


def warm_up(version: Version, model: Model, source: Source) -> float | None:
    """One run, on zeros where its release names no `inputs`, fills the engine's caches; a second one tells what a run costs:
    its time in seconds.

    None when there was no run that worked.

    A model may fail on them and be good: zero means nothing as a size, a position, a factor to resize by.
    """
    inputs, outputs = source.warm_up, None
    feeds = _read_arrays(version, inputs) if inputs is not None else None
    if feeds is None:
        feeds = zeros(model.inputs)
    else:
        try:
            interface = Interfaces.of(model).find(source.warm_up_signature)
        except KeyError:
            raise ModelInvalid(f"it is to be warmed up with signature {source.warm_up_signature!r}, which it has not") from None
        feeds, outputs = interface.own_names(feeds), interface.asked
    if feeds is None:
        return None
    run_s = None
    try:
        for _ in range(2):
            started = time.perf_counter()
            model.run(feeds, outputs)
            run_s = time.perf_counter() - started
    except (InputInvalid, RunFailed) as error:
        what = "its inputs" if inputs is not None else "inputs of zeros"
        log.info("model %r version %d was not warmed up, it fails on %s: %s", version.name, version.number, what, error)
        return None
    return run_s


def _log_loaded(version: Version) -> None:
    placement = version.placement
    log.info(
        "loaded model %r version %d (%s on %s) in %.1f ms, %.1f MB",
        version.name, version.number, version.runtime, placement.actual, version.loaded.load_s * 1e3, version.loaded.memory_bytes / 1e6,
    )  # fmt: skip
    if placement.fallback:
        log.warning("model %r version %d: %s", version.name, version.number, placement.fallback)
