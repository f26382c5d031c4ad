"""The runtime for TensorRT engines: what it refuses before anything is loaded, and what it asks a GPU for. The GPU is a fake one, and says so."""

from __future__ import annotations

import platform
import threading
from pathlib import Path

import numpy as np
import pytest

from runtimes import registry
from runtimes.contract import InputInvalid, LoadOptions, ModelInvalid, RunFailed, RuntimeUnavailable
from runtimes.tensorrt import header, libraries
from runtimes.tensorrt.cuda import Cuda
from runtimes.tensorrt.runtime import TensorRtRuntime
from tests.unit import fake_tensorrt as fake

WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3)
TENSORS = (fake.Tensor("x", "FLOAT", (-1, 4), given=True, bounds=((1, 4), (8, 4))), fake.Tensor("y", "FLOAT", (-1, 3)))


def engine_file(path, *, capabilities=1 << 2, version=(1, 7, 1, 116), library=b"vtrt"):
    """An engine that is a header: `capabilities` is the mask of the GPUs that it is for (sm86)."""
    size = 200
    head = header.RTX_LAYOUT.pack(library, 0, 2, size, *version, library, capabilities)
    path.write_bytes(head.ljust(size, b"\0"))
    return path


@pytest.fixture
def cuda():
    return fake.Cuda(capability=(8, 6))


def runtime(cuda, trt):
    return TensorRtRuntime(lambda: Cuda(cuda), lambda label: (label or "TensorRT-RTX", trt))


def times_weights(feeds):
    return {"y": feeds["x"] @ WEIGHTS}


def load(path, cuda, trt=None, **extra):
    return runtime(cuda, trt or fake.TensorRt(TENSORS, times_weights)).load(
        engine_file(path / "m.engine"), LoadOptions(extra=extra)
    )


def test_what_it_computes_comes_back(tmp_path, cuda):
    model = load(tmp_path, cuda)
    assert [(spec.name, spec.datatype, spec.shape) for spec in model.inputs] == [("x", "FP32", (-1, 4))]
    assert model.placement.actual == "TensorRT-RTX 1.7.1.116 on Fake Orin (sm86)"
    for rows in (1, 8, 3, 8):
        x = np.random.default_rng(rows).random((rows, 4), np.float32)
        np.testing.assert_array_equal(model.run({"x": x})[0], x @ WEIGHTS)
        np.testing.assert_array_equal(model.run({"x": x}, ["y"])[0], x @ WEIGHTS)
    assert len(cuda.memory) == 4, "two contexts, and what they need for their tensors once"
    model.close()
    assert not cuda.memory
    assert not cuda.streams


def test_runs_at_once_have_a_context_each(tmp_path, cuda):
    together = threading.Barrier(3)

    def meets(feeds):
        together.wait(10)
        return times_weights(feeds)

    model = load(tmp_path, cuda, fake.TensorRt(TENSORS, meets), contexts=3)
    found, x = [], np.ones((2, 4), np.float32)
    threads = [threading.Thread(target=lambda: found.append(model.run({"x": x})[0])) for _ in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 9
    assert all((one == x @ WEIGHTS).all() for one in found)
    model.close()


def test_sizes_that_the_engine_was_not_built_for(tmp_path, cuda):
    model = load(tmp_path, cuda)
    with pytest.raises(InputInvalid, match=r"shape \[9,4\]; the engine was built for \[1,4\] to \[8,4\]"):
        model.run({"x": np.ones((9, 4), np.float32)})
    with pytest.raises(InputInvalid, match="datatype"):
        model.run({"x": np.ones((1, 4))})
    with pytest.raises(InputInvalid, match="missing"):
        model.run({})


@pytest.mark.parametrize(
    ("built", "words"),
    [
        ({"capabilities": 1 << 4}, r"was built for sm120, and this GPU \(Fake Orin\) is sm86"),
        ({"version": (1, 6, 0, 1)}, r"was built by TensorRT-RTX 1\.6\.0\.1, and here is TensorRT-RTX 1\.7"),
    ],
)
def test_an_engine_of_another_gpu_or_version_is_refused_before_it_is_loaded(tmp_path, cuda, built, words):
    trt = fake.TensorRt(TENSORS, times_weights)
    trt.Runtime = None  # whoever asks for it fails
    with pytest.raises(ModelInvalid, match=words):
        runtime(cuda, trt).load(engine_file(tmp_path / "m.engine", **built), LoadOptions())


def test_what_the_library_says_of_an_engine(tmp_path, cuda):
    with pytest.raises(ModelInvalid, match="is not valid on Fake Orin"):
        load(tmp_path, cuda, fake.TensorRt(TENSORS, times_weights, validity="INVALID"))
    with pytest.raises(ModelInvalid, match=r"cannot load m\.engine on Fake Orin: .*Serialization failed"):
        load(tmp_path, cuda, fake.TensorRt(TENSORS, times_weights, loads=False))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (fake.Tensor("z", "FP8", (1,)), "output 'z' is FP8, which no request can carry"),
        (fake.Tensor("z", "INT32", (1,), given=True, location="HOST"), "input 'z' is a shape"),
    ],
)
def test_tensors_that_cannot_be_served(tmp_path, cuda, tensor, words):
    with pytest.raises(ModelInvalid, match=words):
        load(tmp_path, cuda, fake.TensorRt((*TENSORS, tensor), times_weights))


