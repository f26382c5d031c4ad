"""What an inference engine must offer. A runtime is about a hundred lines plus its own dependency.

Third parties register a class that satisfies `Runtime` under the entry point group `edge_agent.runtimes`; the name of the
entry point is the runtime's name in release manifests. `contract_version` is checked before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

CONTRACT_VERSION = 1

Array = NDArray[Any]
Scalar = str | int | float | bool

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BF16": np.dtype(np.uint16),
    "BYTES": np.dtype(np.object_),
}
"""Open Inference Protocol datatype → NumPy dtype of the arrays that cross this contract. BYTES arrays hold `bytes` objects;
BF16, which NumPy does not have, crosses as its 16 bits: the upper half of a float32.
"""

DATATYPES: Mapping[np.dtype[Any], str] = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}
"""What an array of this dtype is when nothing else is said: uint16 is UINT16."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """real = scale * (quantized - zero_point). One pair for the tensor, or one per index along `axis`."""

    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    axis: int | None = None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of a loaded model. `shape` has -1 where any size goes; it is (-1,) where any number of dimensions
    does, too.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    quantization: Quantization | None = None
    optional: bool = False  # an input that the model has a value for
    any_rank: bool = False

    @property
    def dtype(self) -> np.dtype[Any]:
        return DTYPES[self.datatype]

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether an array of this shape may be it."""
        return self.any_rank or (
            len(shape) == len(self.shape) and all(d in (-1, a) for a, d in zip(shape, self.shape, strict=True))
        )


@dataclass(frozen=True, slots=True)
class Signature:
    """A way to ask a model that its file has a name for. `inputs` and `outputs`: its names for tensors, in order, and the
    tensors, whose own names are those that `Model.run` takes.
    """

    name: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]


@dataclass(frozen=True, slots=True)
class Placement:
    """What a model really runs on. `fallback` says in words why it is not what was asked for; None when it is."""

    requested: str
    actual: str
    fallback: str | None = None


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """`threads` is how many one run may use (0: the engine's choice). `extra` holds the variant's options from the manifest.

    `data` are the other files of a model that is several: its own name for each, and where that is. None: they lie beside the
    model. `libraries` are files of native code with operators that the engine does not have.
    """

    threads: int = 1
    extra: Mapping[str, Scalar] = field(default_factory=dict)
    data: Mapping[str, Path] | None = None
    libraries: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Description:
    """What is inside a model file. `providers` says of each provider that this machine's engine has how many of the file's
    operators it takes; `weights_bytes` is None where it is not known.
    """

    format: str = ""
    operators: Mapping[str, int] = field(default_factory=dict)
    weights_bytes: int | None = None
    providers: Mapping[str, int] = field(default_factory=dict)


class RuntimeFailure(Exception):
    """Root of what a runtime raises; foreign exceptions are translated into one of these."""


class ModelInvalid(RuntimeFailure):
    """The file is not a model this runtime can load: truncated, another format, an unknown operator. Trying again is useless."""


class InputInvalid(RuntimeFailure):
    """The caller's arrays do not fit the model. The message names the input and says what was expected."""


class RunFailed(RuntimeFailure):
    """The engine failed on inputs that fit the declared shapes and types."""


class RuntimeUnavailable(RuntimeFailure):
    """The engine or its hardware is missing here; the message says what to install."""


class Model(Protocol):
    """A loaded model. `run` may be called from several threads at once."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def placement(self) -> Placement: ...

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Array]:
        """The named `outputs` (all of them, in the model's order, when None). `feeds` holds every input but optional ones,
        C-contiguous.

        The returned arrays belong to the caller. Raises: InputInvalid, RunFailed.
        """

    def close(self) -> None:
        """Gives the engine's memory back. Nothing may be called afterwards."""


class ModelSequence(Protocol):
    """A model's memory of one sequence of runs. One run at a time; different sequences may run at once."""

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Array]:
        """As `Model.run`, going on from the state that the run before it left.

        Raises: InputInvalid, and the state is as it was; RunFailed, and the state is lost.
        """

    def close(self) -> None:
        """Gives its memory back. May be called after the model's own `close`."""


@runtime_checkable
class Signed(Protocol):
    """What a Model has in addition when its file names ways to ask it. The inputs and outputs of the Model are those of one of
    them.
    """

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """The first is the default one, of the Model's own `inputs` and `outputs`. Whoever runs another one names its outputs."""


@runtime_checkable
class Stateful(Protocol):
    """What a Model has in addition when its engine can carry state from one run to the next. Its `run` must not."""

    @property
    def stateful(self) -> bool:
        """Whether this one has any state."""

    def sequence(self) -> ModelSequence:
        """A new sequence, at its beginning.  Raises: RunFailed."""


@runtime_checkable
class Growing(Protocol):
    """What a Model has in addition when its engine keeps memory of large runs for the next ones."""

    @property
    def grown_bytes(self) -> int:
        """What runs have left with it, beyond what loading took."""


class Runtime(Protocol):
    """Loads models of one format."""

    contract_version: int
    name: str
    suffixes: tuple[str, ...]

    def version(self) -> str:
        """The engine and its version, such as `onnxruntime 1.31.1`.  Raises: RuntimeUnavailable."""

    def load(self, path: Path, options: LoadOptions) -> Model:
        """Raises: ModelInvalid, RuntimeUnavailable. May crash the process on a hostile file: try it in a child first."""


@runtime_checkable
class Describing(Protocol):
    """What a Runtime has in addition when it can say what is inside a model file, for people who look at a file before they
    serve it.
    """

    def outline(self, path: Path) -> Description:
        """What the file itself says, without any engine: its providers are not known."""

    def describe(self, path: Path, options: LoadOptions) -> Description:
        """What the engine says, too. Loads the model, so it belongs into a process that may die."""


def is_stateful(model: Model | None) -> bool:
    """Whether runs of the model can belong to sequences, which share state."""
    found: object = model
    return isinstance(found, Stateful) and found.stateful


def signatures_of(model: Model) -> tuple[Signature, ...]:
    """The ways to ask the model that its file names; none where it names none."""
    found: object = model
    return found.signatures if isinstance(found, Signed) else ()
