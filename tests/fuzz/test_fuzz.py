"""Every fuzzer for a bounded time, from seeds that reach deep. A finding prints the bytes that make it happen."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

SECONDS = int(os.environ.get("FUZZ_SECONDS", "12"))
ROOT = Path(__file__).parents[2]

TENSOR = {"name": "x", "shape": [1, 4], "datatype": "FP32"}
JSON_REQUEST = json.dumps({"id": "a", "inputs": [{**TENSOR, "data": [1, 2.5, -3e2, 0]}], "outputs": [{"name": "y"}]}).encode()
HEAD = json.dumps({
    "inputs": [{**TENSOR, "parameters": {"binary_data_size": 16}}],
    "outputs": [{"name": "s", "parameters": {"classification": 2}}],
    "parameters": {"binary_data_output": True, "sequence_id": 7, "priority": 1, "timeout": 50},
}).encode()  # fmt: skip
POST = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: t\r\ncontent-length: 5\r\n\r\nhello"
CHUNKS = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: t\r\ntransfer-encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\n\r\n"
MANIFEST = json.dumps({
    "model": "m", "version": 1, "files": {"f": {"sha256": "0" * 64, "size_bytes": 1}},
    "variants": [{"name": "v", "runtime": "onnx", "file": "f"}], "kind": "release", "format": 1,
}).encode()  # fmt: skip

TOLD = json.dumps({
    "device": "d", "counter": 1, "at": 1.0, "seconds": 300, "kind": "telemetry", "format": 1, "machine": {"celsius": 50},
    "figures": [{"model": "m", "release": 1, "figures": {"ok": 2, "latency": {"80": 2}, "rows": 1, "classes": {"3": 1}, "confidence": {"9": 1}}}],
}).encode()  # fmt: skip

# The fuzzer's provider takes its numbers from the end of the data and the bytes from the front.
SEEDS = {
    "request": [JSON_REQUEST + bytes(8), HEAD + bytes(16) + bytes(8)],
    "stream": [POST + POST + bytes(8), CHUNKS + b"GET /v2 HTTP/1.1\r\nHost: t\r\n\r\n" + bytes(8), POST + b"\x05\x40\x20\x10\x04"],
    "columns": [b'{"instances": [[1, 2, 3, 4]]}' + bytes(4), b'{"inputs": {"x": [[1, 2, 3, 4]]}}' + bytes(4), b'{"examples": [{"x": [1, 2, 3, 4]}]}\x01\x00'],
    "inflated": [b"\x00" + gzip.compress(b"hello" * 100), b"\x01" + zlib.compress(b"hello" * 100)],
    "document": [MANIFEST, TOLD, b'{"format": 1}'],
}  # fmt: skip


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this Python and machine")
@pytest.mark.parametrize("target", SEEDS)
@pytest.mark.timeout(SECONDS + 60)
def test_nothing_but_refusals(tmp_path, target):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(SEEDS[target]):
        (corpus / f"seed-{number}").write_bytes(seed)
    line = [
        sys.executable, "-m", "tests.fuzz.targets", target, f"-max_total_time={SECONDS}", "-timeout=10", "-rss_limit_mb=2048",
        "-max_len=8192", f"-artifact_prefix={tmp_path}/", str(corpus),
    ]  # fmt: skip
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS + 50, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Done" in done.stderr, done.stderr[-2000:]
