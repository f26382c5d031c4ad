"""The models that are measured, made with a fixed seed, and the requests for them."""

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

SEED = 20260
REGION = "bench"  # what the load generator calls the memory that it shares
NAMES = ("tiny", "image", "image, shared")  # of the subjects


@dataclass(frozen=True)
class Subject:
    """One model with everything that is needed to ask it."""

    name: str
    path: Path
    array: NDArray[np.float32]
    request: bytes
    shared: bool = False  # the request names memory, which holds the array, instead of having it behind itself


def _weights(rng: np.random.Generator, name: str, *shape: int) -> onnx.TensorProto:
    fan_in = int(np.prod(shape[1:])) if len(shape) == 4 else shape[0]
    return numpy_helper.from_array((rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32), name)


def _save(path: Path, nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], shape: list[int]) -> None:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])]
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def tiny(path: Path) -> None:
    """1x64 → 32 → 10: a few microseconds, so that what is measured is the way to it."""
    rng = np.random.default_rng(SEED)
    weights = [_weights(rng, "w0", 64, 32), _weights(rng, "b0", 32), _weights(rng, "w1", 32, 10), _weights(rng, "b1", 10)]
    nodes = [
        helper.make_node("Gemm", ["x", "w0", "b0"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w1", "b1"], ["y"]),
    ]
    _save(path, nodes, weights, [1, 64])


def image(path: Path) -> None:
    """1x3x224x224 (602 KB) → 10 through four strided convolutions: one to two milliseconds on one core of a server."""
    rng = np.random.default_rng(SEED)
    nodes, weights, current, channels = [], [], "x", 3
    for number, (wide, kernel) in enumerate([(24, 7), (48, 3), (96, 3), (96, 3)]):
        weights.append(_weights(rng, f"w{number}", wide, channels, kernel, kernel))
        pads = [kernel // 2] * 4
        nodes.append(helper.make_node("Conv", [current, f"w{number}"], [f"c{number}"], strides=[2, 2], pads=pads))
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"]))
        current, channels = f"r{number}", wide
    nodes += [
        helper.make_node("GlobalAveragePool", [current], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    _save(path, nodes, [*weights, _weights(rng, "w", channels, 10)], [1, 3, 224, 224])


def slow(path: Path) -> None:
    """1x1024 through 300 layers of 1024: some 50 ms on one core, hardly any bytes."""
    rng = np.random.default_rng(SEED)
    weights = [_weights(rng, f"w{n}", 1024, 1024) for n in range(4)] + [_weights(rng, "w", 1024, 10)]
    nodes, current = [], "x"
    for number in range(300):
        nodes.append(helper.make_node("MatMul", [current, f"w{number % 4}"], [f"m{number}"]))
        nodes.append(helper.make_node("Tanh", [f"m{number}"], [f"t{number}"]))
        current = f"t{number}"
    nodes.append(helper.make_node("MatMul", [current, "w"], ["y"]))
    _save(path, nodes, weights, [1, 1024])


def tiny_input() -> NDArray[np.float32]:
    return _input(1, 64)


def image_input() -> NDArray[np.float32]:
    return _input(1, 3, 224, 224)


def slow_input() -> NDArray[np.float32]:
    return _input(1, 1024)


def _input(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(SEED).standard_normal(shape).astype(np.float32)


def make(folder: Path) -> list[Subject]:
    subjects = []
    for name, build, array in (("tiny", tiny, tiny_input()), ("image", image, image_input())):
        path = folder / f"{name}.onnx"
        build(path)
        subjects.append(Subject(name, path, array, request(name, array)))
    return subjects


def sharing(subject: Subject) -> Subject:
    """The same, asked through memory that the client shares."""
    return replace(
        subject, name=f"{subject.name}, shared", request=request(subject.name, subject.array, region=REGION), shared=True
    )


def request(model: str, array: NDArray[np.float32], name: str = "x", region: str | None = None) -> bytes:
    """A prediction as a client sends it: with the tensor behind it, or with the name of the region that has it. `name` is the input's."""
    body = array.tobytes() if region is None else b""
    where = {"binary_data_size": array.nbytes}
    if region is not None:
        where = {"shared_memory_region": region, "shared_memory_byte_size": array.nbytes}
    tensor = {"name": name, "shape": array.shape, "datatype": "FP32", "parameters": where}
    head = msgspec.json.encode({"inputs": [tensor], "parameters": {"binary_data_output": True}})
    lines = (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nhost: bench\r\n"
        f"inference-header-content-length: {len(head)}\r\ncontent-length: {len(head) + len(body)}\r\n\r\n"
    )
    return lines.encode() + head + body
