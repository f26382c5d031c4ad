"""Triton's perf_analyzer, as it is, measures this server. Skipped where its program is not there: `make perf-analyzer` fetches it."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.serving import onnx_models
from tests.serving.server import Device

FOLDER = Path(__file__).parents[2] / ".cache" / "perf_analyzer"
PROGRAM = Path(os.environ.get("PERF_ANALYZER", FOLDER / "perf_analyzer"))
REPORT = re.compile(r"Throughput: ([\d.]+) infer/sec")
SERVER = re.compile(r"Successful request count: (\d+)")

pytestmark = [pytest.mark.long, pytest.mark.alone, pytest.mark.skipif(not PROGRAM.exists(), reason=f"{PROGRAM} is not there")]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perf")
    device = Device(folder)
    device.release("scale", 1, onnx_models.scale(folder / "scale.onnx", 3.0))
    device.release(
        "batched", 1, onnx_models.scale(folder / "batched.onnx", 2.0), serving={"max_batch_size": 8, "max_delay_us": 500}
    )
    device.select("scale", 1)
    device.select("batched", 1)
    made = device.server(
        http_listen="127.0.0.1:0", grpc_socket=str(folder / "g.sock"), grpc_access="control", shared_memory="owner"
    )
    try:
        yield made.start()
    finally:
        code = made.stop()
    assert code == 0


def analyze(server, protocol, *options, model="scale", shape=("--shape", "x:1,4")):
    address = f"unix:{server.folder / 'g.sock'}" if protocol == "grpc" else f"127.0.0.1:{server.port()}"
    done = subprocess.run(
        [PROGRAM, "-m", model, "-u", address, "-i", protocol, *shape, "--measurement-mode", "count_windows",
         "--measurement-request-count", "50", "-s", "900", "-r", "3", *options],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "LD_LIBRARY_PATH": str(PROGRAM.parent / "lib")},
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert float(REPORT.search(output)[1]) > 0, output
    return output


def test_over_http(server):
    output = analyze(server, "http")
    assert int(SERVER.search(output)[1]) >= 50, "it reads the server's own statistics too"
    assert re.search(r"Avg request latency: \d+ usec \(overhead \d+ usec \+ queue \d+ usec \+ compute input", output)


@pytest.mark.parametrize(
    ("protocol", "options"),
    [
        ("http", ("--async", "--concurrency-range", "4")),
        ("http", ("--request-rate-range", "200")),
        ("grpc", ()),
        ("grpc", ("--async", "--concurrency-range", "4")),
        ("grpc", ("--streaming", "--async", "--concurrency-range", "2")),
        ("grpc", ("--shared-memory", "system", "--output-shared-memory-size", "16")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_in_every_way_it_asks(server, protocol, options):
    analyze(server, protocol, *options)


def test_batches(server):
    analyze(server, "http", "-b", "2", "--concurrency-range", "4", "--async", model="batched", shape=())
