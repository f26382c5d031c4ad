"""`make bench` runs and measures something. What it measures is read by people, not judged here: machines are noisy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.long, pytest.mark.alone, pytest.mark.timeout(120)]  # they measure


def test_the_quick_benchmark_fails_no_request(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "benchmarks", "--quick", "--json", str(tmp_path / "numbers.json")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert {(row["model"], row["clients"]) for row in numbers["latency"]} == {
        (m, c) for m in ("tiny", "image", "image, shared") for c in (1, 4, 8)
    }
    for row in numbers["latency"]:
        assert row["failures"] == 0
        assert min(row["p50_us"]) > 0
        assert min(row["c_p50_us"]) > 0
    assert "0 failed" in done.stdout
    assert numbers["swap"]["failures"] == 0
    assert set(numbers["mixed"]) == {"busy", "long", "dawdlers"}
    assert set(numbers["loads"]) == {"10", "100"}


def test_a_short_soak_finds_nothing_failed_or_stuck(tmp_path: Path) -> None:
    """Half a minute is too short to tell a leak from warming up, so memory is left to the long one."""
    line = [sys.executable, "-m", "benchmarks.soak", "--minutes", "0.3", "--json", str(tmp_path / "soak.json")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["alive"], done.stdout
    assert found["errors"] == []
    for client in found["clients"]:
        assert (client["errors"], client["wrong"]) == ([], [])
        assert client["answered"] > 0
    assert found["changes"] > 10
    assert found["pests"] > 10


def test_hostile_requests_are_measured() -> None:
    """Memory is the same on every machine; the other client's p99 is not, and is left to readers."""
    line = [sys.executable, "-m", "benchmarks.decoding", "--only", "JSON strings", "--repeats", "1", "--seconds", "0.2"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    _, row = done.stdout.splitlines()[:2]
    assert row.startswith("JSON strings")
    assert float(row.split()[4]) <= 4
