"""`make demo ARGS=--once`: every step goes as told, and what it prints says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Every part of a fleet at once, and releases that are judged while they serve.
pytestmark = [pytest.mark.mosquitto, pytest.mark.long, pytest.mark.timeout(180)]


def test_the_whole_story_goes_as_told(tmp_path: Path) -> None:
    line = [sys.executable, "examples/demo", "--once", "--keep", str(tmp_path / "demo")]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("✓") == 2 * 5, done.stdout  # each step as it ends, and again in the table
    for seen in ("accuracy 0.77", "accuracy 0.98", "golden_mismatch", "rolled back (error_ratio)", "as told, in"):
        assert seen in done.stdout
    assert "\x1b[" not in done.stdout, "no colours without a terminal"


def test_a_story_that_goes_wrong_ends_with_status_1(tmp_path: Path) -> None:
    """Without a broker the first step fails, and says what to do."""
    environment = {**os.environ, "EDGE_DEMO_MOSQUITTO": "/nonexistent/mosquitto", "COLUMNS": "200"}
    line = [sys.executable, "examples/demo", "--once", "--keep", str(tmp_path / "demo")]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "mosquitto" in done.stdout
    assert "not as told" in done.stdout
