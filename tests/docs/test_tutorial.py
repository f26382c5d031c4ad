"""The tutorial's commands, run in its order, as they stand there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs/tutorials/first-fleet.md"

pytestmark = [pytest.mark.mosquitto, pytest.mark.timeout(120)]


def test_the_tutorial_works_as_written(tmp_path: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)
    assert len(blocks) == 11
    install, *rest = blocks
    install = install.replace("make .venv/.demo", "true")  # the environment that runs this test is the one it makes
    ending = "trap 'kill -9 ${SERVE-} ${SYNC-} ${FLEET-} ${APP-}' EXIT 2> /dev/null\n"
    script = (ending + install + "".join(rest)).replace("/tmp/first-fleet", str(tmp_path / "first-fleet"))
    done = subprocess.run(["bash", "-euc", script], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert "golden_mismatch" in said
    assert re.search(r"release 4 rolled.back: error_ratio", said)
    assert said.count("the rollout was aborted, and its status says so") == 2
