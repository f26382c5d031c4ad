"""The release manifest: what a publisher signs. A TUF target named `releases/<model>/<version>.json`.

Whatever changes behaviour (labels, acceptance, runtime options) is in the release, so weights and labels cannot be mixed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

from agent.contract import names
from agent.contract.acceptance import Acceptance
from agent.contract.codec import FORMAT, Document, decode, require_format

MAX_MANIFEST_BYTES = 4 * 1024 * 1024  # a 100 GB release in 64 KiB blocks would not fit; such releases use larger blocks
DATATYPES = frozenset(
    ["BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BF16", "BYTES"]
)

T = TypeVar("T")
Scalar = str | int | float | bool


class Block(Document, frozen=True, kw_only=True):
    """A stretch of a file, in order, for resume and delta. The sizes of a file's blocks add up to its size."""

    sha256: str
    size_bytes: int

    def __post_init__(self) -> None:
        names.check(names.SHA256, self.sha256, "block sha256")
        if self.size_bytes < 1:
            raise ValueError("a block has at least one byte")


class File(Document, frozen=True, kw_only=True):
    """One file of a release: immutable bytes known by their hash."""

    sha256: str
    size_bytes: int
    blocks: tuple[Block, ...] = ()

    def __post_init__(self) -> None:
        names.check(names.SHA256, self.sha256, "file sha256")
        if self.size_bytes < 0:
            raise ValueError("size_bytes must not be negative")
        if self.blocks and sum(b.size_bytes for b in self.blocks) != self.size_bytes:
            raise ValueError("the blocks of a file must add up to its size_bytes")


class Requires(Document, frozen=True, kw_only=True):
    """What a device must have to run a variant. Empty means no demand."""

    arch: tuple[str, ...] = ()
    accelerator: str | None = None
    runtime_version: str | None = None
    memory_bytes: int | None = None


