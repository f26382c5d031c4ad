"""A GPU that is not there: CUDA's calls over the machine's own memory, and a TensorRT whose engines are functions of NumPy.

FAKE: it shows what our code asks for and in which order, not what a GPU does. That the names exist is tested against the real bindings.
"""

# ruff: noqa: N802, N815 - the names are those of CUDA

from __future__ import annotations

import ctypes
import enum
import threading

import numpy as np


class CudaError(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorLaunchFailure = 719


class Cuda:
    """cuda-python's runtime module. `fails`: name of a call → the error that it gives from now on."""

    cudaError_t = CudaError
    cudaDeviceAttr = enum.IntEnum(
        "cudaDeviceAttr",
        {"cudaDevAttrIntegrated": 18, "cudaDevAttrComputeCapabilityMajor": 75, "cudaDevAttrComputeCapabilityMinor": 76},
    )
    cudaMemcpyKind = enum.IntEnum("cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2})

    def __init__(self, *, devices=1, capability=(8, 7), integrated=1, memory=1 << 24):
        self._devices, self._attributes = devices, {18: integrated, 75: capability[0], 76: capability[1]}
        self._left = memory
        self.fails, self.memory, self.streams = {}, {}, set()
        self._lock = threading.Lock()

    def __getattr__(self, name):
        call = object.__getattribute__(self, f"_{name}")

        def called(*arguments):
            if name in self.fails:
                return (self.fails[name], None)
            with self._lock:
                return call(*arguments)

        return called

    def _cudaGetDeviceCount(self):
        return CudaError.cudaSuccess, self._devices

    def _cudaGetErrorString(self, error):
        return CudaError.cudaSuccess, error.name.encode()

    def _cudaDeviceGetAttribute(self, attribute, _device):
        return CudaError.cudaSuccess, self._attributes[int(attribute)]

    def _cudaGetDeviceProperties(self, _device):
        return CudaError.cudaSuccess, type("Properties", (), {"name": b"Fake Orin\0\0"})

    def _cudaMalloc(self, size):
        if size > self._left:
            return CudaError.cudaErrorMemoryAllocation, None
        self._left -= size
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return CudaError.cudaSuccess, ctypes.addressof(buffer)

    def _cudaFree(self, address):
        self._left += len(self.memory.pop(address))
        return (CudaError.cudaSuccess,)

    def _cudaStreamCreate(self):
        self.streams.add(number := len(self.streams) + 1)
        return CudaError.cudaSuccess, number

    def _cudaStreamDestroy(self, stream):
        self.streams.discard(stream)
        return (CudaError.cudaSuccess,)

    def _cudaStreamSynchronize(self, _stream):
        return (CudaError.cudaSuccess,)

    def _cudaMemcpyAsync(self, to, source, size, _kind, _stream):
        ctypes.memmove(to, source, size)
        return (CudaError.cudaSuccess,)


class Tensor:
    def __init__(self, name, kind, shape, *, given=False, bounds=None, location="DEVICE"):
        self.name, self.kind, self.shape, self.given, self.bounds, self.location = name, kind, shape, given, bounds, location


class TensorRt:
    """A TensorRT library. Every engine that it loads has these `tensors` and computes `function`: tensor → array."""

    __version__ = "1.7.1.116"
    TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
    TensorLocation = enum.Enum("TensorLocation", ["DEVICE", "HOST"])
    DataType = enum.Enum("DataType", ["FLOAT", "HALF", "INT8", "INT32", "FP8"])
    EngineValidity = enum.Enum("EngineValidity", ["VALID", "SUBOPTIMAL", "INVALID"])

    class ILogger:
        Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING"])

    def __init__(self, tensors, function, *, validity="VALID", loads=True):
        self.tensors, self.function, self.loads, self.contexts = tensors, function, loads, 0
        self.validity = self.EngineValidity[validity]
        self.Runtime = lambda log: Runtime(self, log)


class Runtime:
    def __init__(self, trt, log):
        self._trt, self._log = trt, log

    def get_engine_validity(self, _data):
        return self._trt.validity, 0x4

    def deserialize_cuda_engine(self, _data):
        if not self._trt.loads:
            self._log.log(self._trt.ILogger.Severity.ERROR, "IRuntime::deserializeCudaEngine: Serialization failed")
            return None
        return Engine(self._trt)


class Engine:
    def __init__(self, trt):
        self._trt = trt
        self._tensors = {one.name: one for one in trt.tensors}
        self.num_io_tensors = len(trt.tensors)

    def get_tensor_name(self, index):
        return self._trt.tensors[index].name

    def get_tensor_mode(self, name):
        return self._trt.TensorIOMode.INPUT if self._tensors[name].given else self._trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return self._trt.DataType[self._tensors[name].kind]

    def get_tensor_shape(self, name):
        return self._tensors[name].shape

    def get_tensor_location(self, name):
        return self._trt.TensorLocation[self._tensors[name].location]

    def get_tensor_profile_shape(self, name, _profile):
        least, most = self._tensors[name].bounds
        return least, most, most

    def create_execution_context(self):
        self._trt.contexts += 1
        return Context(self._trt, self._tensors)


class Context:
    def __init__(self, trt, tensors):
        self._trt, self._tensors, self._shapes, self._at = trt, tensors, {}, {}
        self._running = threading.Lock()

    def set_input_shape(self, name, shape):
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        rows = next(iter(self._shapes.values()), (1,))[0]
        return tuple(rows if size == -1 else size for size in self._tensors[name].shape)

    def set_tensor_address(self, name, address):
        self._at[name] = address

    def execute_async_v3(self, stream_handle):
        assert stream_handle
        assert self._running.acquire(blocking=False), "two runs on one context"
        try:
            feeds = {name: self._view(name) for name, one in self._tensors.items() if one.given}
            for name, array in self._trt.function(feeds).items():
                self._view(name)[...] = array
        finally:
            self._running.release()
        return True

    def _view(self, name):
        kinds = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "INT32": np.int32}
        one = self._tensors[name]
        shape = self._shapes.get(name, one.shape) if one.given else self.get_tensor_shape(name)
        dtype = np.dtype(kinds[one.kind])
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(self._at[name]), dtype).reshape(shape)
