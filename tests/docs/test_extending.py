"""The pages that say how to extend the product, followed as they stand: their files are written, their changes applied, their commands run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkout import ROOT, copy_to

pytestmark = pytest.mark.long

STEP = re.compile(r"^<!-- (file|change|run)(?:: (\S+))? -->\n```\w+\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def steps(page):
    found = STEP.findall((ROOT / "docs/how-to" / page).read_text())
    assert found, f"{page} has no step that could be followed"
    return found


@pytest.fixture
def environment(tmp_path):
    """Of a person with an environment of their own that has the agent: what `pip install` brings goes to a folder of this test."""
    site = tmp_path / "site"
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "pip").write_text(
        f'#!/bin/sh\ncase $1 in install) shift; exec {sys.executable} -m pip install --target {site} "$@";; esac\nexit 1\n'
    )
    (bin_ / "pip").chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{bin_}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f".:{site}",
        "PIP_NO_INDEX": "1",
    }


@pytest.fixture
def checkout(tmp_path):
    """A copy of this checkout, for pages that change the product itself."""
    return copy_to(tmp_path / "checkout")


def change(path, diff):
    """Each part of `diff` (between lines of @@) is at one place in the file, and is changed there."""
    for part in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = [(line[:1], line[1:]) for line in part.splitlines()]
        before, after = ("\n".join(line for sign, line in lines if sign != added) for added in "+-")
        text = path.read_text()
        assert text.count(before) == 1, f"{path.name} has this {text.count(before)} times:\n{before}"
        path.write_text(text.replace(before, after))


def follow(page, folder, environment):
    """What the page's commands printed, one text for each block of them."""
    shown = []
    for kind, name, text in steps(page):
        if kind == "file":
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif kind == "change":
            change(folder / name, text)
        else:
            done = subprocess.run(
                ["bash", "-euc", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False
            )
            assert done.returncode == 0, f"{page}: {text}\n{done.stdout}\n{done.stderr}"
            shown.append(done.stdout)
    return shown


def test_a_runtime_in_a_package_of_its_own(tmp_path, environment):
    folder = tmp_path / "edge-linear-runtime"
    folder.mkdir()
    tested, served = follow("add-a-runtime.md", folder, environment)
    assert "6 passed" in tested
    assert "linear" in served
    assert '"outputs":[{"name":"scores","datatype":"FP32","shape":[1,2],"data":[1.0,6.5]}' in served.replace(" ", "")


def test_a_reason_and_a_gate(checkout, environment):
    (listed,) = follow("add-a-reason.md", checkout, environment)
    assert "| `turned_away` | no: quarantined |" in listed
    (tested,) = follow("add-a-gate.md", checkout, environment)
    assert "failed" not in tested
    assert "max_turned_away_ratio" in (checkout / "docs/reference/manifest.md").read_text()


def test_a_route_and_its_command(checkout, environment):
    (tested,) = follow("add-a-route.md", checkout, environment)
    assert "GET /api/v1/hardware" in tested
    assert "failed" not in tested
