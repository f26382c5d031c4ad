"""The tutorial's commands, run in its order, as they stand there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs/tutorials/first-fleet.md"

pytestmark = [pytest.mark.mosquitto, pytest.mark.timeout(120)]


def test_the_tutorial_works_as_written() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)
    assert len(blocks) == 11
    install, *rest = blocks
    install = install.replace("make .venv/.demo", "true")  # the environment that runs this test is the one it makes
    script = "trap 'kill -9 $SERVE $SYNC $FLEET $APP; rm -rf /tmp/first-fleet' EXIT 2> /dev/null\n" + install + "".join(rest)
    done = subprocess.run(["bash", "-euc", script], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "golden_mismatch" in done.stdout
    assert "rolled back: error_ratio" in " ".join(done.stdout.split())
    assert done.stdout.count("the rollout was aborted, and its status says so") == 2
