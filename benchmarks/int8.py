"""Int8 models over the socket beside the engine with its defaults, in turns: what the runtime asks of the engine must not make them slow.

Six models made here, in both formats (QDQ, QOperator), with uint8 and int8 activations, and a scale for each tensor or channel. Figures
are medians of the repeats; compare within one run only.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = os.environ["ORT_TELEMETRY_DISABLED"] = "1"

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from benchmarks import measure, processes
from benchmarks.calm import PATIENCE_S, Calm
from benchmarks.models import SEED, Subject, request

LAYERS, CHANNELS, SIDE = 24, 64, 28
ENDS = 8  # channels of input and output: few bytes, so that what is compared is the run
KINDS = [
    (form, activations, per_channel)
    for form in ("QDQ", "QOperator")
    for activations, per_channel in (("u8", False), ("u8", True), ("s8", True))
]
GOAL = 1.05


class _Network:
    """Convolutions of 8-bit weights, each of its own, that use the whole of their range."""

    def __init__(self, activations: str, *, per_channel: bool) -> None:
        self.dtype = np.uint8 if activations == "u8" else np.int8
        self.per_channel = per_channel
        self.nodes: list[onnx.NodeProto] = []
        self.weights = [
            numpy_helper.from_array(np.float32(0.05), "s"),
            numpy_helper.from_array(self.dtype(128 if self.dtype is np.uint8 else 0), "z"),
        ]
        self._random = np.random.default_rng(SEED)

    def add(self, op: str, inputs: list[str], output: str, **attributes: object) -> None:
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))

    def kernel(self, layer: int) -> list[str]:
        """The names of a layer's weights, their scales and zero points."""
        channels, wide = CHANNELS if layer else ENDS, CHANNELS if layer < LAYERS - 1 else ENDS
        values = self._random.integers(-127, 128, (wide, channels, 3, 3)).astype(np.int8)
        scale = 1 / (74 * np.sqrt(9 * channels))  # keeps what goes through as large as it was
        shape = (wide,) if self.per_channel else ()
        parts = {
            f"w{layer}": values,
            f"ws{layer}": np.full(shape, scale, np.float32),
            f"wz{layer}": np.zeros(shape, np.int8),
        }
        self.weights += [numpy_helper.from_array(array, name) for name, array in parts.items()]
        return list(parts)

    def qdq(self) -> None:
        self.add("QuantizeLinear", ["x", "s", "z"], "q0")
        self.add("DequantizeLinear", ["q0", "s", "z"], "d0")
        for layer in range(LAYERS):
            axis = {"axis": 0} if self.per_channel else {}
            self.add("DequantizeLinear", self.kernel(layer), f"dw{layer}", **axis)
            self.add("Conv", [f"d{layer}", f"dw{layer}"], f"c{layer}", pads=[1, 1, 1, 1])
            self.add("QuantizeLinear", [f"c{layer}", "s", "z"], f"q{layer + 1}")
            last = layer == LAYERS - 1
            self.add("DequantizeLinear", [f"q{layer + 1}", "s", "z"], "y" if last else f"d{layer + 1}")

    def qoperator(self) -> None:
        self.add("QuantizeLinear", ["x", "s", "z"], "q0")
        for layer in range(LAYERS):
            self.add("QLinearConv", [f"q{layer}", "s", "z", *self.kernel(layer), "s", "z"], f"q{layer + 1}", pads=[1, 1, 1, 1])
        self.add("DequantizeLinear", [f"q{LAYERS}", "s", "z"], "y")

    def save(self, path: Path) -> None:
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, ENDS, SIDE, SIDE])]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, ENDS, SIDE, SIDE])]
        graph = helper.make_graph(self.nodes, path.stem, inputs, outputs, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(model, path)


def make(path: Path, form: str, activations: str, *, per_channel: bool) -> None:
    network = _Network(activations, per_channel=per_channel)
    if form == "QDQ":
        network.qdq()
    else:
        network.qoperator()
    network.save(path)


def subjects(folder: Path) -> list[Subject]:
    found = []
    array: NDArray[np.float32] = np.random.default_rng(SEED).standard_normal((1, ENDS, SIDE, SIDE)).astype(np.float32)
    for form, activations, per_channel in KINDS:
        name = f"{form}-{activations}s8-{'channel' if per_channel else 'tensor'}"
        make(folder / f"{name}.onnx", form, activations, per_channel=per_channel)
        found.append(Subject(name, folder / f"{name}.onnx", array, request(name, array)))
    return found


def compare(folder: Path, repeats: int, seconds: float, calm: Calm) -> dict[str, list[tuple[float, float]]]:
    """Of each model in each repeat: p50 of the engine and over the socket, in µs."""
    load, server, body = processes.load_program(folder), folder / "bench.sock", folder / "request"
    models = subjects(folder)
    found: dict[str, list[tuple[float, float]]] = {model.name: [] for model in models}
    with processes.running(processes.agent("run", *[m.path for m in models], "--socket", server), server):
        for _ in range(repeats):
            for model in models:
                body.write_bytes(model.request)
                engine, _ = calm(lambda model=model: measure.engine(model, 1, seconds))  # type: ignore[misc]
                answers = calm(lambda: processes.drive(load, server, body, "http", 1, seconds, None))
                if answers["failures"]:
                    raise SystemExit(f"{model.name}: {answers['failures']} requests failed")
                found[model.name].append((engine, answers["p50_us"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    options = parser.parse_args()
    calm = Calm(PATIENCE_S)
    with tempfile.TemporaryDirectory(prefix="edge-int8-") as name:
        found = compare(Path(name), options.repeats, options.seconds, calm)
    table = Table("model", "engine p50 ms", "socket p50 ms", f"× engine (goal {GOAL})", title=processor())
    for model, pairs in found.items():
        engine, socket = (statistics.median(column) / 1e3 for column in zip(*pairs, strict=True))
        table.add_row(model, f"{engine:.2f}", f"{socket:.2f}", f"{statistics.median(s / e for e, s in pairs):.3f}")
    Console(highlight=False).print(table)
    print(calm)


def processor() -> str:
    """Its name and which of the instructions that matter for int8 it has."""
    lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    said = {key.strip(): value.strip() for key, value in lines.items()}
    flags = [flag for flag in said.get("flags", "").split() if flag in ("avx2", "avx_vnni", "avx512_vnni", "amx_int8")]
    return f"{said.get('model name', 'unknown processor')}: {', '.join(flags) or 'none of avx2, vnni, amx'}"


if __name__ == "__main__":
    main()