class Serving(Document, frozen=True, kw_only=True):
    """How a device lets requests wait for a variant, and how it runs them. Every default leaves a model as fast as it is
    alone.
    """

    max_batch_size: int = 1
    """Rows that one run takes at most. Above 1, requests of equal shapes are gathered; the first size of every input and output
    must then be -1, and a request of more rows is refused."""
    max_delay_us: int = 0
    """How long the first request of a batch waits for others. 0: what waits anyway is gathered, and nobody waits for it."""
    preferred_batch_sizes: tuple[int, ...] = ()
    """A batch that has one of these sizes runs without waiting for more."""
    instances: int = 0
    """Runs of this model that go on at once. 0: as many as there are threads."""
    max_queue_size: int = 256
    """Requests that wait at most; one more is refused."""
    default_timeout_us: int = 0
    """For requests that name no timeout. 0: they wait as long as it takes."""
    priority_levels: int = 10
    """Priorities go from 1, the highest, to this one. A request that names a larger number has the lowest."""
    default_priority: int = 5
    """For requests that name none."""
    warm_up: str = ""
    """The golden case whose inputs the model is run on when it is loaded. Empty: zeros."""
    isolation: Literal["auto", "process", "in-process"] = "auto"
    """process: the engine runs in a process of its own. A run takes some 50 µs longer; a crash, or a run that does not end,
    costs this model and no other, and memory goes back to the machine when it is unloaded. auto: where the file has operators
    with which a request could end or hang the process. in-process: never, and that risk is accepted."""

    def __post_init__(self) -> None:
        for name, least in (("max_batch_size", 1), ("max_queue_size", 1), ("priority_levels", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("max_delay_us", "instances", "default_timeout_us"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        for size in self.preferred_batch_sizes:
            if not 1 <= size <= self.max_batch_size:
                raise ValueError(f"preferred batch size {size} must be from 1 to max_batch_size {self.max_batch_size}")
        if not 1 <= self.default_priority <= self.priority_levels:
            raise ValueError(
                f"default_priority {self.default_priority} must be from 1 to priority_levels {self.priority_levels}"
            )


class Picture(Document, frozen=True, kw_only=True):
    """What becomes of a JPEG or PNG before the model, and of the model's scores after it. Each value is (pixel * scale - mean)
    / std, pixels being 0 to 255; an input that is quantized is quantized with its own scale and zero point. Without scale, mean
    and std an input of whole numbers gets the pixels as they are.
    """

    width: int
    height: int
    input: str = ""
    """Empty: the only one."""
    fit: Literal["cover", "contain", "stretch"] = "cover"
    """cover: fill the size and cut off what is over, evenly. contain: all of the picture, with bars of `fill`. stretch: as it
    comes."""
    fill: int = 0
    filter: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    color: Literal["rgb", "bgr", "gray"] = "rgb"
    layout: Literal["nchw", "nhwc"] = "nchw"
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    output: str = ""
    """Where the scores of the classes are. Empty: the only one."""
    scores: Literal["as-is", "softmax"] = "as-is"
    top: int = 5
    """How many labels the answer has, when the request does not say."""

    def __post_init__(self) -> None:
        for name in ("width", "height", "top"):
            if not 1 <= getattr(self, name) <= 16384:
                raise ValueError(f"{name} of a picture is {getattr(self, name)}; it must be from 1 to 16384")
        if not 0 <= self.fill <= 255:
            raise ValueError(f"fill of a picture is {self.fill}; it must be from 0 to 255")
        channels = 1 if self.color == "gray" else 3
        for name in ("mean", "std"):
            if getattr(self, name) and len(getattr(self, name)) != channels:
                raise ValueError(f"{name} of a picture has {len(getattr(self, name))} values; {self.color} has {channels}")
        if any(value == 0 for value in self.std) or self.scale == 0:
            raise ValueError("scale and std of a picture must not be 0")

    @property
    def normalises(self) -> bool:
        return bool(self.mean or self.std) or self.scale != 1.0


class Variant(Document, frozen=True, kw_only=True):
    """One model of the release for one runtime and hardware. Devices take the first variant that fits, in order.

    A model may be several files, as one over 2 GB always is. `data` lists those besides `file`: the name by which `file` itself
    calls each, and the file of the release that it is. Publishing finds them in an ONNX file. `libraries` are files with
    operators that the engine does not have (onnxruntime-extensions): native code, which is loaded with the model into a process
    of its own unless `isolation` says otherwise.

    `state` names inputs that carry what a model remembers from one run of a sequence to the next, and for each the output that
    it is fed from. Callers do not see these inputs.
    """

    name: str
    runtime: str
    file: str
    data: dict[str, str] = {}
    libraries: tuple[str, ...] = ()
    requires: Requires = Requires()
    options: dict[str, Scalar] = {}
    serving: Serving = Serving()
    state: dict[str, str] = {}
    picture: Picture | None = None

    def __post_init__(self) -> None:
        names.check(names.FILE_NAME, self.name, "variant name")
        for location in self.data:
            names.check_location(location)
        if any(not name or not output for name, output in self.state.items()):
            raise ValueError(f"state of variant {self.name!r} has an empty name; expected pairs of an input and an output")
        if len(set(self.state.values())) != len(self.state):
            raise ValueError(f"state of variant {self.name!r} feeds two inputs from one output")
        if self.state and self.serving.max_batch_size > 1:
            raise ValueError(f"variant {self.name!r} has state, so its requests cannot be batched: max_batch_size must be 1")

    @property
    def files(self) -> tuple[str, ...]:
        """The files of the release that its model is made of."""
        return (self.file, *self.data.values(), *self.libraries)


class Tensor(Document, frozen=True, kw_only=True):
    """A declared input or output. `shape` uses -1 for a dimension of any size; `labels` names a text file, a label per line."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    labels: str | None = None

    def __post_init__(self) -> None:
        if self.datatype not in DATATYPES:
            raise ValueError(f"datatype {self.datatype!r} of {self.name!r} is not one of {', '.join(sorted(DATATYPES))}")


class Provenance(Document, frozen=True, kw_only=True):
    """Who made the release, from what. Shown to operators; decides nothing."""

    publisher: str = ""
    created: str = ""
    source: str = ""
    licence: str = ""
    model_card: str | None = None
    notes: str = ""


class ReleaseManifest(Document, frozen=True, kw_only=True):
    """A release as its publisher signed it."""

    model: str
    version: int
    files: dict[str, File]
    variants: tuple[Variant, ...]
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    acceptance: Acceptance = Acceptance()
    provenance: Provenance = Provenance()
    kind: Literal["release"] = "release"
    format: int = FORMAT

    def __post_init__(self) -> None:
        require_format(self.format, "release manifest")
        self.ref  # noqa: B018 - checks model and version
        if not self.variants:
            raise ValueError("a release has at least one variant")
        if len({v.name for v in self.variants}) != len(self.variants):
            raise ValueError("two variants of a release have the same name")
        for name in self.files:
            names.check(names.FILE_NAME, name, "file name")
        cases = {golden.name for golden in self.acceptance.golden}
        for variant in self.variants:
            if variant.serving.warm_up and variant.serving.warm_up not in cases:
                raise ValueError(
                    f"variant {variant.name!r} is warmed up with {variant.serving.warm_up!r}, which is no golden case"
                )
        for name in self._named_files():
            if name not in self.files:
                raise ValueError(f"{name!r} is used but not among the release's files: {', '.join(sorted(self.files))}")

    def _named_files(self) -> set[str]:
        used = {name for v in self.variants for name in v.files}
        used |= {t.labels for t in (*self.inputs, *self.outputs) if t.labels}
        used |= {f for g in self.acceptance.golden for f in (g.inputs, g.expected)}
        if self.provenance.model_card:
            used.add(self.provenance.model_card)
        return used

    @property
    def ref(self) -> names.ReleaseRef:
        return names.ReleaseRef(self.model, self.version)

    @property
    def size_bytes(self) -> int:
        """The bytes of all distinct files."""
        return sum({f.sha256: f.size_bytes for f in self.files.values()}.values())

    def model_sha256(self, variant: Variant) -> str:
        """See the function of this name."""
        return model_sha256(
            self.files[variant.file].sha256,
            {name: self.files[file].sha256 for name, file in {**variant.data, **listed(variant.libraries)}.items()},
        )

    def model_bytes(self, variant: Variant) -> int:
        """The bytes of all files of the variant's model."""
        return sum({self.files[name].sha256: self.files[name].size_bytes for name in variant.files}.values())

    def variant(self, name: str) -> Variant:
        """Raises: KeyError when the release has no variant of that name."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise KeyError(name)


def listed(libraries: Sequence[T]) -> dict[str, T]:
    """Its libraries as what else belongs to a model, under names that no location has."""
    return {f"/{number}": library for number, library in enumerate(libraries)}


def model_sha256(file: str, data: Mapping[str, str]) -> str:
    """One hash for a model: that of its `file`; where it has `data` besides, that of the list of all their hashes, with the
    model's names.
    """
    if not data:
        return file
    lines = [file, *(f"{data[location]} {location}" for location in sorted(data))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def parse_manifest(data: bytes, *, expected: names.ReleaseRef | None = None) -> ReleaseManifest:
    """The manifest in `data`.

    Raises: ContractError when it breaks the format; ValueError when it is a valid manifest of another release than `expected`
    (a mix-and-match by whoever stored it).
    """
    manifest = decode(data, ReleaseManifest, limit_bytes=MAX_MANIFEST_BYTES)
    if expected is not None and manifest.ref != expected:
        raise ValueError(f"manifest stored as {expected} describes {manifest.ref}")
    return manifest
