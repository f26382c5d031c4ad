"""The GPU's memory and streams, through cuda-python. Every call that fails is an exception; nothing here is called before a driver was found."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from runtimes.contract import RunFailed, RuntimeUnavailable

MODULES = ("cuda.bindings.runtime", "cuda.cudart")
"""What cuda-python's module is called from 12.8 on, and before."""

INSTALL = "install it with: pip install 'edge-inference-agent[tensorrt]'"


class CudaFailed(RunFailed):
    """A call of CUDA failed; the message has CUDA's words."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """`capability` is `sm87` or the like. `integrated`: it shares the machine's memory, as on a Jetson."""

    name: str
    capability: str
    integrated: bool


class Cuda:
    """One GPU, the first."""

    def __init__(self, module: Any) -> None:
        """`module` is cuda-python's runtime module.  Raises: RuntimeUnavailable when there is no GPU that it can use."""
        self._cuda = module
        error, number = module.cudaGetDeviceCount()
        if int(error) != 0:
            raise RuntimeUnavailable(f"no NVIDIA driver that CUDA can use: {self._words(error)}")
        if not number:
            raise RuntimeUnavailable("no NVIDIA GPU is here")

    @classmethod
    def here(cls) -> Cuda:
        """Raises: RuntimeUnavailable."""
        module = next(filter(None, map(_module, MODULES)), None)
        if module is None:
            raise RuntimeUnavailable(f"cuda-python cannot be imported; {INSTALL}")
        return cls(module)

    def gpu(self) -> Gpu:
        attribute = self._cuda.cudaDeviceAttr
        major, minor, integrated = (
            self.call("cudaDeviceGetAttribute", one, 0)
            for one in (
                attribute.cudaDevAttrComputeCapabilityMajor, attribute.cudaDevAttrComputeCapabilityMinor, attribute.cudaDevAttrIntegrated,
            )
        )  # fmt: skip
        name = self.call("cudaGetDeviceProperties", 0).name
        said = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
        return Gpu(said.strip("\0 "), f"sm{major}{minor}", bool(integrated))

    def allocate(self, size: int) -> int:
        """Memory of the GPU: its address.  Raises: MemoryError, CudaFailed."""
        return int(self.call("cudaMalloc", size))

    def free(self, address: int) -> None:
        self.call("cudaFree", address)

    def new_stream(self) -> Any:
        return self.call("cudaStreamCreate")

    def end_stream(self, stream: Any) -> None:
        self.call("cudaStreamDestroy", stream)

    def to_gpu(self, address: int, host: int, size: int, stream: Any) -> None:
        """Copies from the machine's memory; has been read when the stream has come past it."""
        self.call("cudaMemcpyAsync", address, host, size, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, stream)

    def from_gpu(self, host: int, address: int, size: int, stream: Any) -> None:
        self.call("cudaMemcpyAsync", host, address, size, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)

    def wait(self, stream: Any) -> None:
        """Until everything in the stream is done. Other threads of Python go on meanwhile."""
        self.call("cudaStreamSynchronize", stream)

    def call(self, name: str, *arguments: Any) -> Any:
        """What a function of CUDA gives besides its error.  Raises: MemoryError, CudaFailed."""
        error, *given = getattr(self._cuda, name)(*arguments)
        if int(error) != 0:
            if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
                raise MemoryError(f"not enough memory of the GPU: {self._words(error)}")
            raise CudaFailed(f"{name}: {self._words(error)}")
        return given[0] if given else None

    def _words(self, error: Any) -> str:
        _, words = self._cuda.cudaGetErrorString(error)
        said = words.decode(errors="replace") if isinstance(words, bytes) else str(words)
        return f"{said} (CUDA error {int(error)})"


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
