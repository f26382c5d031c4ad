"""The tutorial's commands, run in its order, as they stand there."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs/tutorials/first-fleet.md"

LIMIT_S = 100

# The tutorial names its ports, and what it releases is judged while it serves.
pytestmark = [pytest.mark.mosquitto, pytest.mark.long, pytest.mark.timeout(120)]


def run(script: str, output: Path) -> tuple[int, str]:
    """The script's exit status and what it printed. Whatever it started in the background ends with it."""
    with output.open("wb") as file:
        shell = subprocess.Popen(["bash", "-euc", script], cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
    try:
        status = shell.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        status = -1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
    return status, output.read_text(errors="replace")


def test_the_tutorial_works_as_written(tmp_path: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)
    assert len(blocks) == 11
    install, *rest = blocks
    install = install.replace("make .venv/.demo", "true")  # the environment that runs this test is the one it makes
    script = (install + "".join(rest)).replace("/tmp/first-fleet", str(tmp_path / "first-fleet"))
    status, printed = run(script, tmp_path / "printed.txt")
    assert status == 0, printed
    said = " ".join(printed.split())
    assert "golden_mismatch" in said
    assert re.search(r"release 4 rolled.back: error_ratio", said)
    assert said.count("the rollout was aborted, and its status says so") == 2
