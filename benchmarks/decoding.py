"""What hostile requests cost: memory while they are decoded as a multiple of their bytes, and another client's p99 meanwhile.

python -m benchmarks.decoding asks one server after another, as `edge-agent run` starts it. For each kind of request it is the peak of the
server's memory above what it had before, of one such request, divided by its bytes; and the p99 of one client of the tiny model while
another process sends such requests one after another, as a multiple of the p99 just before.
"""

import argparse
import contextlib
import gzip
import json
import os
import re
import socket
import statistics
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from benchmarks import models, processes
from benchmarks.calm import Calm

MB = 1_000_000
SECONDS = 2.0
REPEATS = 3


@dataclass(frozen=True)
class Hostile:
    """One kind of request: the body, and where it is sent. `path` is that of a gRPC method when `grpc` is true."""

    name: str
    path: str
    body: bytes
    headers: str = ""
    grpc: bool = False


def build(folder: Path) -> list[Path]:
    """Models that take anything and answer with next to nothing, so that what is measured is the reading."""
    tiny = folder / "tiny.onnx"
    models.tiny(tiny)
    free = {
        "numbers": (TensorProto.FLOAT, ["n"]), "wholes": (TensorProto.INT64, ["n"]), "rows": (TensorProto.FLOAT, ["n", "m"]),
        "texts": (TensorProto.STRING, ["n"]),
    }  # fmt: skip
    for name, (kind, shape) in free.items():
        graph = helper.make_graph(
            [helper.make_node("Shape", ["x"], ["y"])], name, [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info("y", TensorProto.INT64, [len(shape)])],
        )  # fmt: skip
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / f"{name}.onnx")
    return [tiny, *(folder / f"{name}.onnx" for name in free)]


def infer(name: str, model: str, shape: list[int], datatype: str, data: bytes) -> Hostile:
    head = json.dumps({"name": "x", "shape": shape, "datatype": datatype})[:-1]
    return Hostile(name, f"/v2/models/{model}/infer", b'{"inputs":[%b,"data":%b}]}' % (head.encode(), data))


def binary(name: str, element: bytes, count: int) -> Hostile:
    parameters = {"binary_data_size": len(element) * count}
    tensor = {"name": "x", "shape": [count], "datatype": "BYTES", "parameters": parameters}
    head = json.dumps({"inputs": [tensor]}).encode()
    header = f"inference-header-content-length: {len(head)}\r\n"
    return Hostile(name, "/v2/models/texts/infer", head + element * count, header)


def a_list(element: bytes, size: int) -> tuple[int, bytes]:
    """As many elements as make some `size` bytes, and their list."""
    count = size // (len(element) + 1)
    return count, b"[%b]" % b",".join([element] * count)