def test_a_driver_that_goes_away_fails_runs_and_nothing_else(tmp_path, cuda):
    model = load(tmp_path, cuda, contexts=1)
    x = np.ones((1, 4), np.float32)
    cuda.fails["cudaStreamSynchronize"] = fake.CudaError.cudaErrorLaunchFailure
    with pytest.raises(RunFailed, match="cudaErrorLaunchFailure"):
        model.run({"x": x})
    cuda.fails.clear()
    np.testing.assert_array_equal(model.run({"x": x})[0], x @ WEIGHTS)


def test_memory_of_the_gpu_runs_out(tmp_path):
    model = load(tmp_path, fake.Cuda(capability=(8, 6), memory=100))
    with pytest.raises(MemoryError, match="memory of the GPU"):
        model.run({"x": np.ones((8, 4), np.float32)})
    assert model.run({"x": np.ones((1, 4), np.float32)})[0].shape == (1, 3)


@pytest.mark.parametrize("contexts", [0, 17, "2", True])
def test_numbers_of_contexts_that_nobody_can_have(tmp_path, cuda, contexts):
    with pytest.raises(ModelInvalid, match="contexts"):
        load(tmp_path, cuda, contexts=contexts)


def test_no_driver_and_no_gpu_are_told(tmp_path, cuda):
    trt = fake.TensorRt(TENSORS, times_weights)
    cuda.fails["cudaGetDeviceCount"] = fake.CudaError.cudaErrorInsufficientDriver
    for asked in (lambda one: one.version(), lambda one: one.load(engine_file(tmp_path / "m.engine"), LoadOptions())):
        with pytest.raises(RuntimeUnavailable, match="no NVIDIA driver"):
            asked(runtime(cuda, trt))
    with pytest.raises(RuntimeUnavailable, match="no NVIDIA GPU"):
        runtime(fake.Cuda(devices=0), trt).version()


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU here")
def test_without_a_driver_the_real_libraries_are_not_touched(tmp_path):
    found = registry.find("tensorrt")
    with pytest.raises(RuntimeUnavailable, match="no NVIDIA driver that CUDA can use"):
        found.version()
    with pytest.raises(RuntimeUnavailable, match="no NVIDIA driver"):
        found.load(engine_file(tmp_path / "m.plan"), LoadOptions())
    assert registry.for_file(tmp_path / "m.plan") is found


@pytest.mark.skipif(platform.machine() != "x86_64", reason="TensorRT-RTX's libraries are on PyPI for x86-64 only")
def test_every_name_that_is_called_is_one_of_the_real_library():
    label, trt = libraries.runner()
    assert label == "TensorRT-RTX"
    called = {
        "Runtime": ("deserialize_cuda_engine", "get_engine_validity"),
        "ICudaEngine": (
            "num_io_tensors", "get_tensor_name", "get_tensor_mode", "get_tensor_dtype", "get_tensor_shape", "get_tensor_location",
            "get_tensor_profile_shape", "create_execution_context",
        ),
        "IExecutionContext": ("set_input_shape", "get_tensor_shape", "set_tensor_address", "execute_async_v3"),
        "TensorIOMode": ("INPUT",), "TensorLocation": ("HOST",), "EngineValidity": ("INVALID",), "ILogger": ("Severity",),
    }  # fmt: skip
    missing = [f"{kind}.{name}" for kind, names in called.items() for name in names if not hasattr(getattr(trt, kind), name)]
    assert not missing
    from runtimes.tensorrt.model import DATATYPES

    assert set(DATATYPES) <= set(trt.DataType.__members__)
    cudart = pytest.importorskip("cuda.bindings.runtime")
    names = [name.removeprefix("_") for name in vars(fake.Cuda) if name.startswith("_cuda")]
    assert len(names) >= 8
    assert all(hasattr(cudart, name) for name in names)
    assert all(hasattr(cudart.cudaDeviceAttr, one.name) for one in fake.Cuda.cudaDeviceAttr)
