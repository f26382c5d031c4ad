"""TensorRT engines: what may be loaded here, and the model that it becomes.

Nothing of a library is touched before CUDA said that there is a GPU, and nothing of an engine before its header said that it fits: a library
without a driver, or with an engine of another version, may end the process.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtimes.contract import CONTRACT_VERSION, LoadOptions, ModelInvalid
from runtimes.messages import plain
from runtimes.tensorrt import header, libraries
from runtimes.tensorrt.cuda import Cuda, Gpu
from runtimes.tensorrt.header import EngineHeader
from runtimes.tensorrt.model import EngineModel

MOST_CONTEXTS = 16


class TensorRtRuntime:
    """Loads `.engine` and `.plan` files. Variant options: `contexts` is how many runs may be on the GPU at once (2).

    `cuda` and `find` are how the GPU and the library are found.
    """

    contract_version = CONTRACT_VERSION
    name = "tensorrt"
    suffixes: tuple[str, ...] = (".engine", ".plan")

    def __init__(
        self, cuda: Callable[[], Cuda] = Cuda.here, find: Callable[[str | None], tuple[str, Any]] = libraries.runner
    ) -> None:
        self._cuda, self._find = cuda, find

    def version(self) -> str:
        self._cuda()
        label, trt = self._find(None)
        return f"{label} {trt.__version__}"

    def load(self, path: Path, options: LoadOptions) -> EngineModel:
        said = header.read(path)
        contexts = _contexts(options)
        cuda = self._cuda()
        label, trt = self._find(said.library)
        gpu = cuda.gpu()
        refuse_others(path, said, label, str(trt.__version__), gpu)
        log = libraries.logger(trt)
        runtime = trt.Runtime(log)
        data = path.read_bytes()
        _check_validity(trt, runtime, data, path, gpu)
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            why = plain(log.errors[0]) if log.errors else "it does not say why"
            raise ModelInvalid(f"{label} {trt.__version__} cannot load {path.name} on {gpu.name}: {why}")
        return EngineModel(trt, cuda, runtime, engine, contexts, f"{label} {trt.__version__} on {gpu.name} ({gpu.capability})")


def refuse_others(path: Path, said: EngineHeader, label: str, version: str, gpu: Gpu) -> None:
    """Raises: ModelInvalid when the engine was built for another GPU, or by another version of the library."""
    again = "build it for this device, or give the release another variant"
    if said.capabilities and gpu.capability not in said.capabilities:
        built_for = ", ".join(said.capabilities)
        raise ModelInvalid(f"{path.name} was built for {built_for}, and this GPU ({gpu.name}) is {gpu.capability}: {again}")
    if said.version and said.version.split(".")[:2] != version.split(".")[:2]:
        raise ModelInvalid(f"{path.name} was built by {said.library} {said.version}, and here is {label} {version}: {again}")


def _check_validity(trt: Any, runtime: Any, data: bytes, path: Path, gpu: Gpu) -> None:
    """What the library itself says of the engine, where it can be asked (TensorRT-RTX).  Raises: ModelInvalid."""
    ask = getattr(runtime, "get_engine_validity", None)
    if ask is None:
        return
    validity, diagnostics = ask(data)
    if validity == trt.EngineValidity.INVALID:
        raise ModelInvalid(f"{path.name} is not valid on {gpu.name} ({gpu.capability}); diagnostics {int(diagnostics):#x}")


def _contexts(options: LoadOptions) -> int:
    said = options.extra.get("contexts", 2)
    if not isinstance(said, int) or isinstance(said, bool) or not 1 <= said <= MOST_CONTEXTS:
        raise ModelInvalid(f"option contexts={said!r} is not a number from 1 to {MOST_CONTEXTS}")
    if options.libraries:
        raise ModelInvalid("libraries of operators are for the runtime onnx; an engine has its plugins in it")
    return said