def over_http() -> list[Hostile]:
    texts, text_list = a_list(b'"ab"', 9 * MB)
    rows, row_list = a_list(b"[1]", 7 * MB)
    numbers, number_list = a_list(b"1", 8 * MB)
    strange, strange_list = a_list(b"NaN", 8 * MB)
    many, members = 500_000, b",".join(b'"%d":1' % n for n in range(500_000))
    digits = b"[0.%b]" % (b"1" * 8 * MB)
    x = b'{"name":"x","shape":[1],"datatype":"FP32","data":[1]}'
    plain = {"name": "x", "shape": [4 * MB], "datatype": "FP32", "parameters": {"binary_data_size": 16 * MB}}
    head = json.dumps({"inputs": [plain]}).encode()
    return [
        Hostile(
            "no harm: binary FP32",
            "/v2/models/numbers/infer",
            head + bytes(16 * MB),
            f"inference-header-content-length: {len(head)}\r\n",
        ),
        binary("BYTES of two bytes", b"\2\0\0\0ab", 3 * MB),
        binary("BYTES, empty", bytes(4), 4 * MB),
        binary("BYTES of 32 bytes", b"\x20\0\0\0" + b"a" * 32, MB // 2),
        infer("JSON strings", "texts", [texts], "BYTES", text_list),
        infer("JSON [1],", "rows", [rows, 1], "FP32", row_list),
        infer("JSON 1,", "numbers", [numbers], "FP32", number_list),
        infer("JSON 1, as INT64", "wholes", [numbers], "INT64", number_list),
        infer("JSON NaN,", "numbers", [strange], "FP32", strange_list),
        infer("JSON, one long number", "numbers", [1], "FP32", digits),
        infer("JSON, deep", "numbers", [1], "FP32", b"[" * 4 * MB + b"]" * 4 * MB),
        Hostile("JSON, many parameters", "/v2/models/numbers/infer", b'{"inputs":[%b],"parameters":{%b}}' % (x, members)),
        Hostile("JSON, many inputs", "/v2/models/numbers/infer", b'{"inputs":[%b]}' % b",".join([x] * (many // 4))),
        Hostile("JSON in 64 KB", "/v2/models/numbers/infer", infer("", "", [32_000], "FP32", a_list(b"1", 64_000)[1]).body),
        Hostile("TensorFlow rows", "/v1/models/numbers:predict", b'{"instances":%b}' % a_list(b'{"x":1}', 4 * MB)[1]),
        Hostile("TensorFlow [1],", "/v1/models/rows:predict", b'{"instances":%b}' % row_list),
        Hostile("a gzip of zeros", "/v2/models/numbers/infer", gzip.compress(bytes(60 * MB), 9), "content-encoding: gzip\r\n"),
        Hostile("a control route", "/v2/repository/index", b'{"a":%b}' % number_list),
    ]


def over_grpc() -> list[Hostile]:
    def field(number: int, value: bytes) -> bytes:
        size, head = len(value), b""
        while size > 127:
            head += bytes((size & 127 | 128,))
            size >>= 7
        return bytes((number << 3 | 2,)) + head + bytes((size,)) + value

    def number(value: int) -> bytes:
        found = b""
        while value > 127:
            found += bytes((value & 127 | 128,))
            value >>= 7
        return found + bytes((value,))

    def request(model: str, datatype: str, count: int, contents: bytes, raw: bytes = b"") -> bytes:
        tensor = field(1, b"x") + field(2, datatype.encode()) + field(3, number(count))
        return field(1, model.encode()) + field(5, tensor + (field(5, contents) if contents else b"")) + raw

    path = "/inference.GRPCInferenceService/ModelInfer"
    elements = 3 * MB
    made = {
        "gRPC raw BYTES": request("texts", "BYTES", elements, b"", field(7, b"\2\0\0\0ab" * elements)),
        "gRPC bytes_contents": request("texts", "BYTES", elements, field(8, b"") * elements),
        "gRPC int64_contents": request("wholes", "INT64", 8 * MB, field(3, b"\1" * 8 * MB)),
        "gRPC fp32_contents": request("numbers", "FP32", 4 * MB, field(6, struct.pack("<f", 1) * 4 * MB)),
        "gRPC many inputs": field(1, b"numbers") + field(5, b"") * 4 * MB,
    }
    return [Hostile(name, path, body, grpc=True) for name, body in made.items()]


def ask(kind: Hostile, folder: Path) -> str:
    """Sends it once; the status of its answer."""
    if kind.grpc:
        import grpc

        with grpc.insecure_channel(f"unix:{folder / 'grpc.sock'}", [("grpc.max_send_message_length", -1)]) as channel:
            try:
                channel.unary_unary(kind.path)(kind.body, timeout=120)
            except grpc.RpcError as error:
                return str(error.code().name)
            return "OK"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(120)
        sock.connect(str(folder / "s.sock"))
        head = f"POST {kind.path} HTTP/1.1\r\nhost: bench\r\n{kind.headers}content-length: {len(kind.body)}\r\n\r\n"
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(head.encode())
            sock.sendall(kind.body)
        return sock.recv(4096).split()[1].decode()


def memory_bytes(pid: int, field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(kind: Hostile, load: list[str], calm: Calm, repeats: int, seconds: float) -> tuple[str, float, float, list[float]]:
    """The answer's status, peak memory ÷ body, p99 before in µs, and p99 meanwhile ÷ before of every repeat."""
    with tempfile.TemporaryDirectory(prefix="edge-decoding-") as place:
        folder = Path(place)
        paths = build(folder)
        request = folder / "tiny.request"
        request.write_bytes(models.request("tiny", models.tiny_input()))
        command = processes.agent("run", *paths, "--socket", folder / "s.sock", "--grpc-socket", folder / "grpc.sock")
        with processes.running(command, folder / "s.sock", quiet=True) as server:

            def p99() -> float:
                found: float = processes.drive(load, folder / "s.sock", request, "http", 1, seconds)["p99_us"]
                return found

            p99()
            small = infer("", "numbers", [1], "FP32", b"[1]")
            ask(small, folder)
            before = memory_bytes(server.pid, "VmRSS")
            Path(f"/proc/{server.pid}/clear_refs").write_text("5")  # the peak begins here
            status = ask(kind, folder)
            peak = memory_bytes(server.pid, "VmHWM") - before
            befores, ratios = [], []
            for _ in range(repeats):
                alone = calm(p99)
                with sending(kind, folder):
                    during = calm(p99)
                befores.append(alone)
                ratios.append(during / alone)
    return status, peak / len(kind.body), statistics.median(befores), ratios


@contextlib.contextmanager
def sending(kind: Hostile, folder: Path) -> Iterator[None]:
    """A process that sends it again and again."""
    child = os.fork()
    if child == 0:
        while True:
            with contextlib.suppress(OSError):
                ask(kind, folder)
    try:
        yield
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="kinds whose names have this in them")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    options = parser.parse_args()
    calm, chosen = Calm(), [kind for kind in (*over_http(), *over_grpc()) if options.only in kind.name]
    with tempfile.TemporaryDirectory() as folder:
        load = processes.load_program(Path(folder))
        print(f"{'kind':24}{'MB':>6}{'answer':>22}{'peak ÷ body':>13}{'p99 before':>12}{'× meanwhile':>13}   range")
        for kind in chosen:
            status, memory, before, ratios = measure(kind, load, calm, options.repeats, options.seconds)
            spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
            row = f"{kind.name:24}{len(kind.body) / MB:6.2f}{status:>22}{memory:13.1f}{before:9.0f} µs{statistics.median(ratios):13.1f}"
            print(f"{row}   {spread}", flush=True)
    print(calm)


if __name__ == "__main__":
    main()
