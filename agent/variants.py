"""From a loaded model to the one that its variant declares: with its state, and fit for batches and pictures where these are
declared.

`serve` and the trial both come through here, so that a release passes its trial only if it can be served as it says. Light
imports: the library for pictures is loaded only when a variant declares them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agent.contract.manifest import Picture, Serving
from runtimes.contract import Model, ModelInvalid, RuntimeUnavailable, TensorSpec, is_stateful
from runtimes.naming import Interfaces
from runtimes.state import DeclaredState

INSTALL = "install it with: pip install 'edge-inference-agent[images]'"


def prepared(model: Model, *, state: Mapping[str, str], serving: Serving, picture: Picture | None) -> Model:
    """The model as its variant wants it served; it owns `model`, which is closed when it cannot be.

    Raises: ModelInvalid when the model does not fit what is declared; RuntimeUnavailable when a library for it is missing here.
    """
    try:
        declared: Model = DeclaredState(model, state) if state else model
        check_batches(declared, serving.max_batch_size)
        if picture is not None:
            check_picture(declared, picture)
    except BaseException:
        model.close()
        raise
    return declared


def check_batches(model: Model, max_batch_size: int) -> None:
    """Whether requests for the model can be gathered at all.  Raises: ModelInvalid."""
    if max_batch_size <= 1:
        return
    for role, specs in (("input", model.inputs), ("output", model.outputs)):
        for spec in specs:
            if not spec.optional and (not spec.shape or spec.shape[0] != -1):
                raise ModelInvalid(
                    f"max_batch_size {max_batch_size} needs a first dimension of any size in all inputs and outputs, "
                    f"but {role} {spec.name!r} has shape {list(spec.shape)}; export the model so, or leave max_batch_size out"
                )
    if is_stateful(model):
        raise ModelInvalid(f"max_batch_size {max_batch_size} cannot be had: the model keeps state, so its requests stay apart")


def check_picture(model: Model, picture: Picture) -> None:
    """Whether the model fits what its release says about pictures, and the library is here.

    Raises: ModelInvalid, RuntimeUnavailable.
    """
    try:
        import PIL.Image  # noqa: F401 - loaded now, so that the first request does not wait for it
    except ImportError as error:
        raise RuntimeUnavailable(f"pictures need Pillow, which cannot be imported ({error}); {INSTALL}") from error
    interface = Interfaces.of(model).plain
    spec = named(picture.input, interface.inputs, interface.required, "input")
    if spec.datatype in ("BOOL", "BYTES", "BF16") or len(spec.shape) != 4:
        raise ModelInvalid(
            f"input {spec.name!r} is {spec.datatype} of {len(spec.shape)} dimensions: a picture needs 4, of numbers"
        )
    wanted = _shape(picture)
    if any(declared not in (-1, size) for declared, size in zip(spec.shape, wanted, strict=True)):
        raise ModelInvalid(
            f"pictures are declared to become {list(wanted)}, but input {spec.name!r} has shape {list(spec.shape)}"
        )
    if len(interface.required) != 1:
        raise ModelInvalid(f"pictures are for models with one input; this one has {len(interface.required)}")
    output = named(picture.output, interface.outputs, interface.said_outputs, "output")
    if output.datatype in ("BOOL", "BYTES"):
        raise ModelInvalid(f"output {output.name!r} is {output.datatype}: labels need numbers")


def named(name: str, tensors: Mapping[str, TensorSpec], said: Sequence[TensorSpec], role: str) -> TensorSpec:
    """The one of `tensors` called `name`; when that is empty, the only one of `said`.  Raises: ModelInvalid."""
    if name in tensors:
        return tensors[name]
    if not name and len(said) == 1:
        return said[0]
    known = ", ".join(repr(spec.name) for spec in said)
    raise ModelInvalid(f"pictures name {role} {name!r}, the model has {known}")


def _shape(picture: Picture) -> tuple[int, int, int, int]:
    channels = 1 if picture.color == "gray" else 3
    if picture.layout == "nchw":
        return (1, channels, picture.height, picture.width)
    return (1, picture.height, picture.width, channels)
