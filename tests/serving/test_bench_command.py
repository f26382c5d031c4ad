"""`edge-agent bench` against a real server."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.serving import onnx_models

pytestmark = pytest.mark.alone  # it measures


def bench(socket, *words):
    return subprocess.run(
        [sys.executable, "-m", "agent.cli", "bench", *map(str, words), "--socket", str(socket)],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip


def test_numbers_of_several_clients(serve_files, tmp_path):
    server = serve_files(onnx_models.scale(tmp_path / "scale.onnx", 2.0))
    done = bench(server.socket, "scale", "--clients", 2, "--seconds", 0.3, "--batch", 3, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with server.client() as client:
        counted = client.status()["models"]["scale"]["versions"]["1"]["stats"]["ok"]
    assert 0 < found["answered"] < counted
    assert found["failed"] == 0
    latency = found["latency_ms"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] <= latency["max"]
    assert found["cpu_us_per_request"] > 0
    assert found["memory_bytes"] > 10_000_000


def test_people_get_a_histogram(serve_files, tmp_path):
    server = serve_files(onnx_models.scale(tmp_path / "scale.onnx", 2.0))
    np.save(tmp_path / "x.npy", np.ones((2, 4), np.float32))
    done = bench(server.socket, "scale", "--input", tmp_path / "x.npy", "--seconds", 0.2)
    assert done.returncode == 0, done.stderr
    for word in ("per second", "0 failed", "p99", "µs of CPU per request", "█"):
        assert word in done.stdout
    assert done.stdout.count("≤") >= 10


def test_a_model_that_is_not_there_is_said_in_one_line(serve_files, tmp_path):
    server = serve_files(onnx_models.scale(tmp_path / "scale.onnx", 2.0))
    done = bench(server.socket, "other", "--seconds", 0.2)
    assert done.returncode == 1
    assert "'other' is not found" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_requests_that_all_fail_end_with_status_1(serve_files, tmp_path):
    server = serve_files(onnx_models.scale(tmp_path / "scale.onnx", 2.0))
    np.save(tmp_path / "x.npy", np.ones((2, 5), np.float32))
    done = bench(server.socket, "scale", "--input", tmp_path / "x.npy", "--seconds", 0.2)
    assert done.returncode == 1
    assert "shape" in done.stderr
